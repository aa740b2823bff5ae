"""Journal records ↔ bytes. Pure but for msgpack.

Invariant: a record written by an older release of the same version reads back with defaults for what it lacks; keys
that this release does not know are ignored. A change that breaks this raises `fal_agent.journal.VERSION`, and the
samples in tests/data/journal hold us to it. Called by fal_agent.journal only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import msgpack

from fal_agent.core.assignments import Assignment, Goal
from fal_agent.core.standing import Standing
from fal_agent.core.tasks import Exit, Phase, Task

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Forget:
    """The scheduler knows that this runner is over; so may we."""

    runner_id: str


Record = Standing | Task | Forget


@dataclass(slots=True)
class Recorded:
    """The fold of all records."""

    standing: Standing = field(default_factory=Standing)
    tasks: dict[str, Task] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        match record:
            case Standing():
                self.standing = record
            case Task():
                self.tasks[record.runner_id] = record
            case Forget():
                self.tasks.pop(record.runner_id, None)


def encode(record: Record) -> bytes:
    """One record as msgpack: [kind, fields]."""
    match record:
        case Standing():
            body = _fields(record)
        case Task():
            body = _fields(record) | {
                "assignment": _fields(record.assignment) | {"goal": int(record.assignment.goal)},
                "phase": int(record.phase),
                "exit": _fields(record.exit) if record.exit else None,
            }
            del body["ready_by_s"], body["orphan"]  # monotonic time and the session's view mean nothing later
        case Forget():
            body = {"runner_id": record.runner_id}
    packed: bytes = msgpack.packb([type(record).__name__.lower(), body])
    return packed


def decode(payload: bytes) -> Record:
    """The inverse of encode. Raises ValueError or TypeError for what is no record of this version."""
    kind, body = msgpack.unpackb(payload)
    match kind:
        case "standing":
            return _make(Standing, body)
        case "forget":
            return _make(Forget, body)
        case "task":
            given = dict(body["assignment"])
            assignment = _make(
                Assignment, given | {"goal": Goal(given.get("goal", 1)), "gpus": tuple(given.get("gpus", ()))}
            )
            changed = {
                "assignment": assignment,
                "phase": Phase(body["phase"]),
                "exit": _make(Exit, body["exit"]) if body.get("exit") else None,
                "log_tail": tuple(body.get("log_tail", ())),
                "phases": tuple((name, seconds) for name, seconds in body.get("phases", ())),
            }
            return _make(Task, body | changed)
    raise ValueError(f"unknown kind of record {kind!r}")


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _make(cls: type[_T], body: Mapping[str, Any]) -> _T:
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # every class here is a dataclass
    return cls(**{key: value for key, value in body.items() if key in known})
