"""Which piece is asked of which peer. Pure.

In this order: what a reader waits for, of whoever brings it first; requests that are stuck go elsewhere; what is told
to come first (a recorded start of an image), and little else while something starts (core/starting.py); then the rarest
pieces among what the peers hold, each of the peer that should be done first; last, where nothing is left to ask, pieces
that wait behind a slow peer's queue move to a fast one.

A piece crosses into a region once: of another region asks only the region's importer of that piece, by rendezvous over
the region's seeds; who is next in rank asks once the piece was to be had out there, and not here, for some time.
"""

from __future__ import annotations

from collections.abc import Iterable

from fal_fsd.core.bits import bits_of, each, first_from, hash_of, mix
from fal_fsd.core.messages import Action, Ask, Withdraw
from fal_fsd.core.policy import Pieces, Policy
from fal_fsd.core.sharing import Shares
from fal_fsd.core.sources import NEAR, Source, Sources

RANKS: int = 4
_URGENT_MAX = 32  # looked at by one decision
_MOVES_MAX = 4
_FAR_FACTOR = 1.5  # a far peer counts as so much slower, more with its egress price
_GIB_PRICE = 100_000  # millionths: at this price of a GiB twice as slow


class Imports:
    """What this node may ask of other regions."""

    def __init__(self, me: str, pieces: Pieces, shares: Shares, policy: Policy) -> None:
        self._me = me
        self._pieces = pieces
        self._shares = shares
        self._policy = policy
        self._ranks = [pieces.every] + [0] * (RANKS - 1)
        self._aged = [0] * RANKS
        self._aged_s: float | None = None

    def set_nodes(self, seeds: Iterable[str], others: Iterable[str], *, seed: bool, whole: bool) -> None:
        """The seeds of this region, its other connected nodes; each with or without this node.

        `whole`: that is all of the region. In a large one most nodes are linked to no seed: that a node sees none does
        not mean that there is none, so it is the last to bring something in.
        """
        seeds = sorted({*seeds, self._me} if seed else set(seeds))
        if seed:
            self._ranks = self._shares.ranked(seeds, RANKS)[self._me]
            return
        first = mix(hash_of(self._me))
        rank = min(len(seeds) + sum(mix(hash_of(x)) < first for x in others), RANKS - 1) if whole else RANKS - 1
        self._ranks = [self._pieces.every if number == rank else 0 for number in range(RANKS)]

    def allowed(self, outside: int, now_s: float) -> int:
        """Pieces that this node may bring in; `outside`: missing ones that only other regions hold."""
        if not self._policy.importers:
            return self._pieces.every
        if self._aged_s is None or not outside:
            self._aged, self._aged_s = [outside] * 1 + [0] * (RANKS - 1), now_s
        elif now_s - self._aged_s >= self._policy.import_patience_s:
            self._aged, self._aged_s = [outside, *(aged & outside for aged in self._aged[:-1])], now_s
        made = self._ranks[0]
        for rank in range(1, RANKS):
            made |= self._ranks[rank] & self._aged[rank]
        return made


class Sole:
    """What only a slow uplink has leaves it once: only the first by hash, among those that lack it, asks for it.

    Where it stays the only holder, the second may ask after `slow_patience_s`, four after two of them, all after three.
    """

    def __init__(self, me: str, sources: Sources, policy: Policy) -> None:
        self._me = hash_of(me)
        self._sources = sources
        self._policy = policy
        self._aged = (0, 0, 0, 0)  # held by one peer at the last look, and at those before, too
        self._look_s = float("-inf")
        self._ranks: dict[int, int] = {}  # of this node among those that lack a piece, as of `_ranks_s`
        self._ranks_s = float("-inf")

    def slow(self, source: Source, typical: float) -> bool:
        """Whether its pieces are shared out."""
        return not source.pushes and 0 < source.rate * self._policy.slow_factor < typical

    def ripe(self, source: Source, bits: int, now_s: float) -> tuple[int, int]:
        """Of `bits` those for which this node may ask a slow `source`, and those that nobody else brings."""
        once = self._sources.everywhere.held & ~self._sources.everywhere.at_least(1)
        if now_s >= self._look_s:
            aged = self._aged
            self._aged = (once, aged[0] & once, aged[1] & once, aged[2] & once)
            self._look_s = now_s + self._policy.slow_patience_s
        if now_s >= self._ranks_s + self._policy.tick_s:
            self._ranks, self._ranks_s = {}, now_s
        held, own = bits & once, 0
        for piece in each(held):
            rank = self._rank(piece)
            looks = sum(aged >> piece & 1 for aged in self._aged[1:])
            if rank == 0 or looks >= 3 or rank < 2 * looks:
                own |= 1 << piece
        return bits & ~held | own, own

    def _rank(self, piece: int) -> int:
        if (known := self._ranks.get(piece)) is not None:
            return known
        mine = mix(self._me, piece)
        rank = sum(mix(x.hash, piece) < mine for x in self._sources if not x.bits >> piece & 1)
        self._ranks[piece] = rank
        return rank


class Asking:
    """Decisions about peers. `decide` may be called as often as one likes: what is asked is not asked again."""

    def __init__(self, pieces: Pieces, sources: Sources, imports: Imports, policy: Policy) -> None:
        self._pieces = pieces
        self._sources = sources
        self._imports = imports
        self._policy = policy
        self._sole = Sole(sources.me.node_id, sources, policy)
        self._me = hash_of(sources.me.node_id)
        self._turn = 0
        self._look_s = float("-inf")
        self._full_s = float("-inf")

    def decide(self, reading: int, now_s: float, let: int) -> list[Action]:
        """What to ask and to withdraw; `reading`: pieces that come from the origin, `let`: those that may come now
        though no reader waits for them."""
        sources = self._sources
        outside = self._pieces.missing & sources.everywhere.held & ~sources.inside.held
        allowed = self._imports.allowed(outside, now_s)
        made: list[Action] = []
        typical = sources.rate_typical
        if now_s >= self._look_s:
            self._look_s = now_s + self._policy.stuck_min_s / 8
            self._unstick(made, now_s, typical)
        if self._pieces.wanted:
            self._for_readers(made, reading, allowed, now_s, typical)
        asks: dict[tuple[str, bool], list[int]] = {}
        left = self._rarest(asks, reading | ~let, allowed, now_s, typical)
        # A region waits for each piece that is brought into it: those go first.
        made.extend(Ask(node_id, tuple(pieces), urgent=far) for (node_id, far), pieces in asks.items())
        if not left and sources.asked:
            self._rebalance(made, allowed, now_s, typical)
        return made

    # ---- rarest first

    def _rarest(
        self, asks: dict[tuple[str, bool], list[int]], without: int, allowed: int, now_s: float, typical: float
    ) -> bool:
        """Ask until all windows are full; False when nothing is left that could be asked."""
        sources, policy = self._sources, self._policy
        need = self._pieces.missing & ~sources.asked & ~without
        size = sources.length_max
        limit = max(policy.total_pieces * size, policy.total_bytes_min, int(policy.total_s * sources.rate_total))
        candidates: list[tuple[float, int, Source]] = []
        offers: dict[str, int] = {}
        if sources.bytes_asked >= limit and now_s < self._full_s:
            return True
        self._full_s = now_s + policy.full_look_s
        any_left = False
        for source in sources:
            bits = source.bits & need if source.distance <= NEAR else source.bits & need & allowed
            if bits:
                any_left = True
                if source.blocked_until_s <= now_s and source.bytes_asked < self._window(source):
                    if source.distance <= NEAR and self._sole.slow(source, typical):
                        bits, own = self._sole.ripe(source, bits, now_s)
                        if own and not source.queue:
                            # The others wait for this node to pass it on: it comes beside all else.
                            need &= ~self._ask(asks, source, own, now_s)
                    offers[source.node_id] = bits
                    candidates.append((self._eta_s(source, size, typical), source.hash, source))
        while candidates and sources.bytes_asked < limit:
            best = min(candidates)
            source = best[2]
            bits = offers[source.node_id] & need
            if bits:
                need &= ~self._ask(asks, source, bits, now_s)
            candidates.remove(best)
            if bits and source.bytes_asked < self._window(source):
                candidates.append((self._eta_s(source, size, typical), source.hash, source))
        return any_left

    def _ask(self, asks: dict[tuple[str, bool], list[int]], source: Source, bits: int, now_s: float) -> int:
        """Ask for the rarest of `bits`, of those that come first if there are any; as a set."""
        bits = self._pieces.preferred(bits)
        counter = self._sources.inside if source.distance <= NEAR else self._sources.everywhere
        self._turn += 1
        piece = first_from(counter.least(bits), mix(self._me, self._turn) % self._pieces.count)
        self._sources.ask(source, piece, now_s)
        asks.setdefault((source.node_id, source.distance > NEAR), []).append(piece)
        return 1 << piece

    def _window(self, source: Source) -> int:
        policy = self._policy
        meant = min(max(int(policy.window_s * source.rate), policy.window_bytes_min), policy.window_bytes_max)
        return max(meant, policy.window_pieces * self._sources.length_max)

    def _eta_s(self, source: Source, length: int, typical: float) -> float:
        """When a piece asked now should be here; far peers are made to look slower."""
        seconds = (source.bytes_asked + length) / (source.rate or typical)
        if source.distance > NEAR:
            seconds *= _FAR_FACTOR + source.place.egress_price / _GIB_PRICE
        return seconds

    # ---- readers

    def _for_readers(self, made: list[Action], reading: int, allowed: int, now_s: float, typical: float) -> None:
        sources, pieces = self._sources, self._pieces
        urgent = bits_of(pieces.wanted) & pieces.missing & ~reading & sources.everywhere.held
        for count, piece in enumerate(each(urgent)):
            if count >= _URGENT_MAX:
                return
            late = now_s - pieces.waits_since_s.get(piece, now_s) >= self._policy.reader_far_s
            holders = [
                source
                for source in sources.holders(piece)
                if source.blocked_until_s <= now_s and (source.distance <= NEAR or late or allowed >> piece & 1)
            ]
            if not holders:
                continue
            length = pieces.lengths[piece]
            best = min(holders, key=lambda x: (self._urgent_s(x, length, now_s, typical), x.hash))
            old = sources.asked_of(piece)
            if old is not None:
                if old.urgent >> piece & 1 or next(iter(old.queue)) == piece:
                    continue  # it is on its way
                if self._urgent_s(best, length, now_s, typical) >= self._left_s(old, piece, now_s, typical):
                    continue
                sources.unask(old, piece)
                made.append(Withdraw(old.node_id, (piece,)))
            sources.ask(best, piece, now_s, urgent=True)
            made.append(Ask(best.node_id, (piece,), urgent=True))

    def _urgent_s(self, source: Source, length: int, now_s: float, typical: float) -> float:
        """After what is being sent, and other urgent ones."""
        rate = source.rate or typical
        before = source.urgent.bit_count() + (1 if source.queue else 0)
        return (before * self._sources.length_max + length) / rate

    # ---- slow peers

    def _left_s(self, source: Source, piece: int, now_s: float, typical: float) -> float:
        """When an asked piece should be here."""
        before = 0
        for other in source.queue:
            before += self._pieces.lengths[other]
            if other == piece:
                break
        return max(before / (source.rate or typical) - source.busy_s(now_s), 0.0)

    def _unstick(self, made: list[Action], now_s: float, typical: float) -> None:
        """A peer from which nothing comes keeps what only it has; all else is asked elsewhere."""
        policy, sources = self._policy, self._sources
        for source in sources:
            if not source.queue:
                continue
            busy_s = source.busy_s(now_s)
            expected_s = sources.length_max / (source.rate or typical)
            if busy_s < max(policy.stuck_min_s, policy.stuck_factor * expected_s):
                continue
            gone = [piece for piece in source.queue if self._elsewhere(source, piece, now_s)]
            if gone:
                for piece in gone:
                    sources.unask(source, piece)
                sources.stalled(source, busy_s)
                source.last_s = now_s
                source.blocked_until_s = now_s + min(busy_s, policy.penalty_max_s)
                made.append(Withdraw(source.node_id, tuple(gone)))

    def _elsewhere(self, source: Source, piece: int, now_s: float) -> bool:
        return any(
            other is not source
            and other.blocked_until_s <= now_s
            and (other.distance <= NEAR or source.distance > NEAR)
            and (not other.queue or other.busy_s(now_s) < self._policy.stuck_min_s)
            for other in self._sources.holders(piece)
        )

    def _rebalance(self, made: list[Action], allowed: int, now_s: float, typical: float) -> None:
        """Nothing is left to ask: what waits longest moves to who would be clearly faster."""
        sources = self._sources
        last: list[tuple[float, int, int, Source]] = []
        for source in sources:
            if source.queue:
                piece = next(reversed(source.queue))
                last.append((-self._left_s(source, piece, now_s, typical), source.hash, piece, source))
        for left_s, _, piece, source in sorted(last)[:_MOVES_MAX]:
            length = self._pieces.lengths[piece]
            factor = 1.5 if len(source.queue) > 1 else 3.0  # the first one is on its way: what came of it is lost
            holders = [
                other
                for other in sources.holders(piece)
                if other is not source
                and other.blocked_until_s <= now_s
                and (other.distance <= NEAR or allowed >> piece & 1)
            ]
            if not holders:
                continue
            best = min(holders, key=lambda x: (self._eta_s(x, length, typical), x.hash))
            if self._eta_s(best, length, typical) * factor + 0.1 < -left_s:
                sources.unask(source, piece)
                sources.ask(best, piece, now_s)
                made.append(Withdraw(source.node_id, (piece,)))
                made.append(Ask(best.node_id, (piece,)))


__all__ = ["RANKS", "Asking", "Imports", "Sole"]
