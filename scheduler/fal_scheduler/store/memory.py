"""The store of tests and simulation: one `MemoryBackend` holds the records, each process has a `MemoryStore` on it.

Deterministic, and works in a virtual-time loop: the only clock is `loop.time()`, waiting leaders are served in the
order in which they came. Leadership is a lease that the handle renews, so partitions (`cut`), crashes (`crash`) and
copies of an old state (`MemoryBackend.copy`) behave as on etcd. Nothing survives the Python process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence

from fal_contract.errors import Code, FalError
from fal_contract.limits import COMMIT_TIMEOUT_S, MEMBER_TTL_S, STORE_LEASE_TTL_S
from fal_scheduler.store.interface import (
    CommitCounters,
    Guard,
    Loaded,
    Member,
    Roster,
    Write,
    check_writes,
    leads_already,
    not_leader,
)


class MemoryBackend:
    """What survives the processes: the records, the term, and who leads until when."""

    def __init__(self, *, lease_ttl_s: float = STORE_LEASE_TTL_S) -> None:
        self.records: dict[str, bytes] = {}
        self.revision = 0
        self.term = 0
        self.lease_ttl_s = lease_ttl_s
        self.members: dict[str, tuple[Member, float]] = {}  # and until when it counts as up
        self.holder = ""  # of the last election
        self._leader: bytes | None = None
        self._expires_s = 0.0
        self._elections = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def copy(self) -> MemoryBackend:
        """The records, revision and term as they are now, without a leader: what a backup restores."""
        other = MemoryBackend(lease_ttl_s=self.lease_ttl_s)
        other.records = dict(self.records)
        other.revision, other.term, other._elections = self.revision, self.term, self._elections
        return other

    def leads(self, token: bytes, now_s: float) -> bool:
        """Whether `token` is the leader's and its lease runs."""
        return self._leader == token and now_s < self._expires_s

    def roster(self, now_s: float) -> Roster:
        """Who leads and who is up at `now_s`."""
        up = [member for member, until_s in self.members.values() if now_s < until_s]
        leads = self._leader is not None and now_s < self._expires_s
        return Roster(self.holder if leads else "", self.term, tuple(sorted(up, key=lambda one: one.name)))

    def elect(self, now_s: float) -> bytes | None:
        """Take the leadership where it is free; the proof of it, or None."""
        if self._leader is not None and now_s < self._expires_s:
            return None
        self._elections += 1
        self._leader, self._expires_s = b"%d" % self._elections, now_s + self.lease_ttl_s
        return self._leader

    def renew(self, token: bytes, now_s: float) -> bool:
        """Extend the lease of `token`; False where it leads no longer."""
        if not self.leads(token, now_s):
            return False
        self._expires_s = now_s + self.lease_ttl_s
        return True

    def release(self, token: bytes) -> None:
        """Give the leadership up and wake who waits first."""
        if self._leader == token:
            self._leader = None
            self._wake()

    async def wait_for_turn(self) -> None:
        """Return when the leadership may be free: it was released, or the lease has run out."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max(self._expires_s - loop.time(), 0.0)):
                await turn
        except TimeoutError:
            pass
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


class MemoryStore:
    """One process's handle on a backend."""

    name = "memory"

    def __init__(self, backend: MemoryBackend, *, commit_s: float = 0.0, timeout_s: float = COMMIT_TIMEOUT_S) -> None:
        """`commit_s`: how long a commit takes; `timeout_s`: how long one waits for a backend that is cut off."""
        self._backend = backend
        self._commit_s = commit_s
        self._timeout_s = timeout_s
        self._counters = CommitCounters()
        self._lost: dict[bytes, asyncio.Event] = {}
        self._renewals: dict[bytes, asyncio.Task[None]] = {}
        self._commits = asyncio.Lock()
        self._announced = ""
        self.cut = False  # True: no message reaches the backend

    async def open(self) -> None:
        """Nothing to check."""
        self._refuse_while_cut()

    async def campaign(self, holder: str, *, term_min: int = 0) -> Guard:
        """See Store."""
        if self._lost:
            raise leads_already(holder)
        loop = asyncio.get_running_loop()
        backend = self._backend
        while True:
            token = None if self.cut else backend.elect(loop.time())
            if token is not None:
                break
            if self.cut:
                await asyncio.sleep(backend.lease_ttl_s / 3)
            else:
                await backend.wait_for_turn()
        backend.term = max(backend.term, term_min - 1) + 1
        backend.holder = holder
        self._lost[token] = asyncio.Event()
        self._renewals[token] = asyncio.create_task(self._renew(token))
        return Guard(backend.term, holder, token)

    async def raise_term(self, guard: Guard, term: int) -> Guard:
        """See Store."""
        self._refuse_while_cut()
        self._check(guard)
        if term <= guard.term:
            return guard
        self._backend.term = term
        return Guard(term, guard.holder, guard.token)

    async def resign(self, guard: Guard) -> None:
        """See Store."""
        if not self.cut:
            self._backend.release(guard.token)
        self._forget(guard.token)

    async def lost(self, guard: Guard) -> None:
        """See Store."""
        event = self._lost.get(guard.token)
        if event is not None:
            await event.wait()

    async def load(self) -> Loaded:
        """See Store."""
        self._refuse_while_cut()
        return Loaded(self._backend.revision, dict(self._backend.records))

    async def commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        """See Store."""
        size = check_writes(writes)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            async with self._commits:
                if self.cut:
                    await asyncio.sleep(self._timeout_s)
                    raise FalError(
                        Code.STORE_UNKNOWN,
                        f"the memory store did not answer within {self._timeout_s:g} s",
                        remedy="Stop leading and load again.",
                    )
                if self._commit_s > 0.0:
                    await asyncio.sleep(self._commit_s)
                self._check(guard)
                revision = self._apply(writes)
        except FalError as error:
            self._counters.refused(error)
            raise
        self._counters.committed(len(writes), size, loop.time() - begun_s)
        return revision

    async def announce(self, member: Member) -> None:
        """See Store."""
        self._refuse_while_cut()
        self._announced = member.name
        self._backend.members[member.name] = (member, asyncio.get_running_loop().time() + MEMBER_TTL_S)

    async def roster(self) -> Roster:
        """See Store."""
        self._refuse_while_cut()
        return self._backend.roster(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """See Store."""
        if not self.cut:
            self._backend.members.pop(self._announced, None)
        for token in list(self._lost):
            if not self.cut:
                self._backend.release(token)
            self._forget(token)

    def crash(self) -> None:
        """Vanish as a killed process does: renewals end, the lease runs out by itself."""
        for token in list(self._lost):
            self._forget(token)

    def statistics(self) -> Mapping[str, float]:
        """See Store."""
        return self._counters.as_mapping()

    def _apply(self, writes: Sequence[Write]) -> int:
        records = self._backend.records
        for write in writes:
            if write.value is None:
                records.pop(write.key, None)
            else:
                records[write.key] = write.value
        self._backend.revision += 1
        return self._backend.revision

    def _check(self, guard: Guard) -> None:
        if guard.term != self._backend.term:
            raise not_leader(guard, f"the term is {self._backend.term}")
        if not self._backend.leads(guard.token, asyncio.get_running_loop().time()):
            raise not_leader(guard, "its lease has ended")

    def _refuse_while_cut(self) -> None:
        if self.cut:
            raise FalError(Code.UNAVAILABLE, "the memory store cannot be reached", remedy="Heal the partition.")

    async def _renew(self, token: bytes) -> None:
        """Renew the lease three times per ttl; end, and tell `lost`, when the ttl has passed without success."""
        loop = asyncio.get_running_loop()
        ttl_s = self._backend.lease_ttl_s
        deadline_s = loop.time() + ttl_s
        while loop.time() < deadline_s:
            await asyncio.sleep(ttl_s / 3)
            if self.cut:
                continue
            if not self._backend.renew(token, loop.time()):
                break
            deadline_s = loop.time() + ttl_s
        self._forget(token)

    def _forget(self, token: bytes) -> None:
        event = self._lost.pop(token, None)
        if event is not None:
            event.set()
        task = self._renewals.pop(token, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
