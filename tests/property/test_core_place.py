"""Placement: what it finds is free and fits, what fits is never refused, and explanations say the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import GIB, sim_gpus
from fal_scheduler.core.driver_versions import at_least
from fal_scheduler.core.explain import FILTERS, explain, summarise, why_pending
from fal_scheduler.core.place import Placement, Placer
from fal_scheduler.core.records import Binding, BuildTask, Change, Node, Pool, Resources, Runner, Spec, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Capabilities, Gpu, Health, Hold, Inventory

MODELS = ("H100-80GB", "A100-40GB", "L4-24GB")
FEATURES = ((), ("egress", "io-limit"), ("images", "pack"), ("egress", "images", "io-limit"), ("pack",))
MEMORY_GIB = {"H100-80GB": 80, "A100-40GB": 40, "L4-24GB": 24}


@st.composite
def clusters(draw: st.DrawFn) -> State:
    """Up to six nodes of every sort, partly taken."""
    state = State()
    for name in ("east", "west"):
        pool = Pool(name, labels={"pool": name}, allow_host_network=name == "west")
        state.apply(Change(key_of(pool), None, pool))
    for at in range(draw(st.integers(0, 6))):
        node = Node(
            f"n-{at}",
            f"node{at}",
            draw(st.sampled_from(("east", "west"))),
            cordoned=draw(st.integers(0, 5)) == 0,
            labels=draw(st.sampled_from(({}, {"disk": "nvme"}))),
        )
        gpus: tuple[Gpu, ...] = ()
        for kind in draw(st.lists(st.sampled_from(MODELS), max_size=2, unique=True)):
            count = draw(st.integers(1, 4))
            gpus += sim_gpus(f"{at}-{kind}", count, kind, MEMORY_GIB[kind], paired=draw(st.booleans()))
        sick = draw(st.sets(st.sampled_from([gpu.id for gpu in gpus]), max_size=2)) if gpus else set()
        gpus = tuple(_sick(gpu) if gpu.id in sick else gpu for gpu in gpus)
        live = state.live_of(node.id)
        live.health = draw(st.sampled_from((Health.READY, Health.READY, Health.READY, Health.UNKNOWN)))
        driver = draw(st.sampled_from(("oci", "oci", "process")))
        live.capabilities = Capabilities(driver, features=draw(st.sampled_from(FEATURES)))
        live.hold = draw(st.sampled_from((Hold.NONE, Hold.NONE, Hold.NONE, Hold.STORE)))
        versions = draw(st.sampled_from(VERSIONS))
        live.inventory = Inventory(1, gpus, *versions, draw(st.sampled_from((4000, 16_000))), 32 * GIB)
        state.apply(Change(key_of(node), None, node))
        taken = draw(st.sets(st.sampled_from([gpu.id for gpu in gpus]))) if gpus else set()
        for number, gpu in enumerate(sorted(taken)):
            runner = Runner(f"default/x-{at}-{number}", "g", (Binding("default/x", 1),), 0.0, node.id, (gpu,))
            state.apply(Change(key_of(runner), None, runner))
    return state


def _sick(gpu: Gpu) -> Gpu:
    return Gpu(gpu.id, gpu.model, gpu.memory_bytes, gpu.index, healthy=False, health_reason="ECC", links=gpu.links)


# Of the driver and of CUDA; a node may have neither.
VERSIONS = (("", ""), ("550.54.15", "12.4"), ("550.9", "12.10"), ("570.86.15", "12.8"), ("570", "13.0"))

SPECS = st.builds(
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
)


def naive(state: State, spec: Spec) -> set[str]:
    """Nodes that could take the spec, by the plainest reading of the rules."""
    found = set()
    packs = spec.build is not None and bool(spec.build.image)
    for node in state.nodes.values():
        live = state.live[node.id]
        driver, features = live.capabilities.driver, live.capabilities.features
        labels = {**state.pools[node.pool].labels, **node.labels}
        inventory = live.inventory
        assert inventory is not None
        held = {gpu for runner in state.runners.values() if runner.node == node.id for gpu in runner.gpus}
        by_kind: dict[tuple[str, int], int] = {}
        for gpu in inventory.gpus:
            if gpu.healthy and gpu.id not in held and gpu.memory_bytes >= spec.gpu_memory_bytes_min:
                by_kind[gpu.model, gpu.memory_bytes] = by_kind.get((gpu.model, gpu.memory_bytes), 0) + 1
        enough = spec.num_gpus == 0 or any(
            count >= spec.num_gpus and (not spec.machine_type or model in spec.machine_type)
            for (model, _), count in by_kind.items()
        )
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
            and enough
        ):
            found.add(node.id)
    return found


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


@settings(max_examples=150, deadline=None, database=None)
@given(clusters(), SPECS)
def test_place_finds_exactly_what_fits(state: State, spec: Spec) -> None:
    feasible = naive(state, spec)
    found = Placer(state.fleet).place(spec)
    verdicts = explain(state, spec)
    assert {verdict.node_id for verdict in verdicts if verdict.feasible} == feasible
    assert (found is not None) == bool(feasible)
    if found is None:
        pending = why_pending(state, spec)
        assert pending.reason
        assert sum(count for _, count in pending.refused) == len(state.nodes)
        assert [name for name, _ in pending.refused] == [name for name in FILTERS if name in dict(pending.refused)]
        assert all(verdict.detail for verdict in verdicts)
        return
    assert found == Placer(state.fleet).place(spec), "the same snapshot gives the same answer"
    _check_fits(state, spec, found, feasible)


def _check_fits(state: State, spec: Spec, found: Placement, feasible: set[str]) -> None:
    assert found.node_id in feasible
    inventory = state.live[found.node_id].inventory
    assert inventory is not None
    gpus = {gpu.id: gpu for gpu in inventory.gpus}
    held = {gpu for runner in state.runners.values() for gpu in runner.gpus}
    assert len(set(found.gpus)) == len(found.gpus) == spec.num_gpus
    for gpu_id in found.gpus:
        assert gpus[gpu_id].healthy
        assert gpu_id not in held
        assert gpus[gpu_id].memory_bytes >= spec.gpu_memory_bytes_min
    if spec.num_gpus and spec.machine_type:
        # The preferred type that anybody could give.
        types = [gpus[gpu_id].model for gpu_id in found.gpus]
        assert len(set(types)) == 1
        for better in spec.machine_type[: spec.machine_type.index(types[0])]:
            assert not naive(state, _only(spec, better))


def _only(spec: Spec, machine_type: str) -> Spec:
    return replace(spec, machine_type=(machine_type,))


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
