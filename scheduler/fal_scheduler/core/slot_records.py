"""What the slot book keeps and hears: runners, leases, wants. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

Key = tuple[str, str, str]  # app, model, LoRA: what wants are taken together by


@dataclass(frozen=True, slots=True)
class SlotRunner:
    """A runner that requests may be sent to."""

    id: str
    app: str
    node_id: str
    capacity: int  # requests at once
    resident: tuple[str, ...] = ()  # models loaded in it
    apps: tuple[str, ...] = ()  # others that it serves beside `app`

    @property
    def serves(self) -> tuple[str, ...]:
        """All apps that it serves."""
        return (self.app, *self.apps) if self.apps else (self.app,)


@dataclass(frozen=True, slots=True)
class Lease:
    """`slots` slots of one runner, held by one gateway until `expires_at_s` on the monotonic clock."""

    id: str
    runner_id: str
    gateway: str
    slots: int
    term: int
    expires_at_s: float
    app: str = ""  # that the slots are for


@dataclass(frozen=True, slots=True)
class Want:
    """What a gateway could use at once for one app beyond the slots that it holds."""

    app: str
    slots: int
    model: str = ""  # preferred resident model; empty: any
    priority: int = 0  # higher first
    lora: str = ""  # at hand; empty: none
    queued: int = 0  # requests that wait in the gateway
    since_s: float | None = None  # when the oldest of them came, on the monotonic clock; None: not told

    @property
    def key(self) -> Key:
        """What wants are taken together by."""
        return self.app, self.model, self.lora


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that a gateway says it holds from an earlier stream."""

    lease_id: str
    runner_id: str
    slots: int


def joined(one: Want, other: Want) -> Want:
    """Two wants for the same, taken together."""
    told = [x for x in (one.since_s, other.since_s) if x is not None]
    return replace(
        one,
        slots=one.slots + other.slots,
        priority=max(one.priority, other.priority),
        queued=one.queued + other.queued,
        since_s=min(told, default=None),
    )


__all__ = ["Held", "Key", "Lease", "SlotRunner", "Want", "joined"]
