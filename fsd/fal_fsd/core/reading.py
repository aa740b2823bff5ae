"""Which pieces this node reads from the origin, and when it may. Pure.

Seeds (the scheduler names them) cut the origin into stripes; each begins with those that it owns by rendezvous and
then helps the seed with most left, each from a place of its own. A lease is told before its bytes are read; leases
shrink towards the end, so that no last one is long. A seed takes no more while it holds some pieces that few others
have yet: a slow uplink then reads little. What any connected peer has is never read.

A node without any seed (an island, the scheduler gone at the wrong moment) promotes itself when nothing came for some
time, by rank of hashes among its neighbours; it passes on leases that it hears, so that its island reads once.
"""

from __future__ import annotations

from collections.abc import Iterable

from fal_fsd.core.bits import bits_of, each, first_from, hash_of, lowest, mix, run_at, span
from fal_fsd.core.leases import Held, LeaseBook
from fal_fsd.core.messages import Action, Lease, ReadOrigin, StopOrigin, Tell
from fal_fsd.core.policy import Pieces, Policy
from fal_fsd.core.sharing import Shares
from fal_fsd.core.sources import Sources

BAD_MAX = 2  # times that one piece comes wrong from the origin
_BAD_AGAIN_S = 10.0  # another seed may try first
_STREAMS_MEANT = 8  # of all seeds together, at least
_FULL_AT = 1.25  # times the least seconds of a piece
_OVERFULL_AT = 1.75
_READER_STREAMS = 3  # beside the others, for what readers wait for
_ENDS_AT = 0.6  # of the time that a piece takes
_FADE = 0.7


class Reading:
    """Decisions about the origin."""

    def __init__(self, me: str, pieces: Pieces, sources: Sources, shares: Shares, policy: Policy) -> None:
        self._me = me
        self._pieces = pieces
        self._sources = sources
        self._shares = shares
        self._policy = policy
        self.leases = LeaseBook(me)
        self.available = True
        self.blocked_until_s = float("-inf")
        self.seed = False
        self.promoted = False
        self.bad: dict[int, int] = {}  # piece: how often it came wrong
        self._bad_until_s: dict[int, float] = {}
        self._seeds: tuple[str, ...] = ()
        self._owned: dict[str, int] | None = None
        self._seconds: float | None = None  # of one piece
        self._best = float("inf")  # the least that it was
        self._more = 1.0  # ranges at once
        self._begun_s: float | None = None
        self._scarce_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}  # by first piece of the lease: when the last of its pieces came
        self._quiet_s: float | None = None
        self._pending: list[Action] = []

    # ---- what happened

    def set_seeds(self, seeds: Iterable[str]) -> None:
        """All that count just now, with this node if it is one."""
        told = tuple(sorted(seeds))
        if told != self._seeds:
            self._seeds, self._owned = told, None

    def moved(self, now_s: float) -> None:
        """Something came, or somebody has more: no reason to promote itself."""
        self._quiet_s = now_s

    def lease_told(self, lease: Lease, ended: bool, now_s: float) -> None:
        """Another's lease; those of this node that it fences end."""
        if lease.first < 0 or not 0 < lease.count <= self._pieces.count - lease.first:
            return
        news, fenced, fences = self.leases.told(lease, ended, now_s)
        self._pending.extend(Tell(mine) for mine in fences)
        for mine in fenced if self._policy.fencing else ():
            self.leases.give_up(mine)
            self._pending.append(StopOrigin(mine))
        if news:
            self.moved(now_s)
            if not self._seed_connected():
                self._pending.append(Tell(lease, ended=ended))

    def arrived(self, piece: int, from_origin: bool, now_s: float) -> None:
        """A piece is here; leases of which nothing is missing end."""
        bit = 1 << piece
        for first, held in list(self.leases.mine.items()):
            if not held.bits & bit:
                continue
            if from_origin:
                self._timed(now_s - self._last_s.get(first, held.heard_s))
                self._last_s[first] = now_s
            if not held.bits & self._pieces.missing:
                self._end(held.lease)
                if not from_origin:
                    self._pending.append(StopOrigin(held.lease))
        if from_origin:
            self._pieces.from_origin |= bit

    def came_wrong(self, piece: int, now_s: float) -> None:
        """The origin sent something else than was attested."""
        self.bad[piece] = self.bad.get(piece, 0) + 1
        self._bad_until_s[piece] = now_s + _BAD_AGAIN_S

    def done(self, lease: Lease) -> None:
        """The read ended; what of it is still missing is free again."""
        if self.leases.alive(lease):
            left = span(lease.first, lease.count) & self._pieces.missing
            self._end(lease)
            if left:
                self._pending.append(Tell(lease, ended=True))

    def failed(self, lease: Lease, retry_s: float, now_s: float) -> None:
        """The origin gave nothing more of it; nothing is read for `retry_s`."""
        self.done(lease)
        self.blocked_until_s = max(self.blocked_until_s, now_s + retry_s)

    def set_available(self, available: bool) -> None:
        """Whether this node can read the origin at all."""
        self.available = available
        if not available:
            self.stop()

    def stop(self) -> None:
        """Give all leases back."""
        for held in list(self.leases.mine.values()):
            self._end(held.lease)
            self._pending += [StopOrigin(held.lease), Tell(held.lease, ended=True)]

    def tell_again(self) -> None:
        """Somebody connected who has not heard of this node's leases."""
        self._pending.extend(Tell(held.lease) for held in self.leases.mine.values())

    # ---- decisions

    def news(self) -> list[Action]:
        """What happened since and must be done before anything new: reads to stop, leases to tell and to end."""
        made, self._pending = self._pending, []
        return made

    def decide(self, now_s: float, let: int) -> list[Action]:
        """Leases to take; `let`: pieces that may come now though no reader waits for them."""
        made: list[Action] = []
        if self._quiet_s is None:
            self._quiet_s = now_s
        pieces = self._pieces
        if not pieces.missing:
            return made
        self.leases.prune(pieces.missing & ~self._sources.everywhere.held)
        self._promote(now_s)
        if not self.available or self.blocked_until_s > now_s:
            return made
        free = pieces.missing & ~self._sources.everywhere.held & ~self._sources.asked & ~self.leases.own()
        free &= ~bits_of(piece for piece, until_s in self._bad_until_s.items() if until_s > now_s)
        free &= ~bits_of(piece for piece, times in self.bad.items() if times >= BAD_MAX)
        free &= ~self._leased(now_s)
        free = self._for_readers(made, free, now_s) & let
        if (self.seed or self.promoted) and free:
            self._take_stripes(made, free, now_s)
        return made

    def _take_stripes(self, made: list[Action], free: int, now_s: float) -> None:
        if self._seconds is None and not self._my_turn(now_s):
            return
        while free and self._active(now_s) < self._streams():
            first, count = self._next(free, now_s)
            count = min(count, self._room())
            if count <= 0:
                return
            free &= ~self._take(made, first, count, now_s)

    def _room(self) -> int:
        """How many pieces may be taken: those that this node read or reads, and few others hold yet, are bounded.

        It is what balances the seeds: who has pieces to pass on reads nothing meanwhile, so all uplinks have the same
        to give. A piece that half of the neighbours hold spreads without this node.
        """
        sources, pieces = self._sources, self._pieces
        if not len(sources):
            return self._shares.stripe_pieces
        spread = sources.everywhere.at_least(max(len(sources).bit_length() - 2, 0))
        waiting = pieces.from_origin & ~pieces.missing & ~spread | self.leases.own() & pieces.missing
        room = self._policy.unspread_pieces
        if self._seconds:
            room = max(room, int(self._policy.unspread_s / self._seconds))
        return room - waiting.bit_count()

    def _my_turn(self, now_s: float) -> bool:
        """Two seeds begin, more with each piece that came: all at once would wait long for the first whole one."""
        seen = (self._sources.everywhere.held | ~self._pieces.missing & self._pieces.every).bit_count()
        rank = sum(mix(hash_of(x)) < mix(hash_of(self._me)) for x in self._seeds)
        begun_s = self._begun_s if self._begun_s is not None else now_s
        self._begun_s = begun_s
        return rank < 2 + 2 * seen or now_s - begun_s >= rank * self._policy.begin_s

    def _streams(self) -> int:
        """How many ranges this node reads at once: one until something came, more while that makes none slower."""
        if self._seconds is None:
            return 1
        least = max(_STREAMS_MEANT // max(len(self._seeds), 1), 1)
        return min(max(int(self._more), least), self._policy.streams_max)

    def _active(self, now_s: float) -> int:
        """Reads that go on; one that is about to end is not counted, so that the next request is on its way by then."""
        made = 0
        for first, held in self.leases.mine.items():
            left = (held.bits & self._pieces.missing).bit_count()
            since_s = now_s - self._last_s.get(first, held.heard_s)
            made += left > 1 or self._seconds is None or since_s < self._seconds * _ENDS_AT
        return made

    @property
    def next_at_s(self) -> float:
        """When the next request should be sent at the earliest though no piece came."""
        if self._seconds is None:
            return float("inf")
        last_s = (self._last_s.get(first, held.heard_s) for first, held in self.leases.mine.items())
        return min(last_s, default=float("inf")) + self._seconds * _ENDS_AT

    def _timed(self, seconds: float) -> None:
        """A piece of the origin took so long. Slower than at first: the origin is full, more would only delay."""
        self._seconds = seconds if self._seconds is None else self._seconds * _FADE + seconds * (1 - _FADE)
        self._best = min(self._best, self._seconds)
        if self._seconds < self._best * _FULL_AT and len(self.leases.mine) >= self._streams():
            self._more += 1 / 3
        elif self._seconds > self._best * _OVERFULL_AT:
            self._more = max(self._more - 1 / 3, 1.0)

    def _next(self, free: int, now_s: float) -> tuple[int, int]:
        """Of this node's own stripes the first; else one of the seed with most left. No pieces: others take the rest.

        Helpers that come at the same time must not meet: each looks from a place of its own, and where little is left
        each piece belongs to the first by hash, half a second later to the next one, too.
        """
        if self._owned is None:
            self._owned = self._shares.owned(self._seeds or (self._me,))
        count_max = max(1, min(self._shares.stripe_pieces, free.bit_count() // (2 * max(len(self._seeds), 1))))
        if own := self._pieces.preferred(self._owned.get(self._me, 0) & free):
            return self._run(own, lowest(own), count_max)
        if free.bit_count() <= 2 * len(self._seeds):
            ripe = (piece for piece in each(free) if self._rank(piece) <= self._scarce_for(piece, now_s))
            piece = next(ripe, None)
            return (piece, 1) if piece is not None else (0, 0)
        most = max(self._owned.values(), key=lambda bits: (bits & free).bit_count()) & free or free
        back = first_from(most, mix(hash_of(self._me), lowest(free)) % self._pieces.count)
        stripe, count = self._shares.stripe_of(back)
        return self._run(free, lowest(free & span(stripe, count)), count_max)

    def _rank(self, piece: int) -> int:
        """How many other seeds come before this node for a piece."""
        own = mix(hash_of(self._me), piece)
        return sum(mix(hash_of(x), piece) < own for x in self._seeds if x != self._me)

    def _scarce_for(self, piece: int, now_s: float) -> int:
        """Half seconds since a piece was first seen to be free and scarce."""
        since_s = self._scarce_s.setdefault(piece, now_s)
        return int((now_s - since_s) / self._policy.tick_s)

    def _run(self, free: int, piece: int, count_max: int) -> tuple[int, int]:
        stripe, count = self._shares.stripe_of(piece)
        return piece, run_at(free, piece, min(count_max, stripe + count - piece))

    def _take(self, made: list[Action], first: int, count: int, now_s: float) -> int:
        lease = self.leases.take(first, count, now_s)
        made += [Tell(lease), ReadOrigin(lease, tuple(range(first, first + count)))]
        return span(first, count)

    def _end(self, lease: Lease) -> None:
        self.leases.give_up(lease)
        self._last_s.pop(lease.first, None)

    def _for_readers(self, made: list[Action], free: int, now_s: float) -> int:
        """What readers wait for and nobody has: its owner reads it at once, other seeds soon, other nodes late."""
        pieces, policy = self._pieces, self._policy
        for piece in each(bits_of(pieces.wanted) & free):
            if len(self.leases.mine) >= self._streams() + _READER_STREAMS:
                break
            wait_s = policy.reader_origin_s * (1.0 + mix(hash_of(self._me), piece) % 1024 / 1024)
            if self.seed or self.promoted:
                wait_s = 0.0 if self._first_for(piece) else wait_s / 10
            if now_s - pieces.waits_since_s.get(piece, now_s) >= wait_s:
                free &= ~self._take(made, piece, 1, now_s)
        return free

    def _first_for(self, piece: int) -> bool:
        if self._owned is None:
            self._owned = self._shares.owned(self._seeds or (self._me,))
        return bool(self._owned.get(self._me, 0) >> piece & 1)

    def _leased(self, now_s: float) -> int:
        """Pieces that others read; leases of which nothing was heard for too long are not counted, by rank."""
        made = 0
        for held in self.leases.quiet():
            if now_s - held.heard_s > self._policy.lease_patience_s and now_s - held.heard_s > self._patience_s(held):
                held.over = True
            else:
                made |= held.bits
        return made

    def _patience_s(self, held: Held) -> float:
        """Silence that is bad: four times what this node would need, longer each time; one after another asks."""
        policy, lease = self._policy, held.lease
        if self._seconds is None:
            return policy.promote_seeded_s * 2.0 ** min(lease.epoch, 10)
        rank = self._rank(lease.first)
        return (policy.lease_patience_s + 4.0 * self._seconds) * 2.0 ** min(lease.epoch - 1, 10) + 2.0 * rank

    def why_not(self, now_s: float) -> str:
        """Why nothing is read just now, for people."""
        if not self.available:
            return "the origin cannot be read from here"
        if self.blocked_until_s > now_s:
            return f"the origin failed, again in {self.blocked_until_s - now_s:.0f} s"
        if self.bad:
            return f"the origin sent {len(self.bad)} pieces with wrong bytes"
        if self.leases.quiet():
            holders = sorted({held.lease.holder for held in self.leases.quiet()})
            return f"{', '.join(holders[:3])} read the origin"
        if self.seed or self.promoted:
            return "its own pieces are not fetched by others yet"
        return "it is not among those that read the origin"

    # ---- without seeds

    def _seed_connected(self) -> bool:
        return any(source.seed for source in self._sources)

    def _promote(self, now_s: float) -> None:
        """See the module's docstring."""
        policy, sources, missing = self._policy, self._sources, self._pieces.missing
        if self.seed or not self.available:
            self.promoted = False
            return
        if self.promoted:
            self.promoted = not self._seed_connected() or not missing & sources.everywhere.held
            return
        if sources.asked or missing & sources.everywhere.held or self.leases.mine:
            self.moved(now_s)
            return
        own = mix(hash_of(self._me))
        rank = sum(mix(source.hash) < own for source in sources)
        seeded = self._seed_connected()
        patience_s = (policy.promote_seeded_s if seeded else policy.promote_quiet_s) + policy.promote_rank_s * rank
        self.promoted = self._quiet_s is not None and now_s - self._quiet_s >= patience_s


__all__ = ["BAD_MAX", "Reading"]
