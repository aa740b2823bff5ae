"""Placement by example: boards that exist, shares of GPUs, MIG, company, the order of terms, plans that went stale."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import GIB, World, sim_gpus, spec_of
from fal_agent.core.admission import GpuView, NodeView, admit
from fal_agent.core.assignments import Assignment
from fal_agent.core.tasks import Task
from fal_scheduler.core import invariants
from fal_scheduler.core.boards import NUMA, NVLINK, PCIE, board_of
from fal_scheduler.core.events import ApplyApp, Moment
from fal_scheduler.core.explain import why_pending
from fal_scheduler.core.fleet_fragments import FleetFragments, fragments_of
from fal_scheduler.core.place import Ask, Placer
from fal_scheduler.core.ranking import ReadyFn
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    Change,
    Node,
    PlacementRules,
    Pool,
    Revision,
    Runner,
    Spec,
    key_of,
)
from fal_scheduler.core.state import State
from fal_scheduler.core.step import BrokenInvariant
from fal_scheduler.core.told import Gpu, GpuLink, Health, Inventory

WHOLE = Spec("host", num_gpus=1)
APP = Ask("t/app", "t")


# --- boards ---------------------------------------------------------------------------------------------------------


def gpus_joined(links: dict[tuple[int, int], tuple[str, int]], numa: tuple[int, ...]) -> tuple[Gpu, ...]:
    """GPUs with these links between places (told by the lower one only), in these NUMA nodes."""
    return tuple(
        Gpu(
            f"GPU-{at}", "X-80GB", 80 * GIB, at, numa_node=node,
            links=tuple(GpuLink(f"GPU-{b}", kind, count) for (a, b), (kind, count) in links.items() if a == at),
        )
        for at, node in enumerate(numa)
    )  # fmt: skip


def dgx() -> tuple[Gpu, ...]:
    """Eight GPUs behind NVSwitch: each with each, 18 links; four to a NUMA node."""
    pairs = {(a, b): ("NVLINK", 18) for a in range(8) for b in range(a + 1, 8)}
    return gpus_joined(pairs, (0,) * 4 + (1,) * 4)


def pcie_paired() -> tuple[Gpu, ...]:
    """Eight GPUs, two under each PCIe switch, four to a NUMA node, no NVLink."""
    pairs = {(a, a + 1): ("PCIE_SWITCH", 1) for a in range(0, 8, 2)}
    pairs |= {(a, b): ("PCIE_HOST", 1) for s in (0, 4) for a in range(s, s + 4) for b in range(a + 1, s + 4)
              if (a, b) not in pairs}  # fmt: skip
    return gpus_joined(pairs, (0,) * 4 + (1,) * 4)


def cube_mesh() -> tuple[Gpu, ...]:
    """The hybrid cube mesh of the first DGX (V100): two quads, one and two links, one GPU of the other quad each."""
    one = ((0, 1), (0, 2), (1, 3), (4, 5), (4, 6), (5, 7), (0, 4), (1, 5))
    two = ((0, 3), (1, 2), (2, 3), (4, 7), (5, 6), (6, 7), (2, 6), (3, 7))
    pairs = dict.fromkeys(one, ("NVLINK", 1)) | dict.fromkeys(two, ("NVLINK", 2))
    return gpus_joined(pairs, (0,) * 4 + (1,) * 4)


@pytest.mark.parametrize(
    ("gpus", "free", "count", "rule", "chosen"),
    [
        # All alike but for the NUMA node: the driver's first, of one NUMA node.
        (dgx(), range(8), 4, NVLINK, (0, 1, 2, 3)),
        (dgx(), (1, 4, 5, 6), 2, "", (4, 5)),  # rather than 1 and one of the other node
        (dgx(), range(8), 8, NVLINK, tuple(range(8))),
        (dgx(), range(8), 5, NUMA, None),
        # A pair under one switch, and none is broken for one.
        (pcie_paired(), (0, 2, 3), 2, PCIE, (2, 3)),
        (pcie_paired(), (0, 2, 3), 1, "", (0,)),
        (pcie_paired(), range(8), 4, "", (0, 1, 2, 3)),
        (pcie_paired(), (0, 2, 4, 6), 2, "", (0, 2)),  # no pair left: one NUMA node at least
        (pcie_paired(), (0, 2, 4, 6), 2, PCIE, None),
        (pcie_paired(), (0, 4), 2, NUMA, None),
        (pcie_paired(), range(8), 2, NVLINK, None),
        # Asymmetric: pairs with two links first, quads whole, no clique of five.
        (cube_mesh(), range(8), 2, "", (0, 3)),
        (cube_mesh(), range(8), 4, NVLINK, (0, 1, 2, 3)),
        (cube_mesh(), (0, 1, 5, 6, 7), 3, NVLINK, (5, 6, 7)),
        (cube_mesh(), range(8), 5, NVLINK, None),
    ],
)
def test_gpus_are_chosen_by_how_they_are_joined(
    gpus: tuple[Gpu, ...], free: range | tuple[int, ...], count: int, rule: str, chosen: tuple[int, ...] | None
) -> None:
    assert board_of(gpus).choose(tuple(free), count, rule) == chosen


@settings(max_examples=60, deadline=None, database=None)
@given(st.data())
def test_no_set_of_gpus_is_better_joined_than_the_chosen(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 7))
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    counts = {pair: ("NVLINK", data.draw(st.integers(0, 3))) for pair in pairs}
    board = board_of(gpus_joined({pair: link for pair, link in counts.items() if link[1]}, (0,) * size))
    free = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    count = data.draw(st.integers(1, len(free)))
    chosen = board.choose(free, count)
    assert chosen is not None
    sums = [
        sum(counts[pair][1] for pair in pairs if pair[0] in some and pair[1] in some)
        for some in _subsets(free, count)
    ]  # fmt: skip
    assert sum(counts[pair][1] for pair in pairs if pair[0] in chosen and pair[1] in chosen) == max(sums)


def _subsets(of: list[int], count: int) -> list[tuple[int, ...]]:
    if count == 0:
        return [()]
    return [(one, *rest) for at, one in enumerate(of) for rest in _subsets(of[at + 1 :], count - 1)]


def test_many_instances_without_links_are_chosen_at_once() -> None:
    gpus = tuple(Gpu(f"MIG-{at}", "X", GIB, mig_profile="1g.10gb") for at in range(56))
    assert board_of(gpus).choose(tuple(range(3, 56)), 20) == tuple(range(3, 23))
    assert board_of(gpus).choose(tuple(range(56)), 2, NVLINK) is None


# --- a small fleet --------------------------------------------------------------------------------------------------


def fleet(**pools: dict[str, int | str]) -> State:
    """A state with these pools."""
    state = State()
    for name, values in pools.items():
        pool = Pool(name, **values)  # type: ignore[arg-type]
        state.apply(Change(key_of(pool), None, pool))
    return state


def node(state: State, name: str, pool: str = "p", gpus: tuple[Gpu, ...] | None = None, **labels: str) -> None:
    """A node that is ready, with two H100 unless told otherwise."""
    live = state.live_of(name)
    gpus = sim_gpus(name, 2, "H100-80GB", 80) if gpus is None else gpus
    live.health, live.inventory = Health.READY, Inventory(1, gpus, "", "", 64_000, 64 * GIB)
    record = Node(name, name, pool, labels=labels)
    state.apply(Change(key_of(record), None, record))


def run(state: State, id_: str, on: str, *gpus: str, milli: int = 0) -> Runner:
    """A runner of app `team/app` with id `team/app-…` there."""
    runner = Runner(id_, "g", (Binding(id_.rpartition("-")[0], 1),), 0.0, on, gpus, gpu_milli=milli)
    state.apply(Change(key_of(runner), None, runner))
    return runner


def chosen(state: State, spec: Spec, ask: Ask = APP, **ready_ms: int) -> str:
    """The node, with predicted times by name (default 1,000)."""
    found = Placer(state.fleet).place(spec, ask, times(**ready_ms))
    return found.node_id if found is not None else ""


def times(**ready_ms: int) -> ReadyFn:
    return lambda spec, node_ids: np.array([ready_ms.get(name, 1000) for name in node_ids], np.int64)


# --- shares, MIG, company -------------------------------------------------------------------------------------------


def test_shares_of_one_team_fill_a_gpu_before_another_is_opened() -> None:
    state = fleet(p={})
    node(state, "a")
    half = replace(WHOLE, gpu_milli=400)
    for number in range(3):
        found = Placer(state.fleet).place(half, APP)
        assert found is not None
        run(state, f"t/app-{number}", "a", *found.gpus, milli=found.gpu_milli)
    held = state.fleet.occupancy["a"].holders
    assert {gpu: len(runners) for gpu, runners in held.items()} == {"GPU-a-0": 2, "GPU-a-1": 1}
    assert Placer(state.fleet).place(WHOLE, APP) is None, "a shared GPU is not a whole one"
    assert Placer(state.fleet).place(half, Ask("u/app", "u")) is None, "another team does not get a share of it"
    assert why_pending(state, half, Ask("u/app", "u")).refused == (("gpu-share", 1),)
    assert chosen(state, replace(WHOLE, gpu_milli=600)) == "a"
    most = why_pending(state, replace(WHOLE, gpu_milli=700), APP)
    assert (
        most.nearest_miss == "a has at most 0.6 of a GPU left for this team, 0.7 asked; only runners of one team share"
    )
    state.apply(Change("k", state.runners["t/app-2"], None))
    assert chosen(state, WHOLE) == "a", "what nobody shares any more is whole again"


def test_a_share_is_a_share_of_memory() -> None:
    state = fleet(p={})
    node(state, "a")
    assert chosen(state, replace(WHOLE, gpu_milli=500, gpu_memory_bytes_min=40 * GIB)) == "a"
    short = replace(WHOLE, gpu_milli=499, gpu_memory_bytes_min=40 * GIB)
    assert why_pending(state, short).nearest_miss == "0.499 of a's GPUs has 39.9 GiB, 40.0 asked"


def test_instances_are_given_to_who_names_their_profile_only() -> None:
    state = fleet(p={})
    instances = tuple(
        Gpu(f"MIG-{at}", "H100-80GB-MIG-1g.10gb", 10 * GIB, mig_profile="1g.10gb", parent_id="GPU-a-9")
        for at in range(2)
    )
    node(state, "a", gpus=instances)
    node(state, "b")
    small = Spec("host", num_gpus=1, mig_profile="1g.10gb")
    assert (chosen(state, small), chosen(state, WHOLE)) == ("a", "b")
    assert chosen(state, replace(small, machine_type=("H100-80GB",))) == "a", "an instance is of its device's model"
    assert chosen(state, replace(WHOLE, machine_type=("H100-80GB",))) == "b"
    assert chosen(state, replace(WHOLE, machine_type=("H100-80GB-MIG-1g.10gb",))) == "a"
    other = why_pending(state, replace(small, mig_profile="3g.40gb"))
    assert other.refused == (("mig", 2),)
    assert other.nearest_miss == "a has 1g.10gb, asked are 3g.40gb"


def test_company_is_kept_and_avoided() -> None:
    state = fleet(p={})
    for name in "ab":
        node(state, name)
    run(state, "t/x-1", "a", "GPU-a-0")
    beside = replace(WHOLE, placement=PlacementRules(affinity=("t/x",)))
    apart = replace(WHOLE, placement=PlacementRules(anti_affinity=("t/x",)))
    assert (chosen(state, beside), chosen(state, apart)) == ("a", "b")
    run(state, "t/x-2", "b", "GPU-b-0")
    why = why_pending(state, apart)
    assert why.refused == (("anti-affinity", 2),)
    assert why.nearest_miss == "a runs t/x"
    state.apply(Change("k", state.runners["t/x-1"], None))
    state.apply(Change("k", state.runners["t/x-2"], None))
    assert why_pending(state, beside).nearest_miss == "a runs none of t/x"


# --- the order of terms ---------------------------------------------------------------------------------------------


def test_price_decides_inside_the_band_and_time_outside() -> None:
    """Pitfall 16: 3.02 s at 10 $/h must not beat 3.05 s at 1 $/h."""
    state = fleet(dear={"gpu_hour_price_micros": 10_000_000}, cheap={"gpu_hour_price_micros": 1_000_000})
    node(state, "a", "dear")
    node(state, "b", "cheap")
    assert chosen(state, WHOLE, a=3020, b=3050) == "b"
    assert chosen(state, WHOLE, a=3000, b=4000) == "b", "a second counts as equal"
    assert chosen(state, WHOLE, a=3000, b=4001) == "a"
    assert chosen(state, WHOLE, a=60_000, b=69_000) == "b", "and so do 15 %"
    assert chosen(state, WHOLE, a=60_000, b=69_001) == "a"
    assert chosen(state, WHOLE, replace(APP, urgent=False), a=3000, b=60_000) == "b", "nobody waits"


def test_a_wait_value_weighs_time_against_price() -> None:
    state = fleet(dear={"gpu_hour_price_micros": 4_000_000}, cheap={"gpu_hour_price_micros": 1_000_000})
    node(state, "a", "dear")
    node(state, "b", "cheap")
    ask = replace(APP, hold_s=600)  # 0.5 dollars more for the hold
    for micros_s, best in ((9_000, "b"), (11_000, "a")):  # 50 seconds
        spec = replace(WHOLE, placement=PlacementRules(wait_value_micros_s=micros_s))
        assert chosen(state, spec, ask, a=10_000, b=60_000) == best


def test_spot_is_worth_its_risk_or_not() -> None:
    state = fleet(
        spot={"gpu_hour_price_micros": 1_000_000, "reclaim_per_hour_ppm": 500_000},
        firm={"gpu_hour_price_micros": 1_010_000},
    )
    node(state, "a", "spot")
    node(state, "b", "firm")
    hour = replace(APP, hold_s=3600)
    assert chosen(state, WHOLE, hour, a=10_000, b=10_000) == "a", "half a reclaim that loses a cent is less than a cent"
    assert chosen(state, WHOLE, hour, a=40_000, b=40_000) == "b"


def test_wishes_count_for_more_than_the_band_and_less_than_a_minute() -> None:
    state = fleet(p={})
    node(state, "a", disk="nvme")
    node(state, "b")
    wish = replace(WHOLE, placement=PlacementRules(labels_preferred={"disk": "nvme"}))
    assert chosen(state, wish, a=5000, b=1000) == "a"
    assert chosen(state, wish, a=7001, b=1000) == "b"
    assert chosen(state, wish, a=118_000, b=100_000) == "a"
    assert chosen(state, wish, a=136_000, b=100_000) == "b"
    run(state, "t/app-1", "a", "GPU-a-0")
    assert chosen(state, replace(WHOLE, placement=PlacementRules(spread="node"))) == "b"
    assert chosen(state, replace(WHOLE, placement=PlacementRules(anti_affinity_preferred=("t/app",)))) == "b"
    assert chosen(state, replace(WHOLE, placement=PlacementRules(affinity_preferred=("t/app",)))) == "a"


def test_equals_are_spread_over_failure_domains_then_fitted() -> None:
    state = fleet(e={"zone": "z1"}, f={"zone": "z1"}, w={"zone": "z2"})
    node(state, "a", "e")
    node(state, "b", "f")
    node(state, "c", "w")
    assert chosen(state, WHOLE) == "a"
    run(state, "t/app-1", "a", "GPU-a-0")
    assert chosen(state, WHOLE) == "c", "another zone"
    run(state, "t/app-2", "c", "GPU-c-0")
    assert chosen(state, WHOLE) == "a", "both zones alike: the fuller node"
    far = replace(WHOLE, placement=PlacementRules(spread="domain"))
    assert chosen(state, far, a=1000, b=1000, c=4000) == "a"
    run(state, "t/app-3", "b", "GPU-b-0")
    assert chosen(state, far, a=1000, b=1000, c=4000) == "c"
    moved = replace(state.pools["w"], zone="z1")
    state.apply(Change(key_of(moved), state.pools["w"], moved))
    assert chosen(state, far, a=1000, b=1000, c=4000) == "a", "a pool that moves takes its runners along"


def test_what_strands_least_decides_among_equals() -> None:
    """Two apps: one takes whole nodes, one single GPUs. The single one goes where no whole node is broken."""
    state = fleet(p={})
    for at, gpus in enumerate((1, 2)):
        spec, name = Spec("host", num_gpus=gpus), f"t/app{at}"
        for record in (Revision(name, 1, spec, ""), App(name, 1)):
            state.apply(Change(key_of(record), None, record))
    node(state, "a")
    node(state, "b")
    run(state, "t/x-1", "b", "GPU-b-0")
    scores = fragments_of(state).score(WHOLE, np.array([0, 1]))
    assert scores[1] > scores[0]
    found = Placer(state.fleet).place(WHOLE, APP, None, fragments_of(state).score)
    assert found is not None
    assert found.node_id == "b"


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.sampled_from((0, 200, 500))), max_size=8))
def test_scores_that_were_brought_along_are_those_made_anew(steps: list[tuple[str, int, int]]) -> None:
    state = fleet(p={})
    for name in "abc":
        node(state, name)
    for at, milli in enumerate((0, 300)):
        record = Revision(f"t/app{at}", 1, replace(WHOLE, gpu_milli=milli), "")
        state.apply(Change("k", None, record))
        state.apply(Change("k", None, App(f"t/app{at}", 1)))
    specs = (WHOLE, replace(WHOLE, gpu_milli=300), Spec("host", num_gpus=2))
    rows = np.arange(3)
    keeping = FleetFragments(direct_max=0)
    for number, (name, gpu, milli) in enumerate(steps):
        run(state, f"t/app0-{number}", name, f"GPU-{name}-{gpu}", milli=milli)
        for spec in specs:
            kept = keeping.follow(state).score(spec, rows)
            assert kept.tolist() == FleetFragments().follow(state).score(spec, rows).tolist()


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("wxyz"), st.sampled_from((0, 200, 500, 1000)), st.integers(0, 3), st.booleans()),
        max_size=12,
    )
)
def test_what_is_typical_follows_apps_as_they_come_change_and_go(steps: list[tuple[str, int, int, bool]]) -> None:
    state = fleet(p={})
    for name in "abc":
        node(state, name)
    run(state, "t/r-1", "a", "GPU-a-0", milli=300)
    run(state, "t/r-2", "b", "GPU-b-1")
    specs, rows = (WHOLE, replace(WHOLE, gpu_milli=300)), np.arange(3)
    keeping = FleetFragments(direct_max=0)
    for number, (name, milli, runners, goes) in enumerate(steps):
        before = state.apps.get(f"t/{name}")
        spec = replace(WHOLE, gpu_milli=milli % 1000, scaling=replace(WHOLE.scaling, max_concurrency=runners))
        if goes and before is not None:
            state.apply(Change("k", before, replace(before, deleting=True) if runners else None))
        else:
            state.apply(Change("k", None, Revision(f"t/{name}", number, spec, "")))
            state.apply(Change("k", before, App(f"t/{name}", number)))
        if number == 6:
            node(state, "d")
        for one in specs:
            kept = keeping.follow(state).score(one, rows)
            assert kept.tolist() == FleetFragments().follow(state).score(one, rows).tolist()


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "milli", "rule"),
    [
        ("t/y-2", 0, "gpu-once"),  # a whole one beside a share
        ("t/y-2", 701, "gpu-share"),
        ("u/y-2", 200, "gpu-team"),
        ("t/y-2", 1001, "gpu-share"),
        ("t/y-2", 700, ""),
    ],
)
def test_a_double_promise_is_refused(second: str, milli: int, rule: str) -> None:
    state = fleet(p={})
    node(state, "a")
    run(state, "t/x-1", "a", "GPU-a-0", milli=300)
    state.term = 1
    runner = replace(run(state, second, "a", "GPU-a-0", milli=milli), assignment=AssignmentRef("as", 1))
    state.apply(Change("k", state.runners[second], runner))
    found = invariants.check(state, [Change("k", None, runner)])
    assert {one.rule for one in found} - {"reference"} == ({rule} if rule else set())
    if rule:
        named = next(one for one in found if one.rule == rule)
        assert second in named.subjects


def _tampered(world: World, column: str) -> None:
    fleet = world.state.fleet.fresh()
    match column:
        case "ready":  # every node is closed, the column says otherwise
            fleet.ready[:] = True
        case "memory_free":
            fleet.memory_free[:] = 1 << 50
        case "free":
            fleet.teams[:] = 0
            fleet.free[:] = 4


@pytest.mark.parametrize(("column", "rule"), [("ready", "node-open"), ("memory_free", "capacity"), ("free", "gpu-")])
def test_a_plan_from_stale_columns_never_commits(column: str, rule: str) -> None:
    """The records are looked at again: the step is taken back, the node named; then it goes on with true columns."""
    world = World(Random(1), nodes=1)
    state = world.state
    spec, digest = spec_of(gpus=2, least=1, memory_gib=40)
    if column == "ready":
        state.apply(Change("k", state.nodes["n-0"], replace(state.nodes["n-0"], cordoned=True)))
    else:
        world.step(ApplyApp("default/full", spec, digest))
        world.deliver("n-0")
    before = dict(state.runners)
    _tampered(world, column)
    other, digest = spec_of(gpus=2 if column == "free" else 0, least=1, memory_gib=1 if column == "free" else 40)
    moment = Moment(world.now_s, world.wall_s)
    with pytest.raises(BrokenInvariant) as broken:
        world.core.step(ApplyApp("default/late", other, digest), moment)
    assert state.runners == before
    assert any(one.rule.startswith(rule) for one in broken.value.violations), broken.value.violations
    world.core.freeze(broken.value.violations, moment)
    named = {subject for one in broken.value.violations for subject in one.subjects}
    assert named.issubset(state.frozen)
    assert named.intersection((*state.nodes, *before)), "something that stays is frozen, not only what never was"
    world.core.step(ApplyApp("default/late", other, digest), moment)
    assert not [runner for runner in state.runners.values() if runner.app == "default/late" and runner.node]
    world.check()


# --- the node's own word --------------------------------------------------------------------------------------------


def test_an_agent_lets_shares_of_one_team_on_a_gpu_and_nothing_else() -> None:
    busy = NodeView({"G": GpuView("G", memory_used_bytes=30 << 30, pids=(7,))}, 1 << 40, 64_000, term_seen=1)
    idle = replace(busy, gpus={"G": GpuView("G")})
    first = Assignment("a1", 1, "t/x-1", gpus=("G",), gpu_milli=600)
    assert admit(first, busy, [], leader_term=1) is not None, "the first one must find it idle"
    assert admit(first, idle, [], leader_term=1) is None
    there = [Task(first)]
    second = Assignment("a2", 1, "t/y-2", gpus=("G",), gpu_milli=400)
    assert admit(second, busy, there, leader_term=1) is None, "what is used is the first one's"
    for wrong, code in (
        (replace(second, gpu_milli=401), "NO_CAPACITY"),
        (replace(second, gpu_milli=0), "CONFLICT"),
        (replace(second, runner_id="u/y-2"), "CONFLICT"),
    ):
        refusal = admit(wrong, busy, there, leader_term=1)
        assert refusal is not None
        assert refusal.code == code
    assert admit(second, busy, [Task(replace(first, gpu_milli=0))], leader_term=1) is not None
    ill = replace(busy, gpus={"G": GpuView("G", "ECC")})
    assert admit(second, ill, there, leader_term=1) is not None
