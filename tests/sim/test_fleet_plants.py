"""Bugs planted into the scheduler's own code, each a mistake that somebody could make. The fleet's checker must find
every one; the same fleets pass without them (`test_fleet`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fal_scheduler.core import (
    disruption,
    expectations,
    fleet,
    invariants,
    liveness,
    preemption,
    quotas,
    rollout,
    scaling,
    stops,
    suspicion,
    usage,
    waiting,
)
from fal_scheduler.core.liveness import Silence
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from sim.fleet_world import Broken, FleetWorld

SEEDS = 12  # within so many; the first find ends the search
HOURS = 6.0
LOADS = (1.0, 1.6)


def _own_stall_is_silence(patch: pytest.MonkeyPatch) -> None:
    """Time in which the scheduler itself stood still counts as the nodes' silence."""
    age = liveness._age_s

    def careless(work: Any, live: Any) -> float:
        return age(work, live) + work.state.stall_total_s - live.stall_at_heard_s

    patch.setattr(liveness, "_age_s", careless)


def _cut_off_is_lost(patch: pytest.MonkeyPatch) -> None:
    """Every silent node is lost after its time, also where none speaks any more."""

    def judge(nodes: Any) -> dict[str, Health]:
        def health(one: Silence) -> Health:
            if one.age_s <= liveness.UNKNOWN_AFTER_S:
                return Health.READY
            return Health.LOST if one.age_s > liveness.LOST_AFTER_S else Health.UNKNOWN

        return {one.node_id: health(one) for one in nodes}

    patch.setattr(liveness, "judge", judge)


def _drain_without_budget(patch: pytest.MonkeyPatch) -> None:
    """A drain asks nobody how many of an app may go at once."""
    patch.setattr(stops, "allowed", lambda *_: 1000)


def _rollout_without_budget(patch: pytest.MonkeyPatch) -> None:
    """What silent nodes took from an app does not count when its rollout takes more."""
    patch.setattr(disruption, "disturbed", lambda *_: 0)


def _preempts_below_quota(patch: pytest.MonkeyPatch) -> None:
    """What leaves already is taken from its team once more."""
    patch.setattr(preemption, "_leaving_milli", lambda _: {})


def _borrows_where_it_may_not(patch: pytest.MonkeyPatch) -> None:
    """A quota that allows no borrowing is only looked at when somebody else waits."""
    refusal = quotas.refusal

    def lenient(state: State, team: str, spec: Any) -> str:
        why = refusal(state, team, spec)
        return "" if "may not borrow" in why else why

    patch.setattr(quotas, "refusal", lenient)


def _forecast_without_budget(patch: pytest.MonkeyPatch) -> None:
    """The forecast may start as many as it likes."""

    def foretold(state: State, app: Any, found: Any, requests: int, wall_s: float) -> int:
        return found.max_concurrency if found.forecast_concurrency and app.id in state.demand.arrivals else 0

    patch.setattr(scaling, "_foretold", foretold)


def _scales_down_in_grace(patch: pytest.MonkeyPatch) -> None:
    """A new leader judges by what it has heard so far."""
    patch.setattr(scaling, "in_grace", lambda *_: False)
    patch.setattr(stops, "in_grace", lambda *_: False)


def _never_rolls_back(patch: pytest.MonkeyPatch) -> None:
    """A revision that fails goes on."""
    patch.setattr(rollout, "_failed", lambda *_: "")


def _misses_a_class(patch: pytest.MonkeyPatch) -> None:
    """What becomes free wakes only who may wait for it with priority."""
    takes = waiting._takes

    def important_only(state: State, node_id: str, app_id: str) -> bool:
        app = state.apps.get(app_id)
        return (app is None or state.revision_of(app).spec.priority >= 0) and takes(state, node_id, app_id)

    patch.setattr(waiting, "_takes", important_only)


def _negative_terms(patch: pytest.MonkeyPatch) -> None:
    """A learnt term may come out below nothing."""
    made = expectations.predict

    def predict(*args: Any, **named: Any) -> Any:
        found = made(*args, **named)
        return replace(found, terms=tuple(replace(term, ms=term.ms - 400) for term in found.terms))

    patch.setattr(expectations, "predict", predict)


def _lower_term(patch: pytest.MonkeyPatch) -> None:
    """A leader does not rise above the terms that its nodes have seen."""
    patch.setattr(suspicion, "term_needed", lambda *_: 0)


def _ledger_doubled(patch: pytest.MonkeyPatch) -> None:
    """What a container used is added again whenever it is told."""
    grow = usage._grow

    def adds(work: Any, found: Any) -> None:
        have = work.state.usage.get(found.assignment)
        grow(work, replace(found, gpu_ms=found.gpu_ms + have.gpu_ms) if have is not None else found)

    patch.setattr(usage, "_grow", adds)
    patch.setattr(usage, "USAGE_CHECKPOINT_S", 1800.0)


def _share_booked_twice(patch: pytest.MonkeyPatch) -> None:
    """A share of a GPU counts half; the core's own check reads it so, too."""
    hold = fleet.Fleet.hold

    def halved(
        self: Any, node_id: str, runner_id: str, gpus: Any, memory: int, cpu: int, milli: int, apps: Any
    ) -> None:
        hold(self, node_id, runner_id, gpus, memory, cpu, milli // 2, apps)

    patch.setattr(fleet.Fleet, "hold", halved)
    patch.setattr(invariants, "_gpu", lambda *_: [])


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug, and the rules of which one must be reported broken."""

    plant: Callable[[pytest.MonkeyPatch], None]
    rules: tuple[str, ...]


PLANTS = {
    "own stall counts as silence": Plant(_own_stall_is_silence, ("silence",)),
    "cut off, everything is lost": Plant(_cut_off_is_lost, ("all-silent", "silence")),
    "a drain ignores the budget": Plant(_drain_without_budget, ("share",)),
    "a rollout ignores who is silent": Plant(_rollout_without_budget, ("share",)),
    "preemption goes below quota": Plant(_preempts_below_quota, ("quota",)),
    "borrowing without leave": Plant(_borrows_where_it_may_not, ("quota",)),
    "the forecast has no budget": Plant(_forecast_without_budget, ("forecast",)),
    "scaled down in grace": Plant(_scales_down_in_grace, ("grace", "served-stop")),
    "never rolled back": Plant(_never_rolls_back, ("rollback", "rest")),
    "waking misses a class": Plant(_misses_a_class, ("starved", "rest")),
    "a learnt term is negative": Plant(_negative_terms, ("negative",)),
    "takeover below the nodes' term": Plant(_lower_term, ("rest", "older-term")),
    "the ledger counts twice": Plant(_ledger_doubled, ("ledger",)),
    "a share is booked twice": Plant(_share_booked_twice, ("promised-once", "gpu-once")),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PLANTS)
def test_the_checker_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = PLANTS[name]
    plant.plant(monkeypatch)
    for seed in range(SEEDS):
        report = _report(seed)
        if report:
            rule = report.partition(":")[0]
            assert rule in plant.rules, f"seed {seed} found {rule}, not one of {plant.rules}:\n{report}"
            return
    pytest.fail(f"not found in {SEEDS} seeds")


def _report(seed: int) -> str:
    """What the checker says of this seed; empty where it finds nothing."""
    try:
        FleetWorld(seed, nodes=24, apps=8, load=LOADS[seed % len(LOADS)]).run(hours=HOURS, chapter_hours=3.0)
    except Broken as found:
        return str(found)
    return ""
