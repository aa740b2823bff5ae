"""Fleets of hundreds of machines for virtual days: no rule breaks, and after every calm everything is at rest.

A failing seed prints how to repeat it. `test_fleet_plants.py` shows that the checker can find what it looks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from sim.fleet_world import FleetWorld

NODES, APPS = 200, 40
MINUTES = 48 * 60
SMALL_NODES, SMALL_APPS = 30, 10
LOADS = (1.0, 1.6)
FAULTS = ("crash", "partition", "zone", "all silent", "store stall", "stand still", "leader", "spot wave", "deploy")


@pytest.mark.timeout(1200)
def test_two_days_of_two_hundred_nodes_break_no_rule(base_seed: int, scale: Callable[[int], int]) -> None:
    """48 hours, or a tenth of them: chapters of faults and commands, and a calm after each."""
    world = FleetWorld(base_seed, nodes=NODES, apps=APPS)
    world.run(hours=scale(MINUTES) / 60)
    _something_happened(world, rests=1)


@pytest.mark.timeout(1200)
def test_small_fleets_of_many_seeds_break_no_rule(base_seed: int, scale: Callable[[int], int]) -> None:
    """Twelve hours each; many seeds see more than many hours."""
    seen: Counter[str] = Counter()
    for at in range(scale(30)):
        world = FleetWorld(base_seed + at, nodes=SMALL_NODES, apps=SMALL_APPS, load=LOADS[at % len(LOADS)])
        world.run(hours=12.0, chapter_hours=4.0)
        _something_happened(world, rests=3)
        seen.update(world.faults.counts)
    # A simulation in which nothing happens proves nothing.
    for what in FAULTS:
        assert seen[what] > 0, f"no {what} in any run: {dict(seen)}"


def _something_happened(world: FleetWorld, *, rests: int) -> None:
    counts = world.checker.counts
    assert counts["rests"] >= rests
    for what in ("starts", "ends", "everything", "ledger checked", "NODE_LOST", "share checked"):
        assert counts[what] > 0, f"no {what}: {dict(counts)}"


def test_a_seed_repeats(base_seed: int) -> None:
    """The same seed is the same history, step for step; another is another."""
    first, second, other = (FleetWorld(seed, nodes=20, apps=8) for seed in (base_seed, base_seed, base_seed + 1))
    for world in (first, second, other):
        world.run(hours=3.0, chapter_hours=3.0)
    assert first.digest == second.digest
    assert first.digest != other.digest


def test_heartbeats_that_change_nothing_may_be_left_out(base_seed: int) -> None:
    """Stepped one by one they come to the same history."""
    for seed in range(base_seed, base_seed + 2):
        elided, stepped = (FleetWorld(seed, nodes=12, apps=8, elide=elide) for elide in (True, False))
        for world in (elided, stepped):
            world.run(hours=2.0, chapter_hours=2.0)
        assert elided.digest == stepped.digest
        assert stepped.checker.counts["NodeReport"] > 2 * elided.checker.counts["NodeReport"]
