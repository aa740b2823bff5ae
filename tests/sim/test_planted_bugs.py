"""Bugs planted into the real code, each a mistake that somebody could make. The checker must find every one.

What it must find is named by the rules of `sim.checker`; the same seeds pass without the bug (`test_simulation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import fal_agent.node
from fal_agent.core.assignments import Assignments, Complete, Delta
from fal_scheduler import engine
from fal_scheduler.core import invariants, liveness
from fal_scheduler.core.fleet import Fleet, Occupancy
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from fal_scheduler.core.work import Work
from fal_scheduler.engine import Engine
from sim.cluster import Found, Profile, play

SEEDS = 40  # within so many; the first find ends the search
CHAOS = Profile()
RESTORE = Profile(restore=True)


def _no_admission(patch: pytest.MonkeyPatch) -> None:
    """The agent starts whatever it is told to."""
    patch.setattr(fal_agent.node, "admit", lambda *_, **__: None)


def _older_terms(patch: pytest.MonkeyPatch) -> None:
    """The agent listens to a deposed leader."""
    admit = fal_agent.node.admit
    patch.setattr(fal_agent.node, "stale", lambda standing, term: None)

    def careless(assignment, node, tasks, *, leader_term):  # type: ignore[no-untyped-def]
        return admit(assignment, replace(node, term_seen=0), tasks, leader_term=leader_term)

    patch.setattr(fal_agent.node, "admit", careless)


def _forgotten_orphans(patch: pytest.MonkeyPatch) -> None:
    """The scheduler gives away what an orphan holds."""

    def add(self: State, node_id: str, status: object) -> None:
        live = self.live_of(node_id)
        live.orphans[status.runner_id] = status  # type: ignore[attr-defined]
        self.orphans[node_id, status.runner_id] = None  # type: ignore[attr-defined]

    def forget(self: State, node_id: str, runner_id: str) -> None:
        self.orphans.pop((node_id, runner_id), None)
        self.live_of(node_id).orphans.pop(runner_id, None)

    patch.setattr(State, "add_orphan", add)
    patch.setattr(State, "forget_orphan", forget)
    patch.setattr(invariants, "_held", _records_only)


def _records_only(state: State, node_id: str, *, told: bool):  # type: ignore[no-untyped-def]
    for runner_id in state.runners_by_node.get(node_id, ()):
        runner = state.runners[runner_id]
        yield invariants.Holding(runner_id, runner.gpus, runner.memory_bytes, runner.cpu_milli, runner.gpu_milli)


def _ignored_gaps(patch: pytest.MonkeyPatch) -> None:
    """The agent applies a delta to whatever it holds."""

    def guess(have: Assignments, message: Complete | Delta) -> Assignments:
        if isinstance(message, Complete):
            return Assignments(message.revision, {a.runner_id: a for a in message.assignments})
        kept = {id: a for id, a in have.by_runner.items() if id not in message.drop}
        return Assignments(message.revision, kept | {a.runner_id: a for a in message.put})

    patch.setattr(fal_agent.node, "receive", guess)


def _unknown_is_dead(patch: pytest.MonkeyPatch) -> None:
    """The scheduler replaces what has been silent for a quarter of a minute."""

    def abandon(work: Work) -> None:
        for live in work.state.live.values():
            if live.health in (Health.UNKNOWN, Health.LOST):
                for runner_id in work.state.runners_by_node.get(live.node_id, ()):
                    work.state.abandoned[runner_id] = None
                    work.state.dirty[work.state.runners[runner_id].app] = None

    patch.setattr(liveness, "_abandon", abandon)


def _lost_too_early(patch: pytest.MonkeyPatch) -> None:
    """The scheduler counts a node as lost after half the time."""
    patch.setattr(liveness, "LOST_AFTER_S", 30.0)


def _told_before_commit(patch: pytest.MonkeyPatch) -> None:
    """Sessions are told of what is still on its way to the store."""
    take = Engine._take

    def eager(self: Engine, outcome, event, future) -> None:  # type: ignore[no-untyped-def]
        self._tell(outcome.effects)
        take(self, replace(outcome, effects=()), event, future)

    patch.setattr(Engine, "_take", eager)
    patch.setattr(engine, "durable_runner", lambda batches, runner_id, present: present)


def _doubled_gpus(patch: pytest.MonkeyPatch) -> None:
    """Placement forgets what it has promised; the core's own check and the agent's stand in the way."""
    patch.setattr(Fleet, "hold", lambda self, node_id, *_: self.occupancy.setdefault(node_id, Occupancy()))
    patch.setattr(Fleet, "release", lambda self, *_: None)


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug, and the rules of which one must be reported broken."""

    plant: Callable[[pytest.MonkeyPatch], None]
    rules: tuple[str, ...]
    profile: Profile = CHAOS


PLANTS = {
    "the agent skips its admission": Plant(_no_admission, ("admission",)),
    "the agent obeys older terms": Plant(_older_terms, ("older-term",)),
    "the scheduler forgets orphans' GPUs": Plant(
        _forgotten_orphans, ("promised-once", "liveness"), Profile(restore=True)
    ),
    "a gap in the deltas is ignored": Plant(_ignored_gaps, ("same-set",)),
    "UNKNOWN is dead": Plant(_unknown_is_dead, ("no-idle-stop",)),
    "lost after 30 s": Plant(_lost_too_early, ("silence",)),
    "told before its commit": Plant(_told_before_commit, ("durable-first",)),
    "GPUs promised twice": Plant(_doubled_gpus, ("alarm", "promised-once")),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PLANTS)
def test_the_checker_finds(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant = PLANTS[name]
    plant.plant(monkeypatch)
    for seed in range(SEEDS):
        report = _report(seed, tmp_path, plant.profile)
        if report:
            broken = [line.partition(":")[0] for line in report.split("last events:")[0].splitlines()[1:] if line]
            assert set(broken) & set(plant.rules), f"seed {seed} found {broken}, not one of {plant.rules}:\n{report}"
            return
    pytest.fail(f"not found in {SEEDS} seeds")


def _report(seed: int, root: Path, profile: Profile) -> str:
    """What the checker says of this seed; empty where it finds nothing."""
    try:
        play(seed, root, profile)
    except Found as found:
        return str(found)
    return ""
