"""One Swarm against a machine that does whatever peers, readers, the origin and the scheduler may do.

Whatever comes in any order: it asks only for what is missing, asked nowhere else and held by a connected peer that is
not dropped; it withdraws only what it asked; leases that it reads hold missing pieces only; deciding twice is deciding
once; and when the world is kind again, it completes.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import (
    ORIGIN,
    Ask,
    DropPeer,
    Lease,
    Member,
    Place,
    ReadOrigin,
    StopOrigin,
    Tell,
    Withdraw,
)
from fal_fsd.core.swarm import Swarm

COUNT = 24
ME = Place("me", "p", "eu", "a")
PLACES = [
    Place("a", "p", "eu", "a"),
    Place("b", "p", "eu", "b"),
    Place("c", "q", "us", "a", egress_price=90_000),
    Place("d", "q", "us", "b"),
    Place("e"),
]
PEERS = st.sampled_from([place.node_id for place in PLACES])
PIECES = st.integers(0, COUNT - 1)


class SwarmMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.have: set[int] = set()
        self.peers: dict[str, set[int]] = {}
        self.asked: dict[int, str] = {}
        self.reads: dict[Lease, set[int]] = {}
        self.dropped: set[str] = set()

    @initialize(have=st.sets(PIECES, max_size=4), seed=st.booleans())
    def begin(self, have: set[int], seed: bool) -> None:
        self.have = set(have)
        self.swarm = Swarm(ME, [4 << 20] * (COUNT - 1) + [100], Bitmap(COUNT, have))
        if seed:
            self.swarm.set_members((), seed=True, region_members=1)

    # ---- what it says

    def decide(self) -> None:
        for action in self.swarm.decide(self.now_s):
            self.apply(action)
        for action in self.swarm.decide(self.now_s):
            raise AssertionError(f"decided twice: {action}")

    def apply(self, action: object) -> None:
        match action:
            case Ask(node_id, pieces, _):
                for piece in pieces:
                    assert piece in self.peers[node_id]
                    assert piece not in self.have
                    assert piece not in self.asked
                    assert not any(piece in left for left in self.reads.values())
                    self.asked[piece] = node_id
            case Withdraw(node_id, pieces):
                for piece in pieces:
                    assert self.asked.pop(piece) == node_id
            case ReadOrigin(lease, pieces):
                assert set(pieces) <= set(lease.pieces)
                assert not set(pieces) & self.have
                assert not set(pieces) & self.asked.keys()
                assert not any(set(pieces) & left for left in self.reads.values())
                assert not any(piece in held for piece in pieces for held in self.peers.values())
                self.reads[lease] = set(pieces)
            case StopOrigin(lease):
                self.reads.pop(lease, None)
            case DropPeer(node_id, _):
                self.dropped.add(node_id)
                self.down(node_id)
            case Tell(lease, ended):
                assert lease.count > 0
                assert ended or lease.holder != "me" or lease in self.reads or not self.swarm.waits_for

    def down(self, node_id: str) -> None:
        if self.peers.pop(node_id, None) is not None:
            self.swarm.peer_down(node_id, self.now_s)
        self.asked = {piece: of for piece, of in self.asked.items() if of != node_id}

    def arrived(self, piece: int, source: str) -> None:
        """In the order of the real thing: told first, then whatever it decides."""
        if piece not in self.have:
            self.have.add(piece)
            for left in self.reads.values():
                left.discard(piece)
            if self.asked.get(piece) == source:
                del self.asked[piece]
            self.swarm.arrived(piece, source, 0.1, self.now_s)
        self.decide()

    # ---- what happens

    @rule(seconds=st.floats(0.01, 40.0))
    def time_goes_by(self, seconds: float) -> None:
        self.now_s += seconds
        self.decide()

    @rule(told=st.sets(st.sampled_from(PLACES)), seeds=st.sets(PEERS), seed=st.booleans())
    def scheduler_tells(self, told: set[Place], seeds: set[str], seed: bool) -> None:
        members = [Member(x, seed=x.node_id in seeds) for x in sorted(told, key=lambda x: x.node_id)]
        self.swarm.set_members(members, seed=seed, region_members=len(members) + 1)
        self.decide()

    @rule(node_id=PEERS, have=st.sets(PIECES))
    def peer_comes(self, node_id: str, have: set[int]) -> None:
        self.asked = {piece: of for piece, of in self.asked.items() if of != node_id}
        self.peers[node_id] = set(have)
        self.swarm.peer_up(node_id, Bitmap(COUNT, have), self.now_s)
        self.decide()

    @rule(node_id=PEERS)
    def peer_goes(self, node_id: str) -> None:
        self.down(node_id)
        self.decide()

    @rule(node_id=PEERS, pieces=st.lists(PIECES, max_size=6))
    def peer_gets(self, node_id: str, pieces: list[int]) -> None:
        if node_id in self.peers:
            self.peers[node_id].update(pieces)
        self.swarm.peer_has(node_id, pieces)
        self.decide()

    @rule(
        first=st.integers(-2, COUNT),
        count=st.integers(-1, 8),
        epoch=st.integers(0, 4),
        by=PEERS,
        of=PEERS,
        ended=st.booleans(),
    )
    def lease_is_told(self, first: int, count: int, epoch: int, by: str, of: str, ended: bool) -> None:
        self.swarm.lease_told(by, Lease(first, count, epoch, of), ended, self.now_s)
        self.decide()

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def piece_comes(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(sorted(self.asked)))
        self.arrived(piece, self.asked[piece])

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def piece_is_bad(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(sorted(self.asked)))
        self.swarm.bad(piece, self.asked.pop(piece), self.now_s)
        self.decide()

    @rule(data=st.data(), retry_s=st.sampled_from([0.0, 0.5]))
    @precondition(lambda self: self.asked)
    def piece_is_refused(self, data: st.DataObject, retry_s: float) -> None:
        piece = data.draw(st.sampled_from(sorted(self.asked)))
        node_id = self.asked.pop(piece)
        if not retry_s:
            self.peers[node_id].discard(piece)
        self.swarm.refused(node_id, (piece,), retry_s, self.now_s)
        self.decide()

    @rule(piece=PIECES, source=PEERS)
    def withdrawn_piece_comes_all_the_same(self, piece: int, source: str) -> None:
        self.arrived(piece, source)

    @rule(data=st.data())
    @precondition(lambda self: any(self.reads.values()))
    def origin_gives(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([x for x, left in self.reads.items() if left]))
        self.arrived(min(self.reads[lease]), ORIGIN)

    @rule(data=st.data(), retry_s=st.sampled_from([None, 0.0, 5.0]))
    @precondition(lambda self: self.reads)
    def origin_read_ends(self, data: st.DataObject, retry_s: float | None) -> None:
        lease = data.draw(st.sampled_from(sorted(self.reads, key=str)))
        if self.reads.pop(lease) and retry_s is None:
            self.swarm.bad(lease.first, ORIGIN, self.now_s)
        if retry_s is None:
            self.swarm.origin_done(lease, self.now_s)
        else:
            self.swarm.origin_failed(lease, retry_s, self.now_s)
        self.decide()

    @rule(available=st.booleans())
    def origin_comes_and_goes(self, available: bool) -> None:
        self.swarm.origin_available(available)
        self.decide()

    @rule(pieces=st.lists(PIECES, max_size=4, unique=True), waiting=st.booleans())
    def reader_wants(self, pieces: list[int], waiting: bool) -> None:
        self.swarm.wanted(pieces, waiting)
        self.decide()

    @rule(data=st.data())
    @precondition(lambda self: self.have)
    def piece_is_lost(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(sorted(self.have)))
        self.have.discard(piece)
        self.swarm.lost(piece)
        self.decide()

    @invariant()
    def it_knows_what_is_missing(self) -> None:
        if hasattr(self, "swarm"):
            assert self.swarm.missing == COUNT - len(self.have)
            assert self.swarm.complete == (len(self.have) == COUNT)
            assert (self.swarm.next_at_s is None) or self.swarm.next_at_s > self.now_s or self.swarm.complete

    def teardown(self) -> None:
        """The world is kind: a good peer has all, and answers everything. Then it completes."""
        if not hasattr(self, "swarm"):
            return
        for node_id in list(self.peers):
            self.down(node_id)
        for lease in list(self.reads):
            del self.reads[lease]
            self.swarm.origin_done(lease, self.now_s)
        self.swarm.set_members([Member(Place("good", region="us"))], seed=False, region_members=1)
        self.peers["good"] = set(range(COUNT))
        self.swarm.peer_up("good", Bitmap.full(COUNT), self.now_s)
        for _ in range(4000):
            if self.swarm.complete:
                break
            self.now_s += 0.1
            self.decide()
            for piece, source in list(self.asked.items()):
                self.arrived(piece, source)
            for lease in list(self.reads):
                for piece in sorted(self.reads[lease]):
                    self.arrived(piece, ORIGIN)
        assert self.swarm.complete, (sorted(set(range(COUNT)) - self.have), self.swarm.waits_for)
        self.decide()
        assert not self.asked
        assert self.swarm.waits_for == ""
        assert self.swarm.next_at_s is None


SwarmMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSwarm = SwarmMachine.TestCase
