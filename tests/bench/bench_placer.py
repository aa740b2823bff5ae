"""`placer`: placements per second by `Placer.place`, ranking and all, on 10,000 nodes of 8 GPUs.

One placement: the filters on all rows, the predicted times of all feasible ones, band, price, reclaim risk, spread,
fragmentation, the GPUs of the node, and the hold that brings the columns along. Shapes are drawn like those of a fleet
that serves media models: whole GPUs and shares, models and labels that few nodes have, preferences, all mixed. The
baseline is the least that any vectorised scheduler does with the same asks: one mask over the same columns and the
first node that fits (first fit), with the same hold. Times are the processor's, of one core: all is computing, and what
else the machine does counts little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
from harness import Options, Result, interleave, percentile, print_table, significant

from core_world import GIB, sim_gpus
from fal_scheduler.core.fleet import Fleet, Ints, NodeFacts
from fal_scheduler.core.fleet_fragments import fragments_of
from fal_scheduler.core.place import Ask, Placer, choose_gpus
from fal_scheduler.core.records import App, Change, PlacementRules, Resources, Revision, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Gpu, GpuLink

MUST_REACH = "at least 1,000 placements a second"
NODES = 10_000
MODELS = ("H100-80GB", "A100-80GB", "L40S-48GB")


def gpus_of(node_id: str, model: str, *, switched: bool) -> tuple[Gpu, ...]:
    """Eight GPUs, each joined with each by NVLink, or in pairs."""
    gpus = sim_gpus(node_id, 8, model, 80 if "80" in model else 48, paired=True)
    if not switched:
        return gpus
    ids = [gpu.id for gpu in gpus]
    return tuple(
        replace(gpu, links=tuple(GpuLink(other, "NVLINK", 18) for other in ids if other != gpu.id)) for gpu in gpus
    )


def fleet_of(nodes: int) -> Fleet:
    """Three GPU models, ten pools in five domains, at three prices."""
    fleet = Fleet()
    for at in range(nodes):
        node_id, model, pool = f"n-{at:05d}", MODELS[at % 3], at % 10
        fleet.set_node(
            NodeFacts(
                node_id, True, False, False, True, "oci", f"pool{pool}", {"disk": "nvme"} if at % 4 else {}, 128_000,
                1024 * GIB, gpus_of(node_id, model, switched=at % 2 == 0),
                frozenset(("images",)), domain=f"zone{pool % 5}", gpu_hour_price_micros=2_000_000 + pool % 3 * 500_000,
                reclaim_per_hour_ppm=20_000 if pool > 7 else 0,
            )
        )  # fmt: skip
    fleet.fresh()
    return fleet


def asks_of(count: int, rng: Random) -> list[tuple[Spec, Ask]]:
    """So many asks of 40 apps."""
    rules = (
        PlacementRules(),
        PlacementRules(),
        PlacementRules(spread="domain", labels_preferred={"disk": "nvme"}),
        PlacementRules(gpu_topology="nvlink"),
        PlacementRules(wait_value_micros_s=2000),
    )
    apps: list[Spec] = []
    for at in range(40):
        gpus = rng.choice((1, 1, 1, 2, 4))
        apps.append(
            Spec(
                "host", num_gpus=gpus, machine_type=rng.choice(((), (MODELS[0],), MODELS[1:])),
                resources=Resources(rng.choice((4000, 8000)), 32 * GIB), placement=rules[at % len(rules)],
                gpu_milli=rng.choice((0, 0, 250, 500)) if gpus == 1 else 0,
            )
        )  # fmt: skip
    drawn = [rng.randrange(40) for _ in range(count)]
    return [(apps[at], Ask(f"team{at % 4}/app{at}", f"team{at % 4}", urgent=at % 3 > 0)) for at in drawn]


class Times:
    """Predicted times: one column for all, some nodes warm."""

    def __init__(self, nodes: int, rng: Random) -> None:
        generator = np.random.default_rng(rng.randrange(2**32))
        self._column: Ints = np.where(generator.random(nodes) < 0.02, 3_000, generator.integers(20_000, 40_000, nodes))

    def __call__(self, spec: Spec, node_ids: Sequence[str]) -> Ints:
        return self._column


def ours(fleet: Fleet, asks: Sequence[tuple[Spec, Ask]], times: Times) -> list[float]:
    """Seconds of each placement."""
    state, placer, spent = State(), Placer(fleet), []
    state.fleet = fleet
    for ask, spec in {ask: spec for spec, ask in asks}.items():
        for record in (Revision(ask.app, 1, spec, ""), App(ask.app, 1)):
            state.apply(Change("", None, record))
    fragments = fragments_of(state).score
    for number, (spec, ask) in enumerate(asks):
        began_s = time.process_time()
        found = placer.place(spec, ask, times, fragments)
        assert found is not None
        held = found.gpus, found.memory_bytes, found.cpu_milli, found.gpu_milli
        fleet.hold(found.node_id, f"{ask.app}-{number}", *held, (ask.app,))
        spent.append(time.process_time() - began_s)
    return spent


def first_fit(fleet: Fleet, asks: Sequence[tuple[Spec, Ask]]) -> float:
    """Seconds for all of them."""
    began_s = time.process_time()
    for number, (spec, ask) in enumerate(asks):
        resources = spec.resources
        rows = (fleet.memory_free >= resources.memory_bytes) & (fleet.cpu_free >= resources.cpu_milli)
        rows &= fleet.shareable(ask.team, spec.gpu_milli) if spec.fractional else fleet.free >= spec.num_gpus
        row = int(np.argmax(rows))
        gpus = choose_gpus(fleet, row, Spec("host", num_gpus=spec.num_gpus, gpu_milli=spec.gpu_milli), ask.team)
        held = gpus, resources.memory_bytes, resources.cpu_milli, spec.gpu_milli
        fleet.hold(fleet.node_ids[row], f"{ask.app}-{number}", *held, (ask.app,))
    return time.process_time() - began_s


async def run(options: Options) -> Result:
    """Pairs of runs, each on a fleet of its own."""
    rng = Random(5)
    count = max(100, int(1000 * options.seconds_s))
    asks, times = asks_of(count, rng), Times(NODES, rng)
    slow: list[float] = []

    async def run_ours() -> float:
        spent = ours(fleet_of(NODES), asks, times)
        slow.extend(spent)
        return len(spent) / sum(spent)

    async def run_baseline() -> float:
        return len(asks) / first_fit(fleet_of(NODES), asks)

    paired = await interleave(run_ours, run_baseline, pairs=options.pairs)
    p99_ms = significant(percentile(slow, 0.99) * 1000)
    our_s, baseline_s = statistics.median(paired.ours), statistics.median(paired.baseline)
    print_table(("", "placements/s", "p99 ms"), [("ours", our_s, p99_ms), ("first fit", baseline_s, "")])
    return Result(
        "placer", our_s, baseline_s, paired.ratio, "placements/s", options.pairs, MUST_REACH,
        our_s >= 1000.0, {"p99_ms": p99_ms, "nodes": NODES},
    )  # fmt: skip
