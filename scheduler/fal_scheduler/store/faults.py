"""A store that fails as it is told, around a real one: for tests and simulation only.

Faults fire in the order of the script, one per commit; a commit without a fault passes through. Everything is
deterministic: the script is given, or drawn from a seeded `Random` by `random_script`. Waiting uses the loop's clock,
so a stall of 20 s costs nothing in virtual time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from fal_contract.errors import Code, FalError
from fal_scheduler.store.interface import Guard, Loaded, Member, Roster, Store, Write, load_first


class FaultKind(StrEnum):
    """What happens to one commit."""

    NONE = "none"
    STALL = "stall"  # done, `seconds_s` later
    FAIL = "fail"  # STORE_FAILED, not done
    LOSE_ANSWER = "lose_answer"  # done, then STORE_UNKNOWN
    LOSE_REQUEST = "lose_request"  # not done, STORE_UNKNOWN


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault of one commit; `seconds_s` passes before it takes effect."""

    kind: FaultKind
    seconds_s: float = 0.0


def random_script(rng: Random, *, commits: int, share: float, stall_s_max: float = 20.0) -> list[Fault]:
    """A script for so many commits, of which about `share` (0 to 1) meet a fault."""
    kinds = [kind for kind in FaultKind if kind is not FaultKind.NONE]
    return [
        Fault(rng.choice(kinds), rng.uniform(0.0, stall_s_max))
        if rng.uniform(0.0, 1.0) < share
        else Fault(FaultKind.NONE)
        for _ in range(commits)
    ]


class FaultStore:
    """`inner`, with faults at its commits. `hook` is called at "before commit" and "after commit" and may raise,
    which is how a test crashes the process at that point."""

    def __init__(
        self, inner: Store, script: Iterable[Fault] = (), *, hook: Callable[[str], None] | None = None
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._script = deque(script)
        self._hook = hook or (lambda point: None)
        self._must_load = False
        self.fired: list[Fault] = []

    def add(self, *faults: Fault) -> None:
        """Append to the script."""
        self._script.extend(faults)

    async def open(self) -> None:
        """See Store."""
        await self._inner.open()

    async def campaign(self, holder: str, *, term_min: int = 0) -> Guard:
        """See Store."""
        return await self._inner.campaign(holder, term_min=term_min)

    async def raise_term(self, guard: Guard, term: int) -> Guard:
        """See Store."""
        return await self._inner.raise_term(guard, term)

    async def resign(self, guard: Guard) -> None:
        """See Store."""
        await self._inner.resign(guard)

    async def lost(self, guard: Guard) -> None:
        """See Store."""
        await self._inner.lost(guard)

    async def load(self) -> Loaded:
        """See Store."""
        loaded = await self._inner.load()
        self._must_load = False
        return loaded

    async def commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        """See Store; meets the script's next fault."""
        if self._must_load:
            raise load_first(self.name)
        fault = self._script.popleft() if self._script else Fault(FaultKind.NONE)
        if fault.kind is not FaultKind.NONE:
            self.fired.append(fault)
        self._hook("before commit")
        if fault.seconds_s > 0.0:
            await asyncio.sleep(fault.seconds_s)
        match fault.kind:
            case FaultKind.FAIL:
                raise FalError(Code.STORE_FAILED, "a commit failed by script", remedy="None: a test asked for it.")
            case FaultKind.LOSE_REQUEST:
                raise self._unknown()
            case FaultKind.LOSE_ANSWER:
                await self._inner.commit(guard, writes)
                self._hook("after commit")
                raise self._unknown()
            case FaultKind.NONE | FaultKind.STALL:
                revision = await self._inner.commit(guard, writes)
                self._hook("after commit")
                return revision

    async def announce(self, member: Member) -> None:
        """See Store."""
        await self._inner.announce(member)

    async def roster(self) -> Roster:
        """See Store."""
        return await self._inner.roster()

    async def close(self) -> None:
        """See Store."""
        await self._inner.close()

    def statistics(self) -> Mapping[str, float]:
        """See Store."""
        return {**self._inner.statistics(), "faults": float(len(self.fired))}

    def _unknown(self) -> FalError:
        self._must_load = True
        return FalError(Code.STORE_UNKNOWN, "an answer was lost by script", remedy="None: a test asked for it.")
