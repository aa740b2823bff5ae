"""Seeded plays of the whole cluster: no rule breaks, and everything is as it should be after healing.

A failing seed prints how to repeat it. `test_planted_bugs.py` shows that the checker can find what it looks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.cluster import Profile, play

LARGE = Profile(nodes=6, schedulers=3)
RESTORE = Profile(restore=True)


@pytest.mark.timeout(1200)
def test_random_histories_break_no_rule(base_seed: int, scale: Callable[[int], int], tmp_path: Path) -> None:
    """Each play: five minutes of faults and commands, two schedulers, four nodes; now and then six and three."""
    seen: Counter[str] = Counter()
    for at in range(scale(100)):
        played = play(base_seed + at, tmp_path, LARGE if at % 5 == 4 else Profile())
        seen.update(played.counts)
        seen["messages"] += played.messages
        seen["decisions replayed"] += played.replayed
    # A simulation in which nothing happens proves nothing.
    faults = ("starts", "stops", "terms", "partition", "bad_weather", "kill_agent")
    for what in ("messages", "decisions replayed", *faults):
        assert seen[what] > 0, f"no {what} in any play: {dict(seen)}"


@pytest.mark.timeout(1200)
def test_an_older_store_in_the_middle_of_it_stops_nothing(
    base_seed: int, scale: Callable[[int], int], tmp_path: Path
) -> None:
    """All schedulers come back on an older copy; an operator confirms the store, then its orphans."""
    seen: Counter[str] = Counter()
    for at in range(scale(30)):
        seen.update(play(base_seed + at, tmp_path, RESTORE).counts)
    assert seen["restores"] > 0


def test_a_seed_repeats(base_seed: int, tmp_path: Path) -> None:
    """The same seed gives the same play, message for message."""
    first, second = (play(base_seed, tmp_path / str(n), Profile(chaos_s=60.0)) for n in range(2))
    assert (first.messages, first.counts, first.virtual_s) == (second.messages, second.counts, second.virtual_s)
