"""Predictions of placements through the core: each term and tier, what comes of them, what is learnt, what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core_world import CountingIds
from fal_scheduler.core import expectations, ready_at
from fal_scheduler.core.cache_events import CachedFact, CacheTold
from fal_scheduler.core.events import Logged, Moment, NodeHello, NodeReport, Tick
from fal_scheduler.core.place import Placer
from fal_scheduler.core.ready_at import ASSUMED_BYTES_S, NEVER_MS, Prediction
from fal_scheduler.core.records import (
    AssignmentRef,
    Binding,
    CacheEntry,
    Change,
    ImageFacts,
    Meta,
    Model,
    ModelState,
    Node,
    Pool,
    Record,
    Revision,
    Runner,
    RunnerState,
    Spec,
    key_of,
)
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.core.told import Inventory, RunnerStatus
from fal_scheduler.core.work import Work

MB, GB = 10**6, 10**9
A, B = "a" * 64, "b" * 64
SIZE = 10 * GB
SPEC = Spec("host", model="default/m")
APP = "default/app"


class Rig:
    """A core with four nodes, told of by hand; `n4` is in a pool whose network nobody else has."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.state = State()
        self.core = Core(self.state, Placer(self.state.fleet), CountingIds())
        self.put(Meta("c1", 1, "i", 0.0))
        self.put(Pool("p", region="eu", networks=("lan",)))
        self.put(Pool("far", region="us", networks=("wan",)))
        for at in range(1, 5):
            self.put(Node(f"n{at}", f"node{at}", "far" if at == 4 else "p"))
            self.core.step(NodeHello(f"n{at}", f"s{at}", "b", 1000.0, "c1", inventory=Inventory()), self.moment)
        self.put(Model("default/m", "model", "s3://b/m", ModelState.ATTESTED, bytes=SIZE, artifact_id=A))
        self.put(Model("default/other", "model", "s3://b/o", ModelState.ATTESTED, bytes=SIZE, artifact_id=B))
        self.put(Revision(APP, 1, SPEC, "d"))

    @property
    def moment(self) -> Moment:
        return Moment(self.now_s, 1_700_000_000.0 + self.now_s)

    def put(self, record: Record) -> None:
        tables = (self.state.models, self.state.revisions, self.state.runners)
        before = next((one for table in tables for one in table.values() if key_of(one) == key_of(record)), None)
        self.state.apply(Change(key_of(record), before, record))

    def tell(self, node_id: str, put: dict[str, CachedFact] | None = None, **rates: int) -> None:
        told = {name.replace("__", ":", 1): rate for name, rate in rates.items()}
        self.core.step(CacheTold(node_id, self.now_s, put or {}, rates=told), self.moment)

    def predict(self, node_id: str, spec: Spec = SPEC) -> Prediction:
        return ready_at.predict(self.state, node_id, spec, app=APP)

    def place(self, name: str, node_id: str) -> Runner:
        """A runner gets this node, as `starts` would do it."""
        work = Work(self.state, self.moment, CountingIds())
        runner = Runner(
            f"default/{name}", APP, (Binding(APP, 1),), 0.0, node=node_id, assignment=AssignmentRef(name, 1)
        )
        work.put(runner, None)
        return runner

    def ready(self, runner: Runner, after_s: float, **phases: float) -> Logged:
        """Its node tells that it serves."""
        self.now_s += after_s
        status = RunnerStatus(
            runner.id, RunnerState.IDLE, runner.assignment.id if runner.assignment else "", phases=tuple(phases.items())
        )
        report = NodeReport(runner.node, f"s{runner.node[1:]}", self.now_s, statuses=(status,))
        outcome = self.core.step(report, self.moment)
        return next(one for one in outcome.effects if isinstance(one, Logged) and one.kind == "RUNNER_READY")


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_each_tier_costs_what_its_rates_say_and_no_less_than_a_nearer_one(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    rig.tell("n2", {A: CachedFact(SIZE, 0, ready=True)}, origin__b=100 * MB)
    rig.tell("n3", {A: CachedFact(SIZE, SIZE, ready=True)})
    rig.tell("n1", peer__n2=500 * MB, peer__n3=500 * MB)
    at = {node: rig.predict(node) for node in ("n1", "n2", "n3", "n4")}
    assert [at[node].tier for node in at] == ["peer", "disk", "memory", "origin"]
    assert at["n1"].ms("weights") == SIZE * 1000 // (1100 * MB) + 1
    assert at["n2"].ms("weights") == at["n3"].ms("weights") == 0
    assert at["n4"].ms("weights") == SIZE * 1000 // (100 * MB)  # measured by others of that origin
    assert at["n3"].total_ms <= at["n2"].total_ms < at["n1"].total_ms < at["n4"].total_ms


def test_more_bytes_are_never_sooner(rig: Rig) -> None:
    rig.tell("n1", origin__b=80 * MB)
    last = SIZE * 2 * 1000
    for here in range(0, SIZE + 1, GB):
        rig.tell("n1", {A: CachedFact(here)})
        now_ms = rig.predict("n1").total_ms
        assert now_ms <= last
        last = now_ms
    two = replace(SPEC, loras=("default/other",))
    assert rig.predict("n1", two).total_ms > rig.predict("n1").total_ms


def test_what_nobody_measured_is_assumed_slow_and_says_so(rig: Rig) -> None:
    found = rig.predict("n1")
    assert found.ms("weights") == SIZE * 1000 // ASSUMED_BYTES_S
    because = {term.name: term.because for term in found.terms}
    assert "assumed 25 MB/s" in because["weights"]
    assert "assumed, nothing learnt yet" in because["setup"]
    rig.tell("n2", origin__b=26 * MB)
    assert rig.predict("n1").total_ms < found.total_ms
    assert "assumed" not in {term.name: term.because for term in rig.predict("n1").terms}["weights"]


def test_a_folder_is_assumed_to_answer_until_somebody_has_read_it(rig: Rig) -> None:
    rig.put(Model("default/m", "model", "file:///srv/m", ModelState.ATTESTED, bytes=SIZE, artifact_id=A))
    assert rig.predict("n1").ms("weights") == SIZE * 1000 // ASSUMED_BYTES_S
    rig.tell("n1", origin__file=0)
    assert (rig.predict("n1").total_ms, rig.predict("n2").ms("weights")) == (NEVER_MS, SIZE * 1000 // ASSUMED_BYTES_S)
    asked = ["n1", "n2", "n3"]
    before = ready_at.ready_ms(rig.state, SPEC, asked)
    rig.tell("n2", origin__file=100 * MB)
    assert rig.predict("n2").ms("weights") == SIZE * 1000 // (100 * MB)
    assert rig.predict("n3").total_ms == NEVER_MS, "it is another machine's"
    after = ready_at.ready_ms(rig.state, SPEC, asked)
    assert before[2] < NEVER_MS
    assert list(after) == [NEVER_MS, rig.predict("n2").total_ms, NEVER_MS]


def test_where_nothing_leads_comes_last_and_says_why(rig: Rig) -> None:
    rig.tell("n2", {A: CachedFact(SIZE, ready=True)}, origin__b=MB)
    rig.tell("n4", origin__b=0)
    found = rig.predict("n4")
    assert found.total_ms == NEVER_MS
    assert {term.name: term.because for term in found.terms}["weights"].startswith("no route")
    rig.put(Pool("far", region="us"))  # it declares no networks any more
    rig.tell("n4", peer__n2=MB)
    assert rig.predict("n4").total_ms < NEVER_MS


def test_a_line_is_shared_with_what_is_under_way_and_with_what_was_just_placed(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    alone = rig.predict("n1").ms("weights")
    rig.tell("n1", {B: CachedFact(0, fetching=True, bytes_left=4 * GB, rate_bytes_s=100 * MB)})
    assert rig.predict("n1").ms("weights") == alone + 40_000
    rig.tell("n1", {B: CachedFact(SIZE, ready=True)})
    assert rig.predict("n1").ms("weights") == alone
    rig.put(Revision(APP, 1, replace(SPEC, model="default/other"), "d"))
    rig.put(Model("default/other", "model", "s3://b/o", ModelState.ATTESTED, bytes=3 * GB, artifact_id="c" * 64))
    placed = rig.place("r1", "n1")
    assert rig.predict("n1").ms("weights") == alone + 30_000
    assert rig.predict("n2").ms("weights") == alone + 30_000, "the origin's line is shared by all"
    rig.state.apply(Change(key_of(placed), placed, None))
    expectations.forget(rig.state, placed.id)
    assert rig.predict("n1").ms("weights") == alone


def test_what_is_under_way_comes_on_until_it_is_told_again(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    alone = rig.predict("n1").ms("weights")
    rig.tell("n1", {B: CachedFact(0, fetching=True, bytes_left=4 * GB, rate_bytes_s=100 * MB)})
    columns = ready_at.ready_ms(rig.state, SPEC, ["n1", "n2"], app=APP)
    assert columns[0] == rig.predict("n1").total_ms
    for _ in range(2):
        rig.now_s += 5.0
        rig.core.step(Tick(), rig.moment)
        assert list(ready_at.ready_ms(rig.state, SPEC, ["n1", "n2"], app=APP)) == [
            rig.predict(node).total_ms for node in ("n1", "n2")
        ]
    assert rig.predict("n1").ms("weights") == alone + 30_000
    assert rig.predict("n2").ms("weights") == alone + 30_000, "at the origin, too"
    rig.now_s += 1000.0
    rig.core.step(Tick(), rig.moment)
    assert rig.predict("n1").ms("weights") == alone + 25_000, "so long nobody knows it"
    rig.tell("n1", {B: CachedFact(0, fetching=True, bytes_left=3 * GB)})
    rig.now_s += 10.0
    rig.core.step(Tick(), rig.moment)
    assert rig.predict("n1").ms("weights") == alone + 20_000, "one that has just begun gets what the node usually has"


def test_bytes_that_arrive_are_predicted_by_the_rate_at_which_they_do(rig: Rig) -> None:
    rig.tell("n1", {A: CachedFact(4 * GB, fetching=True, bytes_left=6 * GB, rate_bytes_s=50 * MB)}, origin__b=GB)
    assert rig.predict("n1").ms("weights") == 120_000


def test_an_image_and_a_compile_cache_have_their_terms(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    facts = ImageFacts("s", "d", "erofs", first_pieces=tuple(range(400)))
    rig.put(Model("default/i", "image", "s3://b/i", ModelState.ATTESTED, bytes=2 * GB, artifact_id=B, image=facts))
    spec = replace(SPEC, image="default/i", compile_caches=("k",))
    found = rig.predict("n1", spec)
    assert found.ms("image") == -(-400 * (256 << 10) * 1000 // (100 * MB))
    assert found.ms("compile") == 60_000
    rig.put(CacheEntry("cluster", "k", "default/none", "d"))
    assert rig.predict("n1", spec).ms("compile") == 0
    rig.tell("n1", {B: CachedFact(2 * GB, ready=True)})
    assert rig.predict("n1", spec).ms("image") == 0


def test_streamed_weights_overlap_with_the_start(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    plain, streamed = rig.predict("n1"), rig.predict("n1", replace(SPEC, stream_weights=True))
    assert plain.total_ms == sum(plain.ms(name) for name in ("rest", "weights", "start", "setup"))
    assert streamed.total_ms == sum(streamed.ms(name) for name in ("rest", "weights", "tail"))
    assert streamed.total_ms < plain.total_ms


def test_a_prediction_is_compared_when_the_runner_is_ready_and_teaches_the_next(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    runner = rig.place("r1", "n1")
    foretold = rig.state.predictions[runner.id].prediction
    phases = {"weights": 120.0, "make": 0.3, "stage": 120.0, "create": 0.01, "start": 0.04, "setup": 5.0}
    event = rig.ready(runner, 125.25, **phases)
    assert rig.state.predictions == {}
    outcome = rig.state.outcomes[runner.id]
    assert (outcome.ready_ms, outcome.prediction) == (125_250, foretold)
    assert dict(outcome.actual) == {"make": 300, "weights": 120_000, "setup": 5000, "start": 50, "rest": 200}
    assert outcome.error_ppm == abs(foretold.total_ms - 125_250) * 10**6 // 125_250
    assert event.facts["predicted_ms"] == str(foretold.total_ms)
    assert event.facts["actual_ms"] == "125250"
    assert event.facts["weights_ms"] == f"{foretold.ms('weights')}/120000"
    again = rig.predict("n1")
    assert again.total_ms == pytest.approx(125_250, rel=0.01)
    assert rig.predict("n2").ms("setup") == pytest.approx(5000, rel=0.02), "others learn of it too"


@pytest.mark.parametrize(("memory", "tier"), [(0, "disk"), (SIZE, "memory")])
def test_what_is_there_is_asked_for_and_that_takes_its_time_too(rig: Rig, memory: int, tier: str) -> None:
    rig.tell("n1", {A: CachedFact(SIZE, memory, ready=True)}, origin__b=100 * MB)
    phases = {"weights": 0.2, "make": 0.01, "stage": 0.2, "create": 0.01, "start": 0.04, "setup": 0.15}
    for name in ("r1", "r2"):
        runner = rig.place(name, "n1")
        event = rig.ready(runner, 0.5, **phases)
    assert event.facts["weights_ms"] == "200/200"
    again = rig.predict("n1")
    assert again.tier == tier
    assert again.total_ms == pytest.approx(500, rel=0.05)
    assert "learnt from 2 starts" in {term.name: term.because for term in again.terms}["weights"]
    assert ready_at.ready_ms(rig.state, SPEC, ["n1"], app=APP)[0] == again.total_ms
    assert rig.predict("n3").ms("weights") > 99_000, "what must come is another line"
    assert rig.predict("n1", replace(SPEC, model="")).ms("weights") == 0, "without a model nothing is asked for"


def test_a_runner_that_leaves_its_node_is_expected_no_more(rig: Rig) -> None:
    rig.tell("n1", origin__b=100 * MB)
    first, second = rig.place("r1", "n1"), rig.place("r2", "n1")
    work = Work(rig.state, rig.moment, CountingIds())
    work.drop(first)
    assert list(rig.state.cache_facts.nodes["n1"].expected) == [A], "the other waits for it still"
    work.put(replace(second, node="", assignment=None), second)
    assert rig.state.cache_facts.nodes["n1"].expected == {}
    assert rig.state.cache_facts.under_way == {}
    assert rig.state.predictions == {}


def test_a_runner_of_an_earlier_leader_is_ready_without_a_comparison(rig: Rig) -> None:
    runner = Runner("default/r", APP, (Binding(APP, 1),), 0.0, node="n1", assignment=AssignmentRef("x", 1))
    rig.put(runner)
    assert "predicted_ms" not in rig.ready(runner, 5.0, setup=3.0).facts
    assert rig.state.learning.families == {}


def test_a_placement_that_was_taken_back_is_let_go_within_a_minute_or_so(rig: Rig) -> None:
    runner = rig.place("r1", "n1")
    rig.state.apply(Change(key_of(runner), runner, None))  # its commit failed
    assert rig.state.predictions
    for _ in range(2):
        rig.now_s += expectations.SWEEP_EVERY_S
        rig.core.step(Tick(), rig.moment)
    assert (rig.state.predictions, rig.state.cache_facts.under_way) == ({}, {})
