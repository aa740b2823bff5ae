"""What containers used, as it is stored: one record a container, and sums a day. Pure. Meanings: `state.proto`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """What one container used so far, by its assignment."""

    assignment: str
    app: str
    revision: int
    runner: str
    pool: str = ""
    node: str = ""
    machine_type: str = ""
    gpus: int = 0
    gpu_milli: int = 0
    started_at_s: float = 0.0
    until_s: float = 0.0
    gpu_ms: int = 0
    busy_gpu_ms: int = 0
    served: int = 0
    price_micros: int = 0
    ended: bool = False

    @property
    def cost_micros(self) -> int:
        """Millionths of a US dollar, rounded down."""
        return self.gpu_ms * self.price_micros // 3_600_000


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum over containers of one app, pool and machine type."""

    app: str
    pool: str
    machine_type: str
    gpu_ms: int = 0
    busy_gpu_ms: int = 0
    served: int = 0
    cost_micros: int = 0
    runners: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is the sum of."""
        return self.app, self.pool, self.machine_type

    def plus(self, other: UsageRow) -> UsageRow:
        """Both together; `other` has the same key."""
        return UsageRow(
            self.app,
            self.pool,
            self.machine_type,
            self.gpu_ms + other.gpu_ms,
            self.busy_gpu_ms + other.busy_gpu_ms,
            self.served + other.served,
            self.cost_micros + other.cost_micros,
            self.runners + other.runners,
        )


@dataclass(frozen=True, slots=True)
class UsageDay:
    """Sums of a day (UTC, "2026-11-21"), in order of their keys."""

    day: str
    part: int
    rows: tuple[UsageRow, ...] = ()
