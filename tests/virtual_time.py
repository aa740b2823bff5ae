"""Virtual time for asyncio: a loop that never waits, it moves its clock to the next timer instead.

    run_virtually(main())                     # hours in milliseconds, the same every time
    clock = LoopClock()                       # fal_contract.clock.Clock on that loop

Sockets and subprocesses have no place on this loop; what would run in a thread runs at once; a deadlock (all wait, no
timer) raises at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

WALL_START_S = 1_700_000_000.0


class _JumpSelector(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: every task waits and no timer is set")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _JumpSelector()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: object
    ) -> asyncio.Future[T]:
        """What would run in a thread runs at once and takes no time, so that a seed repeats."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class LoopClock:
    """The running loop's time; `skew_s` sets the wall clock apart."""

    def __init__(self) -> None:
        self.skew_s = 0.0

    def wall_s(self) -> float:
        return WALL_START_S + self.skew_s + self.monotonic_s()

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
