"""Which nodes take an upload from an operator's machine. Pure and deterministic.

A node takes it when its cache is connected, can be dialled, is not cordoned and is large enough. First come nodes that
the caller has not failed to reach, then those that hold most of it (so that a second attempt continues where the first
one ended), then those with free room for all of it, then the roomiest; ties by node id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PushNode:
    """A node as an upload sees it; bytes. `bytes_max` 0: its cache has no bound of its own. `complete`: has all."""

    node_id: str
    pool: str
    dialled: bool
    open: bool
    bytes_max: int
    bytes_used: int
    bytes_held: int = 0
    complete: bool = False


@dataclass(frozen=True, slots=True)
class PushTargets:
    """Node ids, the best first; or why there is none."""

    nodes: tuple[str, ...]
    why: str = ""
    full: bool = False  # it is room that is missing


def push_targets(
    nodes: Iterable[PushNode], bytes_total: int, *, pool: str = "", avoid: frozenset[str] = frozenset(), count: int
) -> PushTargets:
    """At most `count` nodes for an artifact of `bytes_total` bytes. `pool`: only there; empty: anywhere."""
    meant = [node for node in nodes if not pool or node.pool == pool]
    where = f" of pool {pool}" if pool else ""
    up = [node for node in meant if node.open]
    if not up:
        return PushTargets((), f"no node{where} is connected and takes new work")
    dialled = [node for node in up if node.dialled]
    if not dialled:
        return PushTargets((), f"none of the {len(up)} connected nodes{where} has an address that can be dialled")
    large = [node for node in dialled if not node.bytes_max or node.bytes_max >= bytes_total]
    if not large:
        most = max(node.bytes_max for node in dialled)
        return PushTargets((), f"it has {bytes_total} bytes, the largest cache{where} holds {most}", full=True)
    large.sort(key=lambda node: _rank(node, bytes_total, avoid))
    return PushTargets(tuple(node.node_id for node in large[:count]))


def _rank(node: PushNode, bytes_total: int, avoid: frozenset[str]) -> tuple[bool, bool, int, bool, int, str]:
    room = node.bytes_max - node.bytes_used if node.bytes_max else bytes_total
    fits = room + node.bytes_held >= bytes_total
    return node.node_id in avoid, not node.complete, -node.bytes_held, not fits, -room.bit_length(), node.node_id


__all__ = ["PushNode", "PushTargets", "push_targets"]
