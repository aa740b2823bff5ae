"""`falctl sim place`: how much of a fleet's GPUs placement policies fill with a trace's tasks.

One JSON object with `--json`: `{"policies": [{"policy", "mean", "min", "max", "per_seed", "decisions_per_s", …}]}`,
allocated GPU in per cent. `--bench` adds how fast decisions are on the trace's fleet and on 10,000 nodes of 8 GPUs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fal_contract.errors import invalid
from fal_scheduler.core.fragmentation import Demand
from fal_scheduler.sim.openb import Node, Trace, arrivals, load, shares_of
from fal_scheduler.sim.placing import POLICIES, Played, Run, once_through, with_departures

SEEDS_MAX: Final = 1000
ARRIVAL_MAX: Final = 10.0
BENCH_NODES: Final = 10_000
BENCH_GPUS: Final = 8
PRIORS: Final = ("published", "learnt")
_STEADY_LOAD: Final = 0.95
_WARM_UP: Final = 4  # turnovers of the fleet until what is measured no longer drifts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `falctl sim place`."""
    parser.add_argument("--nodes", type=Path, required=True, help="CSV: sn, cpu_milli, memory_mib, gpu, model")
    parser.add_argument("--pods", type=Path, required=True, help="CSV of tasks: name, cpu_milli, memory_mib, num_gpu …")
    parser.add_argument("--policy", default="falctl", help=f"one or several of {','.join(POLICIES)}, or all")
    parser.add_argument("--seeds", default="42-51", help="42-51 or 42,43 (default 42-51)")
    parser.add_argument("--arrival", type=float, default=1.3, help="demand that arrives, times the GPUs (default 1.3)")
    parser.add_argument("--priors", default="published", help="typical tasks: published (the whole file) or learnt")
    parser.add_argument(
        "--departures", action="store_true", help="tasks also end: steady at 95 %% of the GPUs asked for"
    )
    parser.add_argument("--bench", action="store_true", help="also time decisions, here and on 10,000 nodes of 8 GPUs")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read, play, print; the exit code."""
    names, seeds = _policies(args.policy), _seeds(args.seeds)
    if args.priors not in PRIORS:
        raise invalid("priors", args.priors, "is not known", remedy=f"Use {' or '.join(PRIORS)}.")
    if not 0.0 < args.arrival <= ARRIVAL_MAX:
        raise invalid("arrival", args.arrival, f"is not above 0 and at most {ARRIVAL_MAX:g}", remedy="Use 1.3.")
    trace = load(args.nodes, args.pods)
    learnt = args.priors == "learnt"
    play = _steady if args.departures else _once
    results = [play(trace, name, seeds, args.arrival, learnt) for name in names]
    if args.bench:
        for result in results:
            result["bench"] = _bench(trace, result["policy"], seeds[0], args.arrival)
    if args.json:
        machine = {"machine": platform.machine(), "numpy": np.__version__}
        print(json.dumps({"policies": results, "priors": args.priors, **machine}))
    else:
        _print(results)
    return 0


def _once(trace: Trace, name: str, seeds: Sequence[int], arrival: float, learnt: bool) -> dict[str, Any]:
    played: dict[int, Played] = {}
    for seed in seeds:
        one = Run(name, shares_of(trace, seed), trace.tasks, seed=seed, learnt=learnt)
        tasks = arrivals(trace, seed, arrival)
        played[seed] = once_through(one, tasks, capacity_milli=trace.capacity_milli, at_pct=round(arrival * 100))
    decisions = sum(one.decisions for one in played.values())
    return {
        **_summary(name, {seed: one.allocated_pct for seed, one in played.items()}),
        "refused": sum(one.refused for one in played.values()),
        "decisions_per_s": round(decisions / sum(one.wall_s for one in played.values())),
        "decisions_per_cpu_s": round(decisions / max(sum(one.cpu_s for one in played.values()), 1e-9)),
    }


def _steady(trace: Trace, name: str, seeds: Sequence[int], arrival: float, learnt: bool) -> dict[str, Any]:
    """Mean allocation, and what share of the demand fitted nowhere, once the fleet has turned over."""
    turnovers = max(round(arrival), 1)
    allocated, refused = {}, {}
    for seed in seeds:
        one = Run(name, shares_of(trace, seed), trace.tasks, seed=seed, learnt=learnt)
        events = list(with_departures(one, trace, seed=seed, load=_STEADY_LOAD, turnovers=turnovers, before=_WARM_UP))
        allocated[seed] = 100 * statistics.fmean(now for now, _ in events) / trace.capacity_milli
        refused[seed] = 100 * sum(lost for _, lost in events) / (turnovers * trace.capacity_milli)
    return {
        **_summary(name, allocated),
        "load": _STEADY_LOAD,
        "refused_pct": round(statistics.fmean(refused.values()), 3),
    }


def _summary(name: str, pct: dict[int, float]) -> dict[str, Any]:
    return {
        "policy": name,
        "mean": round(statistics.fmean(pct.values()), 3),
        "min": round(min(pct.values()), 3),
        "max": round(max(pct.values()), 3),
        "per_seed": {str(seed): round(value, 3) for seed, value in pct.items()},
    }


def _bench(trace: Trace, name: str, seed: int, arrival: float) -> list[dict[str, Any]]:
    """Decisions per second, and percentiles of one decision in ms, on both fleets; scores are cached from the start."""
    return [
        _timed(fleet, name, seed, arrival, tasks_max)
        for fleet, tasks_max in ((trace, 1 << 20), (large_fleet(trace), 100_000))
    ]


def _timed(trace: Trace, name: str, seed: int, arrival: float, tasks_max: int) -> dict[str, Any]:
    one = Run(name, shares_of(trace, seed), trace.tasks, seed=seed, learnt=False)
    tasks: list[Demand] = arrivals(trace, seed, arrival)[:tasks_max]
    played = once_through(one, tasks, capacity_milli=trace.capacity_milli, at_pct=round(arrival * 100), each=True)
    took_ms = np.percentile(np.array(played.took_s) * 1000, (50, 99, 100))
    return {
        "nodes": len(trace.nodes),
        "gpus": trace.capacity_milli // 1000,
        "decisions": played.decisions,
        "decisions_per_s": round(played.decisions / played.wall_s),
        "decisions_per_cpu_s": round(played.decisions / max(played.cpu_s, 1e-9)),
        "p50_ms": round(float(took_ms[0]), 4),
        "p99_ms": round(float(took_ms[1]), 4),
        "max_ms": round(float(took_ms[2]), 4),
        "p99_cpu_ms": round(float(np.percentile(np.array(played.took_cpu_s) * 1000, 99)), 4),
    }


def large_fleet(trace: Trace) -> Trace:
    """10,000 nodes of 8 GPUs: the trace's own such nodes, repeated in order."""
    models = [node for node in trace.nodes if node.gpus == BENCH_GPUS]
    if not models:
        raise invalid("nodes", "the list", f"has no node of {BENCH_GPUS} GPUs", remedy="Leave --bench out.")
    nodes = tuple(
        Node(f"{models[place % len(models)].name}-{place}", *models[place % len(models)][1:])
        for place in range(BENCH_NODES)
    )
    return Trace(nodes, trace.tasks, trace.kinds)


def _policies(text: str) -> list[str]:
    names = list(POLICIES) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        if name not in POLICIES:
            raise invalid("policy", name, "is not known", remedy=f"Use {', '.join(POLICIES)}, or all.")
    if not names:
        raise invalid("policy", text, "names none", remedy=f"Use {', '.join(POLICIES)}, or all.")
    return names


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or len(part) > 20:
            raise invalid("seeds", text, "is neither a range nor a list of numbers", remedy="Use 42-51 or 42,43.")
        begin, end = int(first), int(last or first)
        if not begin <= end < begin + SEEDS_MAX:
            raise invalid("seeds", text, f"is empty or has more than {SEEDS_MAX}", remedy="Use 42-51 or 42,43.")
        seeds.extend(range(begin, end + 1))
    return list(dict.fromkeys(seeds))[:SEEDS_MAX]


def _print(results: Sequence[dict[str, Any]]) -> None:
    print(f"{'POLICY':16}{'MEAN %':>9}{'MIN %':>9}{'MAX %':>9}{'PER S':>9}")
    for one in results:
        speed = one.get("decisions_per_s", "")
        print(f"{one['policy']:16}{one['mean']:>9.2f}{one['min']:>9.2f}{one['max']:>9.2f}{speed:>9}")
        for row in one.get("bench", ()):
            figures = f"{row['decisions_per_s']}/s, p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms"
            print(f"  {row['nodes']} nodes, {row['gpus']} GPUs: {figures}")
