"""What one node does about one artifact's swarm. Pure.

    swarm.peer_up(…); swarm.arrived(…); …        # tell it what happened
    for action in swarm.decide(now_s): …         # after any event, and at next_at_s: do what it says

Deterministic: time is passed in, ties are broken by hashes of node id and piece. `decide` is idempotent; a piece is
asked of one peer at a time, and withdrawn there before it is asked elsewhere. Peers: core/asking.py; the origin:
core/reading.py; while something starts from what arrives: core/starting.py.

The bound (F bytes, N nodes, pieces of c bytes, rates B):
T* = max(F / B_origin, F / B_node) + ceil(log2 N) · c / B_node.
Reached in simulation (tests/sim/test_swarm.py), wall ÷ max(F / B_origin, F / B_node), 8 nodes, 480 pieces: 1.05 with
equal links, 1.06 with one uplink at a quarter, 1.05 with a lease holder killed; origin bytes ÷ F 1.000, 1.001 with the
kill. What is above 1 is a lag: pieces between the origin and the last node, about 20 with 8 nodes; it weighs less the
more pieces there are. 1,000 nodes in 4 regions, 715 pieces (`ops/bench fsd-swarm-sim`): 2.05, each piece entering a
region 1.02 times; four seeds a region pass everything on to 250 nodes, most of which are linked to none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from fal_contract.pieces import Bitmap
from fal_fsd.core.asking import Asking, Imports
from fal_fsd.core.bits import bits_of
from fal_fsd.core.messages import ORIGIN, Action, DropPeer, Lease, Member, Place, StopOrigin, Withdraw
from fal_fsd.core.policy import Pieces, Policy
from fal_fsd.core.reading import BAD_MAX, Reading
from fal_fsd.core.sharing import Shares
from fal_fsd.core.sources import NEAR, Sources
from fal_fsd.core.starting import Starting

_STRIPES_MIN = 64
_DEFAULT = Policy()


def _bits(have: Bitmap) -> int:
    return int.from_bytes(bytes(have), "little")


class Swarm:
    """See the module's docstring. `lengths`: bytes of each piece; `have`: those that are here.

    Without the scheduler's word (`set_members`) the node is no seed: it promotes itself after
    `Policy.promote_quiet_s`. A node that has no scheduler says `set_members((), seed=True, region_members=1)`.
    """

    def __init__(self, me: Place, lengths: Sequence[int], have: Bitmap, *, policy: Policy = _DEFAULT) -> None:
        self.me = me
        self._policy = policy
        self._pieces = Pieces(tuple(lengths), ((1 << len(lengths)) - 1) & ~_bits(have))
        self._sources = Sources(me, self._pieces.lengths)
        shares = Shares(len(lengths), _stripe_pieces(self._pieces.lengths, policy))
        self._imports = Imports(me.node_id, self._pieces, shares, policy)
        self._asking = Asking(self._pieces, self._sources, self._imports, policy)
        self._reading = Reading(me.node_id, self._pieces, self._sources, shares, policy)
        self._starting = Starting(me.node_id, self._pieces, policy)
        self._pending: list[Action] = []
        self._banned: dict[str, float] = {}
        self._told_s: dict[str, float | None] = {}  # members: since when; None: not before the next decision
        self._nodes: tuple[object, ...] | None = None
        self._region_members = 1
        self._progress = False  # a peer told of pieces that are missing here
        self._dirty = True  # something happened that a decision could depend on
        self._grace_s = float("-inf")
        self._next_s: float | None = None
        self._now_s = 0.0

    # ---- what happened

    def set_members(self, members: Sequence[Member], *, seed: bool, region_members: int) -> None:
        """The scheduler's word: the neighbours, and whether this node is a seed. Stale words do no harm."""
        self._dirty = True
        self._region_members, self._sources.changed = region_members, True
        others = {x.node_id: (x.place, x.seed) for x in members if x.node_id != self.me.node_id}
        self._sources.set_places(others)
        self._told_s = {node_id: self._told_s.get(node_id) for node_id in others}
        if self._reading.seed and not seed:
            self._reading.stop()
        self._reading.seed = seed

    def peer_up(self, node_id: str, have: Bitmap, now_s: float) -> None:
        """Connected, and it holds these. A peer that sent bad bytes is dropped again."""
        self._dirty = True
        if node_id == self.me.node_id:
            return
        if self._banned.get(node_id, now_s) > now_s:
            self._pending.append(DropPeer(node_id, "it sent bad bytes a short while ago"))
            return
        self._gone(node_id)
        source = self._sources.up(node_id, _bits(have))
        if source.bits & self._pieces.missing:
            self._reading.moved(now_s)
        self._reading.tell_again()

    def peer_down(self, node_id: str, now_s: float) -> None:
        """Gone, with what was asked of it and its leases."""
        del now_s
        self._gone(node_id)
        self._reading.leases.holder_gone(node_id)

    def peer_has(self, node_id: str, pieces: Sequence[int]) -> None:
        """A connected peer holds these, too."""
        source = self._sources.get(node_id)
        if source is not None:
            new = self._sources.has(source, bits_of(p for p in pieces if 0 <= p < self._pieces.count))
            if new & self._pieces.missing:
                self._progress = True
            self._dirty = self._dirty or bool(new & (self._pieces.missing | self._pieces.from_origin))

    def lease_told(self, node_id: str, lease: Lease, ended: bool, now_s: float) -> None:
        """A peer told of its own lease, or passed another's on."""
        self._dirty = True
        if node_id in self._sources:
            self._reading.lease_told(lease, ended, now_s)

    def arrived(self, piece: int, source: str, seconds: float, now_s: float) -> None:
        """Checked and stored; `source`: a node id or ORIGIN, `seconds` since it was asked for."""
        self._dirty = True
        if not self._pieces.missing >> piece & 1:
            return
        self._pieces.missing &= ~(1 << piece)
        self._pieces.waits_since_s.pop(piece, None)
        peer = self._sources.get(source)
        old = self._sources.asked_of(piece)
        if peer is not None:
            self._sources.arrived(peer, piece, seconds, now_s)
        if old is not None and old is not peer:
            self._sources.unask(old, piece)
            self._pending.append(Withdraw(old.node_id, (piece,)))
        self._reading.arrived(piece, source == ORIGIN, now_s)
        self._reading.moved(now_s)

    def bad(self, piece: int, source: str, now_s: float) -> None:
        """Wrong bytes. A peer is dropped for `banned_s`; the origin gets a second chance, see `refused_pieces`."""
        self._dirty = True
        if source == ORIGIN:
            self._reading.came_wrong(piece, now_s)
            return
        self._gone(source)
        self._reading.leases.holder_gone(source)
        if self._banned.get(source, now_s) > now_s:
            return  # more of what was on its way when it was dropped
        self._banned[source] = now_s + self._policy.banned_s
        self._pending.append(DropPeer(source, f"it sent piece {piece} with wrong bytes"))

    def refused(self, node_id: str, pieces: Sequence[int], retry_s: float, now_s: float) -> None:
        """It is busy for `retry_s`; or, with 0, has these not."""
        self._dirty = True
        source = self._sources.get(node_id)
        if source is None:
            return
        for piece in pieces:
            self._sources.unask(source, piece)
        if retry_s > 0.0:
            source.blocked_until_s = max(source.blocked_until_s, now_s + max(retry_s, self._policy.refused_min_s))
        else:
            self._sources.has_not(source, bits_of(p for p in pieces if 0 <= p < self._pieces.count))

    def origin_done(self, lease: Lease, now_s: float) -> None:
        """The read under this lease ended."""
        self._dirty = True
        del now_s
        self._reading.done(lease)

    def origin_failed(self, lease: Lease, retry_s: float, now_s: float) -> None:
        """It ended early; the origin is left alone for `retry_s`."""
        self._dirty = True
        self._reading.failed(lease, retry_s, now_s)

    def origin_available(self, available: bool) -> None:
        """Whether the origin can be read from here at all."""
        self._dirty = True
        self._reading.set_available(available)

    def wanted(self, pieces: Sequence[int], waiting: bool) -> None:
        """A reader waits for these; or does not any more."""
        self._dirty = True
        wanted = self._pieces.wanted
        if waiting:
            self._starting.wanted(pieces)
        for piece in pieces:
            if waiting:
                wanted[piece] = wanted.get(piece, 0) + 1
            elif wanted.get(piece, 0) > 1:
                wanted[piece] -= 1
            else:
                wanted.pop(piece, None)
                self._pieces.waits_since_s.pop(piece, None)

    def lost(self, piece: int) -> None:
        """It is missing again."""
        self._dirty = True
        self._pieces.lost(piece)

    def prefer(self, first: Sequence[int]) -> None:
        """These come before all others but what readers wait for, in about this order."""
        self._dirty = True
        self._pieces.prefer(first)

    def start_begins(self, now_s: float, bound_s: float) -> None:
        """Something starts from it: what that does not read comes later, at the latest after `bound_s`."""
        self._dirty = True
        self._starting.begin(now_s, bound_s)

    def start_ends(self) -> None:
        """It is up: bring all."""
        self._dirty = True
        self._starting.end()

    # ---- decisions

    def decide(self, now_s: float) -> list[Action]:
        """What to do now."""
        made, self._pending = self._pending, []
        pieces, self._now_s = self._pieces, now_s
        if not self._dirty and self._next_s is not None and now_s < self._next_s:
            return made
        self._dirty = False
        if self._progress:
            self._progress = False
            self._reading.moved(now_s)
        if not pieces.missing:
            self._next_s = None
            for held in list(self._reading.leases.mine.values()):
                self._reading.leases.give_up(held.lease)
                made.append(StopOrigin(held.lease))
            return made + self._reading.news()
        for piece in pieces.wanted:
            if pieces.missing >> piece & 1:
                pieces.waits_since_s.setdefault(piece, now_s)
        self._set_nodes(now_s)
        made += self._reading.news()
        let = self._starting.allowed(now_s)
        made += self._asking.decide(self._reading.leases.own(), now_s, let)
        made += self._reading.decide(now_s, let)
        tick_s = now_s + (self._policy.reader_tick_s if pieces.wanted else self._policy.tick_s)
        read_s = self._reading.next_at_s
        if read_s > now_s:
            tick_s = min(tick_s, read_s)
        if (more_s := self._starting.next_at_s) is not None and more_s > now_s:
            tick_s = min(tick_s, more_s)
        self._next_s = min([tick_s, *(x.blocked_until_s for x in self._sources if x.blocked_until_s > now_s)])
        return made

    @property
    def next_at_s(self) -> float | None:
        """When `decide` must be called though nothing happened; None before the first call and once complete."""
        return self._next_s

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return not self._pieces.missing

    @property
    def missing(self) -> int:
        """How many pieces are."""
        return self._pieces.missing.bit_count()

    @property
    def refused_pieces(self) -> tuple[int, ...]:
        """Pieces that came wrong from the origin twice: they are not read there again."""
        return tuple(piece for piece, times in self._reading.bad.items() if times >= BAD_MAX)

    @property
    def waits_for(self) -> str:
        """What holds it up, for people; empty while something is asked for or read."""
        missing, sources = self._pieces.missing, self._sources
        if not missing or sources.asked or self._reading.leases.mine:
            return ""
        if self._starting.under_way:
            return "what starts from it: all of it comes once that is up"
        if missing & sources.inside.held:
            return "its peers are busy or stuck"
        if missing & sources.everywhere.held:
            return f"another node of region {self.me.region!r} that brings it in"
        nobody = f"no peer has it ({len(sources)} connected)" if len(sources) else "no peer is connected"
        return f"{nobody} and {self._reading.why_not(self._now_s)}"

    def _gone(self, node_id: str) -> None:
        self._dirty = True
        self._sources.down(node_id)

    def _set_nodes(self, now_s: float) -> None:
        """Who counts as a seed and as a node of this region: connected, or told a moment ago."""
        sources, grace_s = self._sources, self._policy.connect_grace_s
        if not sources.changed and now_s < self._grace_s:
            return
        sources.changed, self._grace_s = False, now_s + grace_s
        for node_id, told_s in self._told_s.items():
            if told_s is None:
                self._told_s[node_id] = now_s
        live = {
            node_id
            for node_id, told_s in self._told_s.items()
            if node_id in sources or (told_s is not None and now_s - told_s < grace_s)
        }
        seeds = {node_id for node_id in live if sources.told[node_id][1]}
        near = {node_id for node_id in live if sources.told[node_id][0].region == self.me.region}
        near |= {source.node_id for source in sources if source.distance <= NEAR}
        own = frozenset([self.me.node_id] if self._reading.seed else [])
        nodes = (frozenset(seeds), frozenset(near), own, self._region_members)
        if nodes != self._nodes:
            self._nodes = nodes
            whole = self._region_members <= len(near) + 1
            self._imports.set_nodes(seeds & near, near - seeds, seed=self._reading.seed, whole=whole)
            self._reading.set_seeds(seeds | own)


def _stripe_pieces(lengths: Sequence[int], policy: Policy) -> int:
    """Pieces of a stripe: a few megabytes in one read, but enough stripes for all seeds."""
    size = max(lengths, default=1)
    return max(min(max(policy.stripe_bytes // max(size, 1), 4), len(lengths) // _STRIPES_MIN, 64), 1)


__all__ = ["Policy", "Swarm"]
