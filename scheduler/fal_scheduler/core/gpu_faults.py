"""GPUs that are quarantined, by their node or by an operator: who must leave them, and what is said about it. Pure.

A node tells of a fault with a class; an operator's word is durable in the node's record. Either keeps new runners away;
runners that hold such a GPU are replaced elsewhere first and drained then, those of a dead one are stopped at once.
`State.refresh_node` uses `as_placed`, `stops.relieve` uses `faulty` and `dead`, `news` uses `tell`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fal_scheduler.core.told import Gpu

if TYPE_CHECKING:
    from fal_scheduler.core.records import Node, Runner
    from fal_scheduler.core.state import State
    from fal_scheduler.core.work import Work

DEAD: Final = "dead"
OPERATOR: Final = "operator"
ALARM: Final = "GPU_QUARANTINED"


def generation_of(state: State, node_id: str) -> int:
    """Of the inventory that a decision about this node is made on; 0: none was told."""
    live = state.live.get(node_id)
    return live.inventory.generation if live is not None and live.inventory is not None else 0


def as_placed(gpus: tuple[Gpu, ...], quarantined: Mapping[str, str]) -> tuple[Gpu, ...]:
    """GPUs as placement and operators see them: what a node told, under what operators decided."""
    if not quarantined:
        return gpus
    return tuple(_taken_out(gpu, quarantined) for gpu in gpus)


def _taken_out(gpu: Gpu, quarantined: Mapping[str, str]) -> Gpu:
    why = _word(gpu, quarantined)
    if why is None:
        return gpu
    reason = f"taken out by an operator: {why}" if why else "taken out by an operator"
    if gpu.health_class:  # what its node found counts more, and is said too
        return replace(gpu, health_reason=f"{gpu.health_reason}; {reason}")
    return replace(gpu, healthy=False, health_class=OPERATOR, health_reason=reason, health_state="quarantined")


def _word(gpu: Gpu, quarantined: Mapping[str, str]) -> str | None:
    """An operator's reason for this GPU or, of a MIG instance, its device; None: there is none."""
    return quarantined.get(gpu.id, quarantined.get(gpu.parent_id) if gpu.parent_id else None)


def faulty(state: State, runner: Runner) -> str:
    """Why a runner should leave its GPUs; empty: it may stay."""
    gpu = _fault_of(state, runner)
    return f"GPU {gpu.id} is quarantined ({gpu.health_class}): {gpu.health_reason}" if gpu is not None else ""


def dead(state: State, runner: Runner) -> bool:
    """Whether one of its GPUs is gone for good: nothing that it still answers can be right."""
    return any(gpu.health_class == DEAD for gpu in _gpus_of(state, runner))


def _fault_of(state: State, runner: Runner) -> Gpu | None:
    return next((gpu for gpu in _gpus_of(state, runner) if gpu.health_class), None)


def _gpus_of(state: State, runner: Runner) -> tuple[Gpu, ...]:
    if not runner.gpus:
        return ()
    facts = state.fleet.facts.get(runner.node)
    return tuple(gpu for gpu in facts.gpus if gpu.id in runner.gpus) if facts is not None else ()


def tell(work: Work, node: Node) -> None:
    """Bring alarms about a node's GPUs up to date, and have apps looked at whose runners should leave one."""
    state = work.state
    facts = state.fleet.facts.get(node.id)
    gpus = facts.gpus if facts is not None else ()
    sick = {gpu.id: gpu for gpu in gpus if gpu.health_class}
    prefix = f"{node.id}/"
    for kind, subject in list(state.alarms):
        if kind == ALARM and subject.startswith(prefix) and subject[len(prefix) :] not in sick:
            work.settle(kind, subject)
            work.log("GPU_RETURNED", subject[len(prefix) :], f"may be used again on {node.name}", node=node.id)
    for gpu in sick.values():
        what = f"GPU {gpu.id} ({gpu.model}) of node {node.name}"
        text = f"{what} is quarantined ({gpu.health_class}): {gpu.health_reason}"
        work.alarm(ALARM, prefix + gpu.id, text, _remedy(node, gpu))
    if sick:
        for runner_id in state.runners_by_node.get(node.id, ()):
            runner = state.runners[runner_id]
            if not sick.keys().isdisjoint(runner.gpus):
                state.dirty[runner.app] = None


def forget(work: Work, node_id: str) -> None:
    """The node goes for good, and alarms about its GPUs with it."""
    for kind, subject in list(work.state.alarms):
        if kind == ALARM and subject.startswith(f"{node_id}/"):
            work.settle(kind, subject)


def _remedy(node: Node, gpu: Gpu) -> str:
    release = f"`falctl gpu release {node.name} {gpu.id}`"
    match gpu.health_class:
        case "operator":
            return f"{release} gives it back."
        case "dead":
            return f"Restart the machine or replace the part, then {release}."
        case "reset":
            return f"It is reset and looked at by itself where that is allowed; else restart the machine, or {release}."
        case "foreign" | "memory":
            return "End the process named; it comes back by itself."
        case "stuck":
            return "Look at the kernel's log; where the process never ends, restart the machine."
        case _:
            return f"Check cooling, power and slot; it is looked at by itself, or {release}."


__all__ = ["as_placed", "dead", "faulty", "forget", "generation_of", "tell"]
