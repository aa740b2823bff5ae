"""What was learnt, as the store keeps it: one record a shard. Pure. Everybody finds it in `core.records`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Learnt:
    """A shard of `core.learning`: (key, numbers), in order of keys; see `core.learnt_shards`. Unix seconds."""

    shard: str
    saved_at_s: float = 0.0
    entries: tuple[tuple[str, tuple[int, ...]], ...] = ()


__all__ = ["Learnt"]
