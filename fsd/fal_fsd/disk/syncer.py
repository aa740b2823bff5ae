"""The thread that makes pieces durable: when half a batch has gathered, else every SYNC_INTERVAL_S."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from fal_contract.telemetry import get_logger
from fal_fsd.disk.part import DiskPart

SYNC_INTERVAL_S: Final = 2.0
_JOIN_TIMEOUT_S: Final = 60.0

_log = get_logger("fal-fsd")


class Syncer:
    """`on_lost(artifact id, pieces)`: pieces that had been counted could not be written. `on_tick`: every interval.

    Both are called by the thread, without locks.
    """

    def __init__(
        self, on_lost: Callable[[str, Sequence[int]], None], on_tick: Callable[[], None], *, interval_s: float
    ) -> None:
        self._on_lost = on_lost
        self._on_tick = on_tick
        self._interval_s = interval_s
        self._condition = threading.Condition()
        self._parts: set[DiskPart] = set()
        self._wanted: set[DiskPart] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="disk-sync", daemon=True)
        self._thread.start()

    def add(self, part: DiskPart) -> None:
        with self._condition:
            self._parts.add(part)

    def remove(self, part: DiskPart) -> None:
        with self._condition:
            self._parts.discard(part)
            self._wanted.discard(part)

    def want(self, part: DiskPart) -> None:
        """Soon; never blocks."""
        with self._condition:
            self._wanted.add(part)
            self._condition.notify()

    def sync_all(self) -> None:
        """Now, in this thread."""
        with self._condition:
            parts = list(self._parts)
        for part in parts:
            self._sync(part)

    def close(self) -> None:
        """Ends the thread after what it does just now."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._wanted and not self._stopped:
                    self._condition.wait(self._interval_s)
                if self._stopped:
                    return
                wanted, self._wanted = self._wanted, set()
                parts = list(wanted or self._parts)
            for part in parts:
                self._sync(part)
            if not wanted:
                self._guarded(self._on_tick)

    def _sync(self, part: DiskPart) -> None:
        def work() -> None:
            lost = part.sync()
            if lost:
                self._on_lost(part.artifact.id, lost)

        self._guarded(work)

    def _guarded(self, work: Callable[[], None]) -> None:
        """The thread lives on whatever happens: without it nothing would become durable."""
        try:
            work()
        except Exception as exc:
            _log.error("the disk's upkeep failed", error=str(exc), kind=type(exc).__name__)
