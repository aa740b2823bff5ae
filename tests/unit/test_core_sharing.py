"""Apps of a share group get places in live runners: when, at whose cost, and never across teams or engines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest

from core_world import GIB, World, spec_of
from demand_rig import Serving
from fal_scheduler.core.bindings import residencies_of, same_engine, serves_app
from fal_scheduler.core.events import ApplyApp, DeleteApp, Logged
from fal_scheduler.core.invariants import check
from fal_scheduler.core.records import Binding, Change, Model, ModelState, Probe, Runner, Scaling, Spec, key_of
from fal_scheduler.core.sharing import BARRED_S, ROOM_PERC, room_bytes

KEPT = 1000.0


def add_model(world: World, name: str, *, gib: int = 1, kind: str = "model") -> str:
    model = Model(
        name, kind, f"file:///{name}", ModelState.ATTESTED, "ab" * 32, gib * GIB, 1, artifact_id=f"artifact of {name}"
    )
    world.state.apply(Change(key_of(model), None, model))
    return name


@dataclass
class Group(Serving):
    """Apps `default/a`, `default/b` … of share group `g`, each with a model of its own of `gib`."""

    world: World = field(default_factory=lambda: World(Random(1), nodes=1))

    def app(self, app: str, *, gib: int = 1, group: str = "g", model: str = "", **changes: object) -> None:
        spec = self.spec(app, gib=gib, group=group, model=model, **changes)
        assert self.world.step(ApplyApp(app, spec, f"digest of {spec!r}")) is not None
        self.world.settle()

    def spec(self, app: str, *, gib: int = 1, group: str = "g", model: str = "", **changes: object) -> Spec:
        name = model or f"{app}-model"
        if name not in self.world.state.models:
            add_model(self.world, name, gib=gib)
        spec, _ = spec_of(gpus=1, tag="engine")
        scaling = Scaling(max_concurrency=4, keep_alive_s=KEPT)
        return replace(replace(spec, model=name, share_group=group, scaling=scaling), **changes)  # type: ignore[arg-type]

    def use(self, app: str, seconds: int = 15) -> Runner:
        """A request is answered; who answered it."""
        self.ask(1, app=app, takes_s=1.0)
        before = len(self.waits_s)
        self.run(seconds)
        assert len(self.waits_s) == before + 1, f"{app} was not served: {self.world.state.pending}"
        [runner] = self.ready(app)
        return runner

    def ready(self, app: str = "default/a") -> list[Runner]:
        return [one for one in self.runners(app) if serves_app(self.world.state, one, app)]

    def placed(self) -> list[Runner]:
        return [one for one in self.world.state.runners.values() if one.node]


def test_a_second_app_is_served_by_the_live_runner_of_the_first() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b")
    first = group.use("default/a")
    shared = group.use("default/b")
    assert (shared.id, shared.apps) == (first.id, ("default/a", "default/b"))
    assert len(group.placed()) == 1
    assert group.use("default/a").id == first.id, "both are resident: nothing has to be loaded"
    assert {one.id for one in shared.residencies} == {"default/a-model", "default/b-model"}


def test_a_container_is_started_where_that_is_sooner() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b", gib=60)  # a minute to load into a live worker, and no less in a container; nobody is idle
    group.ask(1, app="default/a", takes_s=300.0)
    group.run(10)
    group.ask(1, app="default/b", takes_s=1.0)
    group.run(20)
    assert len(group.placed()) == 2, "a runner that is busy is no place"


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"TAG": "another"}},
        {"command": ("other",)},
        {"probe": Probe(ready_path="/other")},
        {"group": "h"},
        {"group": ""},
        {"gpu_memory_bytes_min": GIB},
        {"scaling": Scaling(max_concurrency=4, keep_alive_s=KEPT, max_multiplexing=2)},
    ],
    ids=str,
)
def test_other_engines_and_groups_never_share(changes: dict[str, object]) -> None:
    group = Group()
    group.app("default/a")
    first = group.use("default/a")
    group.app("default/b", **changes)  # type: ignore[arg-type]
    assert group.use("default/b").id != first.id
    assert all(len(one.bindings) == 1 for one in group.placed())


def test_other_teams_never_share_and_an_invariant_holds_it() -> None:
    group = Group()
    group.app("default/a")
    first = group.use("default/a")
    group.app("rivals/b", model="rivals/secret")
    second = group.use("rivals/b")
    assert second.id != first.id
    state = group.world.state
    stolen = replace(
        first,
        bindings=(*first.bindings, Binding("rivals/b", 1, "rivals/secret")),
        residencies=(*first.residencies, *second.residencies),
    )
    state.apply(Change(key_of(first), first, stolen))
    assert "share-team" in {found.rule for found in check(state, [Change(key_of(first), first, stolen)])}
    state.apply(Change(key_of(first), stolen, first))


def test_where_the_device_is_full_the_least_valuable_goes() -> None:
    group = Group()
    state = group.world.state
    for app, gib in (("default/a", 30), ("default/b", 30), ("default/c", 30)):
        group.app(app, gib=gib)
    runner = group.use("default/a")
    assert room_bytes(state, runner) == 80 * GIB * ROOM_PERC // 100
    group.use("default/b", 30)
    for _ in range(6):  # `a` is asked for often: it stays
        group.use("default/a", 5)
    shared = group.use("default/c", 40)
    assert shared.id == runner.id
    assert shared.apps == ("default/a", "default/c")
    assert not group.runners("default/b")
    assert group.use("default/b", 40).apps == ("default/a", "default/b")


def test_a_model_that_does_not_load_costs_its_binding_only() -> None:
    group = Group()
    node = next(iter(group.world.nodes.values()))
    node.broken.add("default/b-model")
    group.app("default/a")
    group.app("default/b")
    first = group.use("default/a")
    second = group.use("default/b", 30)
    assert second.id != first.id
    assert group.ready("default/a")[0].apps == ("default/a",)
    assert group.world.state.sharing_barred_s["default/b"] > group.world.now_s
    group.run(int(BARRED_S) // 20)
    assert len(group.placed()) == 2


def test_each_app_leaves_by_its_own_keep_alive_and_the_last_takes_the_runner_along() -> None:
    group = Group()
    group.app("default/a", scaling=Scaling(max_concurrency=4, keep_alive_s=30.0))
    group.app("default/b", scaling=Scaling(max_concurrency=4, keep_alive_s=120.0))
    runner = group.use("default/a")
    assert group.use("default/b", 10).id == runner.id
    group.run(40)
    assert [one.apps for one in group.placed()] == [("default/b",)]
    assert [one.id for one in group.placed()[0].residencies] == ["default/b-model"]
    group.run(120)
    assert not group.placed()


def test_deleting_the_app_that_began_it_leaves_the_other_its_runner() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b")
    runner = group.use("default/a")
    group.use("default/b")
    group.world.step(DeleteApp("default/a"))
    group.run(5)
    assert "default/a" not in group.world.state.apps
    assert [(one.id, one.apps) for one in group.placed()] == [(runner.id, ("default/b",))]
    assert group.use("default/b").id == runner.id


def test_an_app_that_waits_too_long_for_a_shared_runner_gets_another() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b")
    group.use("default/a")
    group.use("default/b")
    group.ask(1, app="default/a", takes_s=500.0)
    group.run(3)
    group.ask(1, app="default/b", takes_s=1.0)
    group.run(20)
    assert len(group.placed()) == 2
    assert len(group.waits_s) == 4, "the second was answered while the first is under way"


def test_a_crash_sends_the_guests_away() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b")
    runner = group.use("default/a")
    group.use("default/b")
    node = next(iter(group.world.nodes.values()))
    node.crash(runner.id)
    group.world.report(node.id)
    group.world.settle()
    assert not any("default/b" in one.apps for one in group.world.state.runners.values())
    assert not group.world.state.demand.bound
    assert set(group.world.state.backoffs) == {"default/a", "default/b"}


def test_a_lora_of_a_resident_model_is_all_that_is_loaded() -> None:
    group = Group()
    add_model(group.world, "default/ink", kind="lora")
    group.app("default/a", model="default/base")
    group.app("default/b", model="default/base", loras=("default/ink",))
    runner = group.use("default/a")
    shared = group.use("default/b")
    assert shared.id == runner.id
    assert [(one.id, one.base) for one in shared.residencies] == [
        ("default/base", ""),
        ("default/ink@default/base", "default/base"),
    ]


def test_apps_that_depend_on_neighbours_are_left_to_placement() -> None:
    group = Group()
    spec = group.spec("default/a")
    rules = replace(spec.placement, anti_affinity=("default/b",))
    assert same_engine(spec, replace(spec, model="default/other", loras=("default/l",)))
    assert not same_engine(replace(spec, placement=rules), replace(spec, placement=rules))
    assert residencies_of(group.world.state, replace(spec, share_group=""))[0].id == "main"


def test_the_choice_is_told_with_its_numbers() -> None:
    group = Group()
    group.app("default/a")
    group.app("default/b")
    group.use("default/a")
    logged: list[Logged] = []
    step = group.world.core.step

    def spy(event: object, moment: object) -> object:
        outcome = step(event, moment)  # type: ignore[arg-type]
        logged.extend(one for one in outcome.effects if isinstance(one, Logged))
        return outcome

    group.world.core = replace_step(group.world, spy)
    group.use("default/b")
    [told] = [one for one in logged if one.kind == "RUNNER_SHARED"]
    assert int(told.facts["load_ms"]) > 0
    assert int(told.facts["load_ms"]) < int(told.facts["start_ms"])
    assert told.message.startswith("serves default/b ")


def replace_step(world: World, spy: object) -> object:
    class Spied:
        state = world.core.state
        placer = world.core.placer
        ids = world.core.ids
        step = staticmethod(spy)  # type: ignore[arg-type]
        taken_back = world.core.taken_back

    return Spied()
