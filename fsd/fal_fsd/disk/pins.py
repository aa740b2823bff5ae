"""Pins with their clock: durable when made, ended by store time (fal_fsd.core.pin_clock)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from fal_contract.clock import Clock
from fal_fsd.core.pin_clock import PinClock
from fal_fsd.disk.catalog import Catalog

_SAVED: Final = struct.Struct("<dd")
_KEY: Final = "pin_clock"
SAVE_INTERVAL_S: Final = 60.0


class Pins:
    """Thread-safe, as the catalog is."""

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog = catalog
        self._clock = clock
        raw = catalog.recall(_KEY)
        saved = _SAVED.unpack(raw) if raw is not None and len(raw) == _SAVED.size else None
        self._time = PinClock.begin(saved, wall_s=clock.wall_s(), monotonic_s=clock.monotonic_s())
        self._saved_s = 0.0
        self.save(now=True)

    def now_s(self) -> float:
        """Store time."""
        return self._time.now_s(self._clock.monotonic_s())

    def pin(self, ids: Iterable[str], owner: str, *, expires_at_s: float = 0.0) -> None:
        """`expires_at_s`: wall clock as it reads now; 0: never."""
        expires_s = 0.0
        if expires_at_s:
            wall_s, monotonic_s = self._clock.wall_s(), self._clock.monotonic_s()
            expires_s = max(self._time.of_wall_s(expires_at_s, wall_s=wall_s, monotonic_s=monotonic_s), 1e-9)
        with self._catalog.transaction():
            self._catalog.pin(ids, owner, expires_s)
            if expires_at_s:
                self.save(now=True)

    def pinned(self, id: str) -> bool:
        return self._catalog.pinned(id, self.now_s())

    def all(self) -> dict[str, list[str]]:
        """Owners, by artifact id."""
        return self._catalog.pins(self.now_s())

    def expire(self) -> list[str]:
        """Forget pins that have ended; artifact ids."""
        return self._catalog.expire(self.now_s())

    def save(self, *, now: bool = False) -> None:
        """Write the clock down, if that is due."""
        monotonic_s = self._clock.monotonic_s()
        if now or monotonic_s - self._saved_s >= SAVE_INTERVAL_S:
            self._saved_s = monotonic_s
            self._catalog.remember(_KEY, _SAVED.pack(self._time.now_s(monotonic_s), self._clock.wall_s()))
