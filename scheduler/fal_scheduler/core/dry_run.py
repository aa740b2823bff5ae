"""What applying manifests would do: the production core on a copy of the state. Pure.

The copy is the state's own snapshot, brought back. Commands are stepped through it as they would be through the
engine, and what follows from them at once; nothing of it is committed or told. A step of a rollout is as far as it
goes: what comes after needs runners that serve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fal_scheduler.core.events import ApplyApp, ApplyPool, Moment, Proceed
from fal_scheduler.core.log_codec import Packer, Unpacker
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Goal, Runner
from fal_scheduler.core.snapshot import restore, take
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core

STEPS_MAX: Final = 500


class PlannedIds:
    """Ids of what is only planned."""

    def __init__(self) -> None:
        self._next = 0

    def suffix(self) -> str:
        """`plan0001` …"""
        self._next += 1
        return f"plan{self._next:04d}"


@dataclass(frozen=True, slots=True)
class Start:
    """A runner that would be made. `node_id` empty: it would wait, `reason` says for what."""

    app: str
    node_id: str = ""
    gpus: int = 0
    ready_ms: int = -1
    reason: str = ""


@dataclass(slots=True)
class Effects:
    """What one command would lead to."""

    outcome: str
    starts: list[Start] = field(default_factory=list)
    drains: list[str] = field(default_factory=list)  # runners, also of other apps
    stops: list[str] = field(default_factory=list)
    rollout: str = ""
    cost_micros_per_hour: int = 0  # more (or less) than now


def packed(state: State) -> bytes:
    """A copy that the next step cannot change; costs about 70 us a node with eight GPUs."""
    return Packer().pack((take(state),))


def unpacked(data: bytes) -> State:
    """The state of a copy. Independent of the one that it was taken of."""
    (read,) = Unpacker().unpack(data)
    taken: dict[str, Any] = read[0]
    return restore(taken)


def dry_run(state: State, commands: Iterable[ApplyApp | ApplyPool], moment: Moment) -> list[Effects]:
    """Carry the commands out on `state`, which is a copy. Raises FalError where one would be refused."""
    core = Core(state, Placer(state.fleet), PlannedIds())
    return [_one(core, command, moment) for command in commands]


def _one(core: Core, command: ApplyApp | ApplyPool, moment: Moment) -> Effects:
    state = core.state
    before, cost_before = dict(state.runners), _cost(state)
    reply = core.step(command, moment).reply
    for _ in range(STEPS_MAX):
        if not state.dirty:
            break
        core.step(Proceed(), moment)
    effects = Effects(reply.outcome if reply is not None else "unchanged")
    if effects.outcome == "unchanged":
        return effects
    for runner in state.runners.values():
        was = before.get(runner.id)
        if was is None or (runner.node and not was.node):
            effects.starts.append(_start(state, runner))
        elif runner.goal > was.goal:
            (effects.drains if runner.goal is Goal.DRAIN else effects.stops).append(runner.id)
    effects.stops += [id_ for id_, was in before.items() if id_ not in state.runners and was.node]
    if isinstance(command, ApplyApp) and (rollout := state.apps[command.id].rollout) is not None:
        effects.rollout = f"{rollout.phase} from revision {rollout.from_revision} to {rollout.to_revision}"
    effects.cost_micros_per_hour = _cost(state) - cost_before
    return effects


def _start(state: State, runner: Runner) -> Start:
    if not runner.node:
        pending = state.pending.get((runner.app, runner.revision))
        return Start(runner.app, reason=pending.reason if pending is not None else "waits for its turn")
    made = state.predictions.get(runner.id)
    return Start(runner.app, runner.node, len(runner.gpus), made.prediction.total_ms if made is not None else -1)


def _cost(state: State) -> int:
    """Millionths of a US dollar per hour of all that is promised and is to stay."""
    total = 0
    for runner in state.runners.values():
        node = state.nodes.get(runner.node)
        pool = state.pools.get(node.pool) if node is not None else None
        if pool is not None and runner.goal is Goal.RUN:
            total += len(runner.gpus) * (runner.gpu_milli or 1000) * pool.gpu_hour_price_micros // 1000
    return total
