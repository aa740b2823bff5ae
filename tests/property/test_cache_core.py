"""The pure parts behind sessions of caches: the table's books, wishes, predictions, paths. Properties."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fal_scheduler.core.cache_paths import needs_tls, shared_endpoints
from fal_scheduler.core.eta import NO_ROUTE, NOT_MEASURED, PeerSupply, Question, predict
from fal_scheduler.core.records import Model, ModelState, Pool, Wish
from fal_scheduler.core.residency import STALE_KEPT_S, Counts, Holding, ResidencyTable
from fal_scheduler.core.told import Endpoint
from fal_scheduler.core.wishes import Wanted, WishNode, WishNodes, meant, merge, wanted_of

ARTIFACTS = [letter * 64 for letter in "abcd"]
NODES = [f"n{i}" for i in range(4)]
MB = 1_000_000


# --- the table -------------------------------------------------------------------------------------------------------


@st.composite
def holdings(draw: st.DrawFn) -> Holding:
    done = draw(st.integers(0, 10))
    return Holding(
        artifact_id=draw(st.sampled_from(ARTIFACTS)),
        bytes=10,
        bytes_disk=done,
        ready=done == 10 and draw(st.booleans()),
        wanted=draw(st.booleans()),
        rate_bytes_s=draw(st.integers(0, 5)),
        bytes_from_origin=draw(st.integers(0, 10)),
    )


class TableMachine(RuleBasedStateMachine):
    """The books of the table against a plain count over a model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ResidencyTable()
        self.truth: dict[str, dict[str, Holding]] = {}
        self.left: dict[str, float] = {}
        self.unreachable: dict[str, frozenset[str]] = {}
        self.copies: dict[str, list[str]] = {}
        self.now_s = 0.0

    def _heard(self, copies: dict[str, None]) -> None:
        for node_id in copies:
            self.copies[node_id] = self.table.last_copies(node_id)

    def _counted(self, node: str, told: Holding) -> Holding:
        """What was read at the origin stays read while the artifact stays."""
        before = self.truth.get(node, {}).get(told.artifact_id)
        return replace(told, bytes_from_origin=max(told.bytes_from_origin, before.bytes_from_origin if before else 0))

    @rule(node=st.sampled_from(NODES), told=st.lists(holdings(), max_size=5, unique_by=lambda x: x.artifact_id))
    def hello(self, node: str, told: list[Holding]) -> None:
        before = set(self.truth.get(node, {}))
        self.truth[node] = {x.artifact_id: self._counted(node, x) for x in told}
        self.left.pop(node, None)
        self.unreachable[node] = frozenset()
        changed = self.table.hello(node, told)
        assert before ^ set(self.truth[node]) <= set(changed.members)
        self._heard(changed.copies)

    @rule(
        node=st.sampled_from(NODES),
        told=st.lists(holdings(), max_size=3),
        gone=st.lists(st.sampled_from(ARTIFACTS), max_size=2),
        peers=st.none() | st.sets(st.sampled_from(NODES)),
    )
    def report(self, node: str, told: list[Holding], gone: list[str], peers: set[str] | None) -> None:
        if node not in self.truth:
            return
        for artifact_id in gone:
            self.truth[node].pop(artifact_id, None)
        for x in told:
            self.truth[node][x.artifact_id] = self._counted(node, x)
        if peers is not None:
            self.unreachable[node] = frozenset(peers)
        self._heard(self.table.report(node, holdings=told, gone=gone, unreachable=peers).copies)

    @rule(node=st.sampled_from(NODES))
    def leave(self, node: str) -> None:
        self.table.left(node, self.now_s)
        if node in self.truth:
            self.left.setdefault(node, self.now_s)
            self.left[node] = self.now_s

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for node, at_s in list(self.left.items()):
            if self.now_s - at_s > STALE_KEPT_S:
                del self.truth[node], self.left[node], self.unreachable[node]
        for node, changed in self.table.expire(self.now_s):
            assert node not in self.truth
            self.copies.pop(node, None)
            self._heard(changed.copies)

    @invariant()
    def books_agree(self) -> None:
        assert {node.node_id for node in self.table.nodes()} == set(self.truth)
        assert len(self.table) == sum(len(x) for x in self.truth.values())
        for artifact_id in ARTIFACTS:
            held = {node: x[artifact_id] for node, x in self.truth.items() if artifact_id in x}
            assert dict(self.table.holders(artifact_id)) == held
            assert self.table.counts(artifact_id) == Counts(
                sum(x.ready for x in held.values()),
                sum(x.wanted and not x.ready for x in held.values()),
                sum(x.bytes_from_origin for x in held.values()),
            )
        for node_id in NODES:
            assert self.table.unreached_by(node_id) == {n for n, peers in self.unreachable.items() if node_id in peers}
            node = self.table.node(node_id)
            assert node is None or set(node.fetching) == {i for i, x in self.truth[node_id].items() if x.fetching}

    @invariant()
    def whoever_has_a_last_copy_was_told(self) -> None:
        for node_id, held in self.truth.items():
            alone = sorted(
                i
                for i, x in held.items()
                if x.ready and not any(o[i].ready for n, o in self.truth.items() if n != node_id and i in o)
            )
            assert self.table.last_copies(node_id) == alone
            assert self.copies.get(node_id, []) == alone


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, database=None)
BOUNDED = settings(max_examples=80, deadline=None, database=None)


# --- wishes ----------------------------------------------------------------------------------------------------------

MODEL = Model("t/m", "model", "s3://b/m", ModelState.ATTESTED, bytes=100, files=1, artifact_id="a" * 64)


@st.composite
def fleets(draw: st.DrawFn) -> list[WishNode]:
    return [
        WishNode(
            id=f"n{i}",
            pool=draw(st.sampled_from(["p", "q"])),
            domain=draw(st.sampled_from(["x", "y", "z"])),
            open=draw(st.booleans()),
            alive=draw(st.integers(0, 4)) > 0,
            room_bytes=draw(st.integers(0, 1000)),
        )
        for i in range(draw(st.integers(0, 12)))
    ]


def held(*node_ids: str, done: int = 100) -> dict[str, Holding]:
    return {i: Holding(MODEL.artifact_id, 100, done, ready=done == 100, wanted=True) for i in node_ids}


@BOUNDED
@given(fleet=fleets(), replicas=st.integers(1, 6), data=st.data())
def test_replicas_are_as_many_as_can_be_and_prefer_who_has_it(
    fleet: list[WishNode], replicas: int, data: st.DataObject
) -> None:
    wish = Wish(MODEL.id, "replicas", replicas)
    holders = held(*data.draw(st.sets(st.sampled_from([x.id for x in fleet]))) if fleet else ())
    chosen = meant(wish, MODEL, WishNodes(fleet), holders)
    by_id = {node.id: node for node in fleet}
    able = [x for x in fleet if x.alive and (x.open or x.id in holders)]
    assert len(chosen) == min(replicas, len(able))
    assert all(by_id[i].alive and (by_id[i].open or i in holders) for i in chosen)
    keeping = [i for i in holders if by_id[i].alive]
    assert len([i for i in chosen if i in holders]) == min(replicas, len(keeping))
    assert chosen == meant(wish, MODEL, WishNodes(list(reversed(fleet))), holders)  # the order of facts means nothing


@BOUNDED
@given(fleet=fleets(), replicas=st.integers(1, 6), extra=fleets())
def test_what_was_chosen_stays_while_it_can(fleet: list[WishNode], replicas: int, extra: list[WishNode]) -> None:
    wish = Wish(MODEL.id, "replicas", replicas)
    first = meant(wish, MODEL, WishNodes(fleet), {})
    again = meant(wish, MODEL, WishNodes(fleet), held(*first, done=3), frozenset(first))
    assert again == first
    more = [*fleet, *(replace(x, id=f"m{x.id}", room_bytes=10**9) for x in extra)]
    grown = meant(wish, MODEL, WishNodes(more), {}, frozenset(first))
    assert set(first) <= set(grown)
    roomier = [replace(x, room_bytes=x.room_bytes + 5000) for x in fleet]
    assert set(meant(wish, MODEL, WishNodes(roomier), held(*first, done=0), frozenset(first))) == set(first)
    if first:
        gone = [replace(x, alive=False) if x.id == first[0] else x for x in fleet]
        after = meant(wish, MODEL, WishNodes(gone), held(*first[1:], done=3), frozenset(first))
        assert set(first[1:]) <= set(after)
        assert first[0] not in after


def test_new_replicas_are_spread_over_domains_and_avoid_full_disks() -> None:
    fleet = [WishNode(f"n{i}", "p", "xyz"[i % 3], room_bytes=1000 if i < 9 else 10) for i in range(12)]
    chosen = meant(Wish(MODEL.id, "replicas", 6), MODEL, WishNodes(fleet), {})
    domains = [next(x.domain for x in fleet if x.id == i) for i in chosen]
    assert sorted(domains) == ["x", "x", "y", "y", "z", "z"]
    assert not {"n9", "n10", "n11"} & set(chosen)
    beside = meant(Wish(MODEL.id, "replicas", 3), MODEL, WishNodes(fleet), held("n0", "n3"))
    assert {"n0", "n3"} < set(beside)
    assert fleet[int(next(i for i in beside if i not in ("n0", "n3"))[1:])].domain != "x"
    unsettled = WishNodes(fleet, settled=False)
    assert meant(Wish(MODEL.id, "replicas", 3), MODEL, unsettled, held("n0")) == ("n0",)


@BOUNDED
@given(fleet=fleets())
def test_pools_and_nodes_mean_exactly_themselves(fleet: list[WishNode]) -> None:
    nodes = WishNodes(fleet)
    assert set(meant(Wish(MODEL.id, "pool/p"), MODEL, nodes, {})) == {x.id for x in fleet if x.pool == "p" and x.alive}
    assert set(meant(Wish(MODEL.id, "node/n0"), MODEL, nodes, {})) == {x.id for x in fleet if x.id == "n0" and x.alive}
    for state in (ModelState.REFUSED, ModelState.REVOKED):
        assert meant(Wish(MODEL.id, "pool/p"), replace(MODEL, state=state), nodes, {}) == ()


def test_wishes_end_and_merge_to_the_stronger() -> None:
    wishes = [
        Wish("t/m", "pool/p", expires_at_s=5.0),
        Wish("t/m", "node/n", expires_at_s=50.0),
        Wish("t/m", "replicas"),
    ]
    assert [x.target for x in wanted_of(wishes, MODEL, 10.0)] == ["node/n", "replicas"]
    assert wanted_of(wishes, replace(MODEL, state=ModelState.REVOKED), 10.0) == []
    one, two = Wanted("t/m", "a", "disk", 5.0), Wanted("t/m", "a", "memory", 9.0)
    assert merge(one, two) == Wanted("t/m", "a", "memory", 9.0)
    assert merge(one, replace(two, expires_at_s=0.0)).expires_at_s == 0.0


# --- predictions -----------------------------------------------------------------------------------------------------

rates = st.integers(0, 2000 * MB)
sizes = st.integers(0, 200_000 * MB)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    total = draw(sizes)
    peers = draw(st.lists(st.builds(PeerSupply, st.sampled_from(NODES), rates, st.just(total)), max_size=12))
    return Question(
        bytes_total=total,
        bytes_here=draw(st.integers(0, total)),
        attested=draw(st.booleans()),
        origin_answers=draw(st.booleans()),
        origin_bytes_s=draw(rates),
        peers=tuple(peers),
        arriving_bytes_s=draw(st.just(0) | rates),
        ahead_bytes=draw(st.just(0) | sizes),
        fed_bytes_s=draw(st.just(0) | rates),
        assumed_bytes_s=draw(st.just(0) | rates),
    )


@BOUNDED
@given(question=questions(), less=st.floats(0, 1))
def test_more_missing_bytes_are_never_ready_sooner(question: Question, less: float) -> None:
    more = replace(question, bytes_here=int(question.bytes_here * less))
    now, then = predict(question), predict(more)
    assert now.ready_in_ms >= -1
    assert now.because
    if now.ready_in_ms >= 0 and then.ready_in_ms >= 0:
        assert then.ready_in_ms >= now.ready_in_ms
    if question.bytes_here < question.bytes_total:  # what can be said depends on sources, not on how much is missing
        assert (now.ready_in_ms < 0) == (then.ready_in_ms < 0)


@BOUNDED
@given(question=questions())
def test_ready_is_zero_and_what_is_not_known_is_said(question: Question) -> None:
    assert predict(replace(question, ready=True)).ready_in_ms == 0
    blank = replace(
        question, bytes_here=0, bytes_total=max(1, question.bytes_total), peers=(), origin_bytes_s=0,
        arriving_bytes_s=0, assumed_bytes_s=0,
    )  # fmt: skip
    answer = predict(replace(blank, origin_answers=True))
    assert (answer.ready_in_ms, answer.because) == (-1, NOT_MEASURED)
    answer = predict(replace(blank, origin_answers=False))
    assert (answer.ready_in_ms, answer.because) == (-1, NO_ROUTE)
    assert predict(replace(blank, origin_answers=True, assumed_bytes_s=MB)).because.startswith("assumed 1.0 MB/s")


@BOUNDED
@given(question=questions(), rate=st.integers(1, 2000 * MB))
def test_another_source_never_makes_it_later(question: Question, rate: int) -> None:
    more = replace(question, peers=(*question.peers, PeerSupply("n9", rate, question.bytes_total)))
    now, then = predict(question), predict(more)
    if now.ready_in_ms >= 0 and not question.assumed_bytes_s:
        assert 0 <= then.ready_in_ms <= now.ready_in_ms


def test_predictions_name_what_they_rest_on() -> None:
    base = Question(bytes_total=1000 * MB, origin_bytes_s=100 * MB)
    assert predict(base) == predict(replace(base, peers=()))
    assert (predict(base).ready_in_ms, predict(base).because) == (10_000, "origin 100 MB/s")
    both = predict(replace(base, peers=(PeerSupply("n1", 400 * MB, 1000 * MB),), origin_measured="its pool"))
    assert (both.ready_in_ms, both.because) == (2000, "origin 100 MB/s (measured by its pool), 1 peer 400 MB/s")
    capped = predict(
        replace(base, peers=(PeerSupply("n1", 400 * MB, 1), PeerSupply("n2", 400 * MB, 1)), fed_bytes_s=500 * MB)
    )
    assert capped.ready_in_ms == 2000
    assert capped.because.endswith("at most 500 MB/s here")
    queue = predict(replace(base, ahead_bytes=1000 * MB, waits_for="2 others are fetched first"))
    assert queue.ready_in_ms == 20_000
    assert "1.0 GB beside it" in queue.because
    assert queue.because.endswith("2 others are fetched first")
    memory = predict(replace(base, ready=True, memory=True, bytes_here=1000 * MB, disk_bytes_s=500 * MB))
    assert memory.ready_in_ms == 2000


# --- paths -----------------------------------------------------------------------------------------------------------


def test_addresses_are_shared_where_pools_share_a_network() -> None:
    ends = (Endpoint("lan", "10.0.0.1", 1), Endpoint("wan", "1.2.3.4", 1), Endpoint("", "host", 1))
    lan, wan, none = Pool("a", networks=("lan",)), Pool("b", networks=("wan",)), Pool("c")
    assert shared_endpoints(lan, wan, ends) == (ends[2],)
    assert shared_endpoints(lan, Pool("d", networks=("wan", "lan")), ends) == (ends[0], ends[2])
    for one, other in ((lan, none), (none, lan), (lan, lan), (None, lan)):
        assert shared_endpoints(one, other, ends) == ends
    trusted = Pool("a", trusted_network=True)
    assert not needs_tls(trusted, trusted)
    for one, other in ((trusted, Pool("b", trusted_network=True)), (lan, lan), (None, trusted)):
        assert needs_tls(one, other)
