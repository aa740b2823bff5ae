"""Placement: what it finds is free and fits, what fits is never refused, and explanations say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, zip_longest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core_world import GIB, sim_gpus
from fal_scheduler.core import invariants
from fal_scheduler.core.driver_versions import at_least
from fal_scheduler.core.explain import FILTERS, explain, summarise, why_pending
from fal_scheduler.core.place import Ask, Placement, Placer
from fal_scheduler.core.records import (
    AssignmentRef,
    Binding,
    BuildTask,
    Change,
    Node,
    PlacementRules,
    Pool,
    Resources,
    Runner,
    Spec,
    key_of,
)
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Capabilities, Gpu, Health, Hold, Inventory

MODELS = ("H100-80GB", "A100-40GB", "L4-24GB")
FEATURES = ((), ("egress", "io-limit"), ("images", "pack"), ("egress", "images", "io-limit"), ("pack",))
MEMORY_GIB = {"H100-80GB": 80, "A100-40GB": 40, "L4-24GB": 24}


@st.composite
def clusters(draw: st.DrawFn) -> State:
    """Up to six nodes of every sort, partly taken; or six that take everything, and differ in their GPUs only."""
    state, easy = State(), draw(st.booleans())
    for name in ("east", "west"):
        pool = Pool(
            name,
            zone=draw(st.sampled_from(("", "z1"))),
            labels={"pool": name},
            allow_host_network=name == "west",
            gpu_hour_price_micros=draw(st.sampled_from((0, 1_000_000, 3_000_000))),
            reclaim_per_hour_ppm=draw(st.sampled_from((0, 50_000))),
        )
        state.apply(Change(key_of(pool), None, pool))
    for at in range(6 if easy else draw(st.integers(0, 6))):
        node = Node(
            f"n-{at}",
            f"node{at}",
            draw(st.sampled_from(("east", "west"))),
            cordoned=not easy and draw(st.integers(0, 5)) == 0,
            labels=draw(st.sampled_from(({}, {"disk": "nvme"}))),
        )
        gpus: tuple[Gpu, ...] = ()
        for kind in draw(st.lists(st.sampled_from(MODELS), min_size=easy, max_size=2, unique=True)):
            count = 4 if easy else draw(st.integers(1, 4))
            of_kind = sim_gpus(f"{at}-{kind}", count, kind, MEMORY_GIB[kind], paired=draw(st.booleans()))
            gpus += draw(st.sampled_from((of_kind, of_kind, of_kind[1:] + _split(of_kind[0]))))
        sick = draw(st.sets(st.sampled_from([gpu.id for gpu in gpus]), max_size=2)) if gpus else set()
        gpus = tuple(_sick(gpu) if gpu.id in sick else gpu for gpu in gpus)
        live = state.live_of(node.id)
        if easy:
            live.health, versions = Health.READY, VERSIONS[-1]
            live.capabilities = Capabilities("oci", features=FEATURES[3])
        else:
            live.health = draw(st.sampled_from((Health.READY, Health.READY, Health.READY, Health.UNKNOWN)))
            driver = draw(st.sampled_from(("oci", "oci", "process")))
            live.capabilities = Capabilities(driver, features=draw(st.sampled_from(FEATURES)))
            live.hold = draw(st.sampled_from((Hold.NONE, Hold.NONE, Hold.NONE, Hold.STORE)))
            versions = draw(st.sampled_from(VERSIONS))
        live.inventory = Inventory(1, gpus, *versions, draw(st.sampled_from((4000, 16_000))), 32 * GIB)
        state.apply(Change(key_of(node), None, node))
        taken = (
            draw(st.sets(st.sampled_from([gpu.id for gpu in gpus]), max_size=3 if easy else None)) if gpus else set()
        )
        for number, gpu in enumerate(sorted(taken)):
            for part, milli in enumerate(draw(st.sampled_from(((0,), (0,), (300,), (300, 500), (250, 250, 500))))):
                app = draw(st.sampled_from(("default/x", "default/y") if part or milli else ("default/x", "team/z")))
                runner_id = f"{app}-{at}-{number}-{part}"
                runner = Runner(runner_id, "g", (Binding(app, 1),), 0.0, node.id, (gpu,), gpu_milli=milli)
                state.apply(Change(key_of(runner), None, runner))
    return state


def _split(gpu: Gpu) -> tuple[Gpu, ...]:
    """The device as two MIG instances; its links are gone, as those to it mean nothing."""
    model = f"{gpu.model}-MIG-1g.10gb"
    return tuple(
        Gpu(f"MIG-{gpu.id}-{at}", model, 10 * GIB, gpu.index, mig_profile="1g.10gb", parent_id=gpu.id)
        for at in range(2)
    )


def _sick(gpu: Gpu) -> Gpu:
    return Gpu(gpu.id, gpu.model, gpu.memory_bytes, gpu.index, healthy=False, health_reason="ECC", links=gpu.links)


# Of the driver and of CUDA; a node may have neither.
VERSIONS = (("", ""), ("550.54.15", "12.4"), ("550.9", "12.10"), ("570.86.15", "12.8"), ("570", "13.0"))

RULES = st.builds(
    PlacementRules,
    labels_preferred=st.sampled_from(({}, {}, {"disk": "nvme", "pool": "east"})),
    affinity=st.sampled_from(((), (), (), ("default/x", "default/none"))),
    affinity_preferred=st.sampled_from(((), ("default/y",))),
    anti_affinity=st.sampled_from(((), (), (), ("team/z",), ("default/x",))),
    anti_affinity_preferred=st.sampled_from(((), ("default/x", "default/y"))),
    spread=st.sampled_from(("", "node", "domain")),
    gpu_topology=st.sampled_from(("", "", "nvlink", "pcie", "numa")),
    wait_value_micros_s=st.sampled_from((0, 0, 3000)),
)

HARD = st.builds(
    Spec,
    image=st.sampled_from(("host", "host", "default/img")),
    build=st.sampled_from((None, None, BuildTask("cluster", "k", 1), BuildTask("image", "k", 1, image="default/i"))),
    num_gpus=st.integers(0, 5),
    machine_type=st.lists(st.sampled_from((*MODELS, "B200-180GB")), max_size=2, unique=True).map(tuple),
    gpu_memory_bytes_min=st.sampled_from((0, 0, 40 * GIB, 100 * GIB)),
    resources=st.builds(
        Resources,
        cpu_milli=st.sampled_from((0, 1000, 8000)),
        memory_bytes=st.sampled_from((0, GIB)),
        io_bytes_s=st.sampled_from((0, 0, 0, 1 << 20)),
    ),
    pools=st.sampled_from(((), (), ("east",), ("north",))),
    labels=st.sampled_from(({}, {}, {"disk": "nvme"}, {"pool": "west"})),
    network=st.sampled_from(("none", "none", "egress", "host")),
    driver_version_min=st.sampled_from(("", "", "", "550.54", "550.9", "570")),
    cuda_version_min=st.sampled_from(("", "", "", "12.4", "12.10")),
    gpu_milli=st.sampled_from((0, 0, 200, 500, 1000)),
    mig_profile=st.sampled_from(("", "", "", "1g.10gb")),
    placement=RULES,
)
# About GPUs and company only, so that most find a place.
EASY = st.builds(
    Spec,
    image=st.just("host"),
    num_gpus=st.sampled_from((0, 1, 1, 1, 2, 2, 3, 4)),
    machine_type=st.sampled_from(((), (), MODELS[:1], MODELS[:2])),
    gpu_milli=st.sampled_from((0, 200, 200, 500, 700)),
    mig_profile=st.sampled_from(("", "", "", "1g.10gb")),
    gpu_memory_bytes_min=st.sampled_from((0, 0, 0, 10 * GIB)),
    placement=RULES,
)
SPECS = st.one_of(EASY, EASY, HARD).map(
    lambda spec: spec if spec.num_gpus == 1 and not spec.mig_profile else replace(spec, gpu_milli=0)
)

ASKS = st.builds(
    Ask,
    app=st.sampled_from(("default/x", "default/y", "team/z")),
    urgent=st.booleans(),
    avoid=st.sampled_from((frozenset[str](), frozenset(("n-0",)))),
).map(lambda ask: replace(ask, team=ask.app.split("/")[0]))


def times(spec: Spec, node_ids: Sequence[str]) -> NDArray[np.int64]:
    """Predicted times that follow from the names of the nodes: some within the band of others, some not."""
    return np.array([3000 + (0, 900, 7000)[int(node_id[2:]) % 3] + len(spec.pools) for node_id in node_ids], np.int64)


def naive(state: State, spec: Spec, ask: Ask) -> set[str]:
    """Nodes that could take the spec, by the plainest reading of the rules."""
    found = set()
    rules = spec.placement
    packs = spec.build is not None and bool(spec.build.image)
    for node in state.nodes.values():
        live = state.live[node.id]
        driver, features = live.capabilities.driver, live.capabilities.features
        labels = {**state.pools[node.pool].labels, **node.labels}
        inventory = live.inventory
        assert inventory is not None
        there = [runner for runner in state.runners.values() if runner.node == node.id]
        apps = {runner.app for runner in there}
        enough = spec.num_gpus == 0 or _enough(inventory.gpus, there, spec, ask)
        if (
            live.health is Health.READY
            and not live.hold
            and not node.cordoned
            and (not spec.pools or node.pool in spec.pools)
            and all(labels.get(key) == value for key, value in spec.labels.items())
            and spec.resources.cpu_milli <= inventory.cpu_milli
            and spec.resources.memory_bytes <= inventory.memory_bytes
            and (spec.network != "host" or state.pools[node.pool].allow_host_network or packs)
            and (spec.network != "egress" or driver == "process" or "egress" in features)
            and (spec.image == "host" or (driver != "process" and "images" in features))
            and (not packs or "pack" in features)
            and (not spec.resources.io_bytes_s or driver == "process" or "io-limit" in features)
            and _new_enough(inventory.driver_version, spec.driver_version_min)
            and _new_enough(inventory.cuda_version, spec.cuda_version_min)
            and node.id not in ask.avoid
            and (not rules.affinity or apps.intersection(rules.affinity))
            and not apps.intersection(rules.anti_affinity)
            and enough
        ):
            found.add(node.id)
    return found


def _enough(gpus: tuple[Gpu, ...], there: list[Runner], spec: Spec, ask: Ask) -> bool:
    """Whether some set of GPUs of one kind may be given, by looking at all of them."""
    usable: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in gpus:
        holders = [runner for runner in there if gpu.id in runner.gpus]
        if not gpu.healthy or gpu.mig_profile != spec.mig_profile or not _of_type(gpu, spec):
            continue
        if spec.gpu_milli:
            ours = all(one.gpu_milli and one.id.startswith(f"{ask.team}/") for one in holders)
            if not ours or sum(one.gpu_milli for one in holders) + spec.gpu_milli > 1000:
                continue
        elif holders:
            continue
        memory = gpu.memory_bytes * (spec.gpu_milli or 1000) // 1000
        if memory >= spec.gpu_memory_bytes_min:
            usable.setdefault((gpu.model, gpu.memory_bytes), []).append(gpu)
    rule = spec.placement.gpu_topology
    return any(
        any(
            all(_joined(a, b, rule) for a, b in combinations(chosen, 2)) for chosen in combinations(kind, spec.num_gpus)
        )
        for kind in usable.values()
    )


def _of_type(gpu: Gpu, spec: Spec) -> bool:
    return not spec.machine_type or gpu.model.split("-MIG-")[0] in spec.machine_type


def _joined(one: Gpu, other: Gpu, rule: str) -> bool:
    if not rule:
        return True
    if rule == "numa":
        return one.numa_node == other.numa_node >= 0
    return any(link.peer_id == other.id and link.kind == "NVLINK" for link in one.links)


def _new_enough(version: str, least: str) -> bool:
    """Part by part, the shorter one filled with zeros."""
    if not least:
        return True
    if not version:
        return False
    pairs = zip_longest(version.split("."), least.split("."), fillvalue="0")
    for have, wanted in pairs:
        if int(have) != int(wanted):
            return int(have) > int(wanted)
    return True


@settings(max_examples=300, deadline=None, database=None)
@given(clusters(), SPECS, ASKS)
def test_place_finds_exactly_what_fits(state: State, spec: Spec, ask: Ask) -> None:
    feasible = naive(state, spec, ask)
    found = Placer(state.fleet).place(spec, ask, times)
    verdicts = explain(state, spec, ask, times)
    assert {verdict.node_id for verdict in verdicts if verdict.feasible} == feasible
    assert (found is not None) == bool(feasible)
    if found is None:
        pending = why_pending(state, spec, ask)
        assert pending.reason
        assert sum(count for _, count in pending.refused) == len(state.nodes)
        assert [name for name, _ in pending.refused] == [name for name in FILTERS if name in dict(pending.refused)]
        assert all(verdict.detail for verdict in verdicts)
        return
    assert found == Placer(state.fleet).place(spec, ask, times), "the same snapshot gives the same answer"
    assert [verdict.node_id for verdict in verdicts if verdict.feasible and verdict.score == 0] == [found.node_id]
    assert found.gpu_milli == spec.gpu_milli
    assert ("ready_ms", found.ready_ms) in found.why
    _check_fits(state, spec, ask, found, feasible)
    _check_promise(state, ask, found)


def _check_fits(state: State, spec: Spec, ask: Ask, found: Placement, feasible: set[str]) -> None:
    assert found.node_id in feasible
    inventory = state.live[found.node_id].inventory
    assert inventory is not None
    gpus = {gpu.id: gpu for gpu in inventory.gpus}
    assert len(set(found.gpus)) == len(found.gpus) == spec.num_gpus
    there = [runner for runner in state.runners.values() if runner.node == found.node_id]
    if spec.num_gpus:
        assert _enough(tuple(gpus[gpu_id] for gpu_id in found.gpus), there, spec, ask)
    if spec.num_gpus and spec.machine_type:
        # The preferred type that anybody could give.
        types = [gpus[gpu_id].model.split("-MIG-")[0] for gpu_id in found.gpus]
        assert len(set(types)) == 1
        for better in spec.machine_type[: spec.machine_type.index(types[0])]:
            assert not naive(state, replace(spec, machine_type=(better,)), ask)


def _check_promise(state: State, ask: Ask, found: Placement) -> None:
    """The plan passes the rules that are checked before its commit; the same one for another, whole, does not."""
    record = Runner(f"{ask.app}-new", "g", (Binding(ask.app, 1),), 0.0, found.node_id, found.gpus)
    record = replace(record, gpu_milli=found.gpu_milli, assignment=AssignmentRef("a-new", 0))
    for runner, fine in ((record, True), (replace(record, id="other/b-new", gpu_milli=0), False)):
        first, second = (record, runner) if not fine else (None, runner)
        if first is not None:
            state.apply(Change(key_of(first), None, first))
        change = Change(key_of(second), None, second)
        state.apply(change)
        rules = {one.rule for one in invariants.check(state, [change])} - {"reference", "assignment-unique"}
        state.apply(change.undone())
        if first is not None:
            state.apply(Change(key_of(first), None, first).undone())
        assert not rules if fine or not found.gpus else rules == {"gpu-once"}, rules


@settings(max_examples=100, deadline=None, database=None)
@given(clusters(), st.lists(st.tuples(SPECS, ASKS), min_size=3, max_size=6))
def test_a_placer_that_followed_along_says_what_a_new_one_says(state: State, asks: list[tuple[Spec, Ask]]) -> None:
    """Columns, masks and boards that were brought along are those that would be made anew."""
    kept = Placer(state.fleet)
    for number, (spec, ask) in enumerate(asks):
        found = kept.place(spec, ask, times)
        assert found == Placer(state.fleet).place(spec, ask, times)
        if found is not None:
            runner = Runner(f"{ask.app}-p{number}", "g", (Binding(ask.app, 1),), 0.0, found.node_id, found.gpus)
            runner = replace(runner, gpu_milli=found.gpu_milli)
            state.apply(Change(key_of(runner), None, runner))
        elif state.runners:
            gone = state.runners[min(state.runners)]
            state.apply(Change(key_of(gone), gone, None))
    followed = kept.place(*asks[0], times)
    state.fleet.distrust()
    assert followed == Placer(state.fleet).place(*asks[0], times)


@settings(max_examples=200, deadline=None, database=None)
@given(clusters(), SPECS, ASKS)
def test_a_node_that_is_better_in_every_term_is_never_passed(state: State, spec: Spec, ask: Ask) -> None:
    found = Placer(state.fleet).place(spec, ask, times)
    if found is None:
        return
    ranked = Placer(state.fleet).rank(spec, ask, times)
    assert next(iter(ranked)) == found.node_id
    terms = {node_id: dict(why) for node_id, why in ranked.items()}
    types = {node_id: _type_at(state, node_id, spec, ask) for node_id in ranked}
    mine = terms[found.node_id]
    for node_id, other in terms.items():
        if types[node_id] > types[found.node_id]:
            continue
        names = ("ready_ms", "wishes_ms", "money_micros", "in_domain")
        assert not all(other.get(name, 0) < mine.get(name, 0) for name in names), (node_id, found)
        # The promise of the band: nobody is passed who is faster by more than it, wishes included.
        if ask.urgent and not spec.placement.wait_value_micros_s and types[node_id] == types[found.node_id]:
            band_ms = max(1000, mine["best_ready_ms"] * 15 // 100)
            cost = mine["ready_ms"] + mine.get("wishes_ms", 0)
            assert cost <= other["ready_ms"] + other.get("wishes_ms", 0) + band_ms


def _type_at(state: State, node_id: str, spec: Spec, ask: Ask) -> int:
    """Which of the machine types the node would serve first."""
    if not spec.num_gpus or not spec.machine_type:
        return 0
    for at, machine_type in enumerate(spec.machine_type):
        if node_id in naive(state, replace(spec, machine_type=(machine_type,)), ask):
            return at
    raise AssertionError(f"{node_id} was ranked and fits nothing")


def _one_node(
    state: State, name: str, gpus: tuple[Gpu, ...], memory_gib: int = 64, versions: tuple[str, str] = ("", "")
) -> None:
    node = Node(name, name, "p")
    live = state.live_of(name)
    live.health, live.inventory = Health.READY, Inventory(1, gpus, *versions, 64_000, memory_gib * GIB)
    state.apply(Change(key_of(node), None, node))


def test_best_fit_leaves_the_fewest_gpus_then_the_least_memory_then_goes_by_id() -> None:
    state = State()
    _one_node(state, "b", sim_gpus("b", 4, "H100-80GB", 80), memory_gib=32)
    _one_node(state, "a", sim_gpus("a", 8, "H100-80GB", 80))
    _one_node(state, "d", sim_gpus("d", 4, "H100-80GB", 80))
    _one_node(state, "c", sim_gpus("c", 4, "H100-80GB", 80), memory_gib=32)
    placer = Placer(state.fleet)
    assert [placer.place(Spec("host", num_gpus=count)).node_id for count in (2, 4, 8)] == ["b", "b", "a"]  # type: ignore[union-attr]


def test_linked_gpus_are_preferred_and_pairs_are_not_broken_for_one() -> None:
    state = State()
    _one_node(state, "a", sim_gpus("a", 6, "H100-80GB", 80, paired=True))
    first = Placer(state.fleet).place(Spec("host", num_gpus=1))
    assert first is not None
    runner = Runner("default/x-1", "g", (Binding("default/x", 1),), 0.0, "a", first.gpus)
    state.apply(Change(key_of(runner), None, runner))
    two = Placer(state.fleet).place(Spec("host", num_gpus=2))
    assert two is not None
    assert two.gpus == ("GPU-a-2", "GPU-a-3")
    one = Placer(state.fleet).place(Spec("host", num_gpus=1))
    assert one is not None
    assert one.gpus == ("GPU-a-1",), "its partner is taken already"


def test_reasons_name_the_nearest_miss() -> None:
    state = State()
    _one_node(state, "n1", sim_gpus("n1", 4, "H100-80GB", 80))
    assert why_pending(state, Spec("host", num_gpus=8, machine_type=("H100-80GB",))).reason == (
        "no node has 8 such GPUs; n1 has 4 H100-80GB, 8 asked"
    )
    unknown = why_pending(state, Spec("host", num_gpus=1, machine_type=("H200-141GB",)))
    assert unknown.reason == "no node has GPU model H200-141GB; the nearest model is H100-80GB"
    assert unknown.nearest_miss == "n1 has H100-80GB, none of H200-141GB"
    runner = Runner("default/x-1", "g", (Binding("default/x", 1),), 0.0, "n1", ("GPU-n1-0",))
    state.apply(Change(key_of(runner), None, runner))
    full = summarise(explain(state, Spec("host", num_gpus=4, machine_type=("H100-80GB",))), Spec("host", num_gpus=4))
    assert full.nearest_miss == "n1 has 3 of 4 H100-80GB free, 4 asked"
    assert full.refused == (("gpu-free", 1),)


def test_a_network_that_the_pool_forbids_or_the_node_lacks_is_said() -> None:
    state = State()
    pool = Pool("p")
    state.apply(Change(key_of(pool), None, pool))
    _one_node(state, "n1", ())
    host, egress = Spec("host", num_gpus=0, network="host"), Spec("host", num_gpus=0, network="egress")
    assert "pool p, which does not set allow_host_network" in why_pending(state, host).reason
    assert why_pending(state, egress).refused == (("network", 1),)
    assert Placer(state.fleet).place(host) is None
    allowed = replace(pool, allow_host_network=True)
    state.apply(Change(key_of(pool), pool, allowed))
    state.refresh_node("n1")
    assert Placer(state.fleet).place(host) is not None, "a changed pool is seen"
    state.live["n1"].capabilities = Capabilities("oci", features=("egress",))
    state.refresh_node("n1")
    assert Placer(state.fleet).place(egress) is not None


def test_old_drivers_are_counted_and_the_newest_is_the_nearest_miss() -> None:
    state = State()
    for name, driver, cuda in (("old", "470.1", "11.4"), ("near", "550.9", "12.4"), ("none", "", "")):
        _one_node(state, name, sim_gpus(name, 1, "H100-80GB", 80), versions=(driver, cuda))
    pending = why_pending(state, Spec("host", num_gpus=1, driver_version_min="550.54"))
    assert pending.refused == (("gpu-driver", 3),)
    assert pending.nearest_miss == "near has GPU driver 550.9, 550.54 or newer asked"
    assert "3 gpu-driver" in pending.reason
    no_cuda = why_pending(state, Spec("host", num_gpus=1, cuda_version_min="12.5", labels={}))
    assert no_cuda.refused == (("cuda", 3),)
    assert no_cuda.nearest_miss == "near has CUDA 12.4, 12.5 or newer asked"
    only = State()
    _one_node(only, "none", sim_gpus("n", 1, "H100-80GB", 80))
    lacks = why_pending(only, Spec("host", num_gpus=1, cuda_version_min="12.5"))
    assert lacks.nearest_miss == "none has no CUDA, 12.5 or newer asked"
    assert Placer(state.fleet).place(Spec("host", num_gpus=1, driver_version_min="550.09")) is not None


def test_a_new_driver_is_seen_by_cached_masks() -> None:
    state = State()
    _one_node(state, "n", sim_gpus("n", 1, "H100-80GB", 80), versions=("470.1", "11.4"))
    placer, spec = Placer(state.fleet), Spec("host", num_gpus=1, driver_version_min="550")
    assert placer.place(spec) is None
    _one_node(state, "n", sim_gpus("n", 1, "H100-80GB", 80), versions=("560.1", "12.6"))
    assert placer.place(spec) is not None


@given(
    st.lists(st.integers(0, 99_999), min_size=1, max_size=4), st.lists(st.integers(0, 99_999), min_size=1, max_size=4)
)
def test_versions_compare_as_numbers(left: list[int], right: list[int]) -> None:
    one, two = (".".join(map(str, parts)) for parts in (left, right))
    assert at_least(one, two) == _new_enough(one, two)
    assert at_least(one, "")
    assert not at_least("simulated", two)
    assert at_least(f"{one}-server", one)
