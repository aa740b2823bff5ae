"""The benchmark harness: its arithmetic decides whether a figure counts as reached."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from harness import Options, Paired, Result, interleave, open_loop, percentile, rate, significant


def test_runs_take_turns_after_one_unmeasured_pair() -> None:
    order: list[str] = []

    async def ours() -> float:
        order.append("ours")
        return float(len(order))

    async def baseline() -> float:
        order.append("baseline")
        return 2.0 * len(order)

    paired = asyncio.run(interleave(ours, baseline, pairs=3))
    assert order == ["ours", "baseline"] * 4
    assert paired == Paired([3.0, 5.0, 7.0], [8.0, 12.0, 16.0])


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians() -> None:
    paired = Paired(ours=[1.0, 10.0, 100.0], baseline=[2.0, 10.0, 50.0])
    assert paired.ratio == 1.0
    assert paired.as_json() == {"ours": 10.0, "baseline": 10.0, "ratio": 1.0, "ratio_min": 0.5, "ratio_max": 2.0}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0), (0.0, 1.0)])
def test_percentiles_are_values_that_were_measured(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected


def test_the_rate_counts_what_was_done() -> None:
    done = 0

    async def work() -> int:
        nonlocal done
        done += 7
        return 7

    per_s = asyncio.run(rate(work, seconds_s=0.02))
    assert done > 0
    assert per_s <= done / 0.02


def test_an_open_loop_counts_from_when_work_was_due() -> None:
    """One stall delays everything behind it; a closed loop would have hidden all but one wait."""

    async def scenario() -> list[float]:
        turn = asyncio.Lock()
        first = True

        async def work() -> None:
            nonlocal first
            async with turn:
                if first:
                    first = False
                    await asyncio.sleep(0.1)

        return await open_loop(work, per_s=200.0, seconds_s=0.1)

    took = asyncio.run(scenario())
    assert len(took) == 20
    assert sum(one > 0.04 for one in took) >= 10


def test_the_last_line_is_one_json_object_with_the_agreed_fields() -> None:
    result = Result("x", 1.23456, 2.0, 0.61728, "1/s", 7, ">= 0.5", True, {"more": {"a": 1}})
    assert json.loads(result.last_line()) == {
        "bench": "x",
        "ours": 1.235,
        "baseline": 2.0,
        "ratio": 0.6173,
        "unit": "1/s",
        "runs": 7,
        "more": {"a": 1},
        "must_reach": ">= 0.5",
        "reached": True,
    }


def test_options_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Options(pairs=0)


def test_significant_digits() -> None:
    assert significant(123456.0) == 123500.0
    assert significant(0.00123456) == 0.001235


def test_the_command_names_what_there_is_and_refuses_what_there_is_not() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, str(root / "tests" / "bench" / "run.py")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, timeout=60, check=True)
    assert "store" in listed.stdout.split()
    refused = subprocess.run([*command, "nonsense"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "no benchmark 'nonsense'" in refused.stderr
