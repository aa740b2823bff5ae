"""`place`: FGD decisions per second ÷ vectorised Random-fit decisions per second, on the openb trace in one process.

A decision is choosing and holding; the fleet begins empty and 1.3 times its GPUs are asked for, so that it fills up.
Random-fit does what every policy must: finds all nodes where the task fits, in numpy. Also timed: our own policy, and
both on 10,000 nodes of 8 GPUs. Seconds are of processor time, so that other processes of the machine do not count. The
trace is looked for in `FALCTL_OPENB`, else in `../shared/data/openb`; without it the benchmark skips.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness import Options, Paired, Result, interleave, percentile, print_table

from fal_scheduler.sim.openb import Trace, arrivals, load, shares_of
from fal_scheduler.sim.place import large_fleet
from fal_scheduler.sim.placing import Played, Run, once_through

MUST_REACH = "ratio >= 0.5; fgd and falctl >= 10,000/s on 1,213 nodes, >= 5,000/s on 10,000; p99 of a decision <= 5 ms"
RATIO_MIN = 0.5
SMALL_PER_S, LARGE_PER_S, P99_MS = 10_000, 5_000, 5.0
LARGE_TASKS = 30_000
SEED = 42


def played(trace: Trace, policy: str, *, tasks_max: int = 1 << 20, each: bool = False) -> Played:
    """One run from an empty fleet."""
    one = Run(policy, shares_of(trace, SEED), trace.tasks, seed=SEED, learnt=False)
    tasks = arrivals(trace, SEED, 1.3)[:tasks_max]
    return once_through(one, tasks, capacity_milli=trace.capacity_milli, at_pct=130, each=each)


def p99_ms(one: Played) -> float:
    """Of single decisions."""
    return percentile(one.took_cpu_s, 0.99) * 1000


async def run(options: Options) -> Result:
    folder = Path(os.environ.get("FALCTL_OPENB") or Path(__file__).resolve().parents[3] / "shared" / "data" / "openb")
    if not folder.exists():
        raise SystemExit(f"place: skipped, the openb trace is not at {folder}")
    trace = load(folder / "openb_node_list_gpu_node.csv", folder / "openb_pod_list_default.csv")

    async def per_s(policy: str) -> float:
        one = played(trace, policy)
        return one.decisions / one.cpu_s

    pairs: Paired = await interleave(lambda: per_s("fgd"), lambda: per_s("random"), pairs=options.pairs)
    ours: Paired = await interleave(lambda: per_s("falctl"), lambda: per_s("random"), pairs=options.pairs)
    rows: list[tuple[object, ...]] = []
    reached = pairs.ratio >= RATIO_MIN
    large = large_fleet(trace)
    medians = {"fgd": float(pairs.as_json()["ours"]), "falctl": float(ours.as_json()["ours"])}
    extra: dict[str, object] = {"falctl": ours.as_json()}
    for policy in ("fgd", "falctl"):
        for fleet, tasks_max, least in ((trace, 1 << 20, SMALL_PER_S), (large, LARGE_TASKS, LARGE_PER_S)):
            one = played(fleet, policy, tasks_max=tasks_max, each=True)
            rate, tail = one.decisions / one.cpu_s, p99_ms(one)
            if fleet is trace:
                rate = medians[policy]  # telling each decision's time costs some
            rows.append((policy, len(fleet.nodes), round(rate), round(tail, 3)))
            extra[f"{policy}_{len(fleet.nodes)}"] = {"decisions_per_s": round(rate), "p99_ms": round(tail, 3)}
            reached &= rate >= least and tail <= P99_MS
    print_table(("policy", "nodes", "decisions per s of processor", "p99 ms"), rows)
    value = pairs.as_json()
    return Result(
        "place", value["ours"], value["baseline"], pairs.ratio, "decisions/s", options.pairs, MUST_REACH, reached, extra
    )
