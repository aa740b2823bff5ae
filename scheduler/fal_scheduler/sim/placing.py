"""Runs of placement policies on a trace: arrivals once through, arrivals and departures, and how long decisions take.

A task is tried once, when it arrives; nothing is moved, nothing that fits
somewhere is refused. Every placement goes through `Shares.take`, which refuses what is not free.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fal_scheduler.core.baseline_policies import BestFit, DotProduct, GpuClustering, GpuPacking, RandomFit
from fal_scheduler.core.fragmentation import PPM, Demand, Shares
from fal_scheduler.core.policies import Choice, Falctl, Fgd, Policy
from fal_scheduler.core.typical import TypicalTasks
from fal_scheduler.sim.openb import Trace

_FIRST_LESSON: Final = 16
_LESSON_STEP_MAX: Final = 1000


@dataclass(slots=True)
class Player:
    """A policy on a fleet of its own, with what it must be told."""

    policy: Policy
    learn: Callable[[TypicalTasks], None] | None = None
    follow: Callable[[int, Demand, int], None] | None = None


def _falctl(shares: Shares, seen: TypicalTasks, seed: int) -> Player:
    policy = Falctl(shares, seen.typical(PPM))
    return Player(policy, learn=lambda told: policy.learn(told.typical(PPM)))


def _steady(shares: Shares, seen: TypicalTasks, seed: int) -> Player:
    policy = Falctl(shares, seen.typical(PPM), stranded=True)
    return Player(policy, learn=lambda told: policy.learn(told.typical(PPM)))


def _fgd(shares: Shares, seen: TypicalTasks, seed: int) -> Player:
    policy = Fgd(shares, seen.typical())
    return Player(policy, learn=lambda told: policy.learn(told.typical()))


def _clustering(shares: Shares, seen: TypicalTasks, seed: int) -> Player:
    policy = GpuClustering(shares)
    return Player(policy, follow=policy.follow)


POLICIES: Final[Mapping[str, Callable[[Shares, TypicalTasks, int], Player]]] = {
    "falctl": _falctl,
    "falctl-steady": _steady,
    "fgd": _fgd,
    "best-fit": lambda shares, seen, seed: Player(BestFit(shares)),
    "gpu-packing": lambda shares, seen, seed: Player(GpuPacking(shares)),
    "gpu-clustering": _clustering,
    "dot-prod": lambda shares, seen, seed: Player(DotProduct(shares)),
    "random": lambda shares, seen, seed: Player(RandomFit(shares, seed)),
}


@dataclass(slots=True)
class Played:
    """What one run came to."""

    allocated_pct: float = 0.0  # of all GPUs, mean over the events that count
    refused: int = 0  # tasks that fitted nowhere
    decisions: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    took_s: list[float] = field(default_factory=list)  # wall clock of each decision, where they were asked for
    took_cpu_s: list[float] = field(default_factory=list)  # the same in processor time


class Run:
    """One policy on one fleet; `learnt` starts it knowing nothing and lets it learn from what arrives."""

    def __init__(self, policy: str, shares: Shares, tasks: Sequence[Demand], *, seed: int, learnt: bool) -> None:
        self.shares = shares
        self._seen = TypicalTasks() if learnt else TypicalTasks(tasks)
        self._player = POLICIES[policy](shares, self._seen, seed)
        self._learnt = learnt and self._player.learn is not None
        self._lesson = _FIRST_LESSON

    def place(self, demand: Demand) -> Choice | None:
        """Decide, and hold what was decided."""
        player = self._player
        choice = player.policy.choose(self.shares, demand)
        if choice is not None:
            self.shares.take(choice.row, demand, choice.gpus)
            if player.follow is not None:
                player.follow(choice.row, demand, 1)
        if self._learnt:
            self._observe(demand)
        return choice

    def leave(self, demand: Demand, choice: Choice) -> None:
        """A task has ended."""
        self.shares.give(choice.row, demand, choice.gpus)
        if self._player.follow is not None:
            self._player.follow(choice.row, demand, -1)

    def _observe(self, demand: Demand) -> None:
        self._seen.observe(demand)
        if self._seen.arrivals >= self._lesson and self._player.learn is not None:
            self._player.learn(self._seen)
            self._lesson += min(self._lesson // 2, _LESSON_STEP_MAX)


def once_through(run: Run, tasks: Sequence[Demand], *, capacity_milli: int, at_pct: int, each: bool = False) -> Played:
    """Place the tasks in order; the figure is the mean over events whose demand so far rounds to `at_pct`."""
    played = Played()
    asked = allocated = counted = total = 0
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for demand in tasks:
        begun_s, begun_cpu_s = (time.perf_counter(), time.thread_time()) if each else (0.0, 0.0)
        choice = run.place(demand)
        if each:
            played.took_cpu_s.append(time.thread_time() - begun_cpu_s)
            played.took_s.append(time.perf_counter() - begun_s)
        size = demand.gpu_milli * demand.num_gpus
        asked += size
        if choice is None:
            played.refused += 1
        else:
            allocated += size
        if round(asked * 100 / capacity_milli) == at_pct:
            counted += 1
            total += allocated
    played.wall_s, played.cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    played.decisions = len(tasks)
    played.allocated_pct = 100 * total / counted / capacity_milli if counted else 100 * allocated / capacity_milli
    return played


def with_departures(
    run: Run, trace: Trace, *, seed: int, load: float, turnovers: int, before: int
) -> Iterator[tuple[int, int]]:
    """Tasks drawn from the trace come, uniformly drawn ones go, so that what was asked for and has not ended stays at
    `load` times the GPUs. Yields (allocated milli, milli refused of this arrival) once `before` turnovers of the fleet
    have passed, for `turnovers` more."""
    chance = random.Random(f"departures {seed}")
    living: list[tuple[Demand, Choice | None]] = []
    offered = allocated = passed = 0
    capacity = trace.capacity_milli
    while passed < (before + turnovers) * capacity:
        demand = trace.tasks[chance.randrange(len(trace.tasks))]
        size = demand.gpu_milli * demand.num_gpus
        while living and offered + size > load * capacity:
            place = chance.randrange(len(living))
            living[place], living[-1] = living[-1], living[place]
            gone, where = living.pop()
            offered -= gone.gpu_milli * gone.num_gpus
            if where is not None:
                run.leave(gone, where)
                allocated -= gone.gpu_milli * gone.num_gpus
        choice = run.place(demand)
        living.append((demand, choice))
        offered += size
        passed += size
        allocated += size if choice is not None else 0
        if passed > before * capacity:
            yield allocated, 0 if choice is not None else size
