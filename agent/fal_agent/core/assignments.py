"""What the scheduler asks of this node: assignments, and the chained set of them. Pure.

Invariant: `receive` either returns exactly the set that the scheduler holds, or raises Gap; it never guesses. What is
missing from a set says nothing about containers: only a goal stops one (core/tasks.py).
Called by fal_agent.node. `wire` is the assignment as it came, opaque here and parsed at the edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType

from fal_contract.errors import Code, FalError


class Goal(IntEnum):
    """What should become of a runner; the numbers are `fal.v1.Goal`'s. They only rise."""

    RUN = 1
    DRAIN = 2
    STOP = 3
    KILL = 4


@dataclass(frozen=True, slots=True)
class Assignment:
    """One runner as the scheduler wants it. 0 in a limit means none."""

    id: str
    term: int
    runner_id: str
    goal: Goal = Goal.RUN
    goal_reason: str = ""
    app: str = ""
    revision: int = 0
    share_group: str = ""
    gpus: tuple[str, ...] = ()
    memory_bytes: int = 0
    cpu_milli: int = 0
    max_multiplexing: int = 1
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 3600.0
    termination_grace_s: float = 5.0
    image: str = "host"
    network: str = "none"
    wire: bytes = field(default=b"", repr=False)
    inventory_generation: int = 0  # that it was decided on; 0: not checked
    build: bool = False  # a task that runs once and leaves files, not a worker
    gpu_milli: int = 0  # thousandths of each of its GPUs and of their memory; 0: all of them, alone


@dataclass(frozen=True, slots=True)
class Complete:
    """The whole set."""

    revision: int
    term: int
    store_revision: int
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """A change to the set of revision `base`."""

    base: int
    revision: int
    term: int
    store_revision: int
    put: tuple[Assignment, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignments:
    """The set that is held, by runner id. Revision 0: nothing came yet in this session."""

    revision: int = 0
    by_runner: Mapping[str, Assignment] = field(default_factory=lambda: MappingProxyType({}))


class Gap(FalError):
    """A message of the chain is missing: the session starts over."""

    def __init__(self, have: int, base: int) -> None:
        super().__init__(
            Code.CONFLICT,
            f"the assignment set has revision {have}, a delta for {base} came",
            remedy="The session starts over by itself.",
        )


def receive(have: Assignments, message: Complete | Delta) -> Assignments:
    """The set after `message`. Raises Gap when a delta does not apply to what is held."""
    match message:
        case Complete():
            return Assignments(message.revision, {a.runner_id: a for a in message.assignments})
        case Delta():
            if not have.revision or message.base != have.revision:
                raise Gap(have.revision, message.base)
            kept = {id: a for id, a in have.by_runner.items() if id not in message.drop}
            return Assignments(message.revision, kept | {a.runner_id: a for a in message.put})
