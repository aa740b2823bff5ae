"""Commands about nodes: taken out, given back, labelled, removed; and what a cloud tells of one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DrainNode:
    """Let a node's runners leave it. `kind`: see `records.Drain`; `deadline_s` None: nothing is ever stopped.

    `force`: stop everything at once. `uncordon`: when it is empty it may be used again.
    """

    node: str
    kind: str = "drain"
    deadline_s: float | None = None
    force: bool = False
    uncordon: bool = False
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class CancelDrain:
    """End a drain, or maintenance: what still runs stays, and the node may be used again."""

    node: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class LabelNode:
    """Set and remove labels of a node's own."""

    node: str
    put: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """Forget a node: it must be empty, or lost, or (`force`) whatever it runs is given up."""

    node: str
    force: bool = False
    actor: str = ""


@dataclass(frozen=True, slots=True)
class DeclareLost:
    """An operator knows that what is silent in a pool now is gone."""

    pool: str
    actor: str = ""


NodeCommand = DrainNode | CancelDrain | LabelNode | RemoveNode | DeclareLost


@dataclass(frozen=True, slots=True)
class NodeNotice:
    """News: the cloud takes the node back ("spot") or works on it ("notice") in `within_s` seconds.

    `kind` "": nothing is announced, or no longer. `within_s` below 0: nobody says when.
    """

    node_id: str
    session_id: str
    kind: str
    within_s: float
    reason: str
    arrived_s: float


@dataclass(frozen=True, slots=True)
class RebootRefused:
    """News: the node's agent did not reboot the machine, or it is still up. `boot_id`: of the order."""

    node_id: str
    session_id: str
    boot_id: str
    error: str
    remedy: str
    arrived_s: float


@dataclass(frozen=True, slots=True)
class RebootDue:
    """Effect: the node is empty and is to be told to reboot, where its boot id is still this one."""

    node_id: str
    boot_id: str
