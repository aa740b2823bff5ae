"""The forecast on traces: what it counts, what it foretells, what it saves; wrong files are refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_scheduler.core.forecast import BINS, MICRO, Arrivals
from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.forecast import Request, errors_of, outcomes_of

DAY_S = 86_400
START_S = 20_000 * DAY_S
TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gentd26" / "requests_nov.csv"


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 50)), max_size=30))
def test_it_never_foretells_less_than_none_nor_more_than_came(steps: list[tuple[int, int]]) -> None:
    arrivals, now_s, most = Arrivals(), START_S, 0
    for pause_s, count in steps:
        now_s += pause_s
        arrivals.note(count, now_s)
        most += count
        assert 0 <= arrivals.rate_at(now_s) <= most * MICRO
    assert arrivals.total == most
    arrivals.advance(now_s + 30 * DAY_S)
    assert arrivals.rate == 0
    assert arrivals.expected(now_s, 0.0) == 0


def test_a_steady_rate_is_foretold_within_a_tenth_and_forgotten_when_it_ends() -> None:
    arrivals = Arrivals()
    for second in range(0, 4 * 3600, 20):
        arrivals.note(1, START_S + second)
    assert arrivals.expected(START_S + 4 * 3600, 600.0) == pytest.approx(30 * MICRO, rel=0.1)
    arrivals.advance(START_S + 8 * 3600)
    assert arrivals.expected(START_S + 8 * 3600, 600.0) < MICRO


def test_the_hour_of_the_day_is_learnt() -> None:
    arrivals = Arrivals()
    for day in range(3):
        for minute in range(60):
            arrivals.note(5, START_S + day * DAY_S + 9 * 3600 + minute * 60)
    night_s = START_S + 3 * DAY_S + 3 * 3600
    arrivals.advance(night_s)
    assert arrivals.bins_seen >= BINS
    assert arrivals.rate_at(night_s) == 0
    assert arrivals.rate_at(START_S + 3 * DAY_S + 9 * 3600 + 1800) >= MICRO


def test_a_clock_that_goes_back_changes_nothing() -> None:
    arrivals = Arrivals()
    arrivals.note(3, START_S + 7200)
    arrivals.note(2, START_S)
    assert (arrivals.total, arrivals.in_minute) == (5, 5)


def test_errors_and_savings_of_a_regular_trace() -> None:
    requests = [Request(START_S + at * 120.0, "a", 5.0) for at in range(2000)]
    errors = {one.forecast: one for one in errors_of(requests)}
    assert errors["ours"].mean_absolute < errors["none come"].mean_absolute
    assert errors["ours"].mean_absolute < 1.0
    alone, *forecasts = outcomes_of(requests, 30.0, [60.0])
    assert alone.cold_starts == len(requests), "each finds the runner gone"
    assert alone.gpu_seconds == len(requests) * (30 + 5 + 60)
    by_worth = {one.worth: one for one in forecasts}
    assert by_worth[0.2].cold_starts < 10, "0.25 requests are expected while a runner starts"
    assert by_worth[0.5].cold_starts >= len(requests) - 2
    assert by_worth[0.2].gpu_seconds >= alone.gpu_seconds
    assert by_worth[0.2].keep_alive_alone_gpu_seconds == pytest.approx(2000 * 120, rel=0.05)


def test_the_verb_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.csv"
    head = "gmt_create,checkpoint_model_version_id,exec_time_seconds\n"
    file.write_text(head + "".join(f"2024-11-15 10:{at:02}:00,M1,3\n" for at in range(0, 60, 2)))
    assert main(["forecast", "--trace", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["forecast"]
    assert told["requests"] == 30
    assert {one["keep_alive_s"] for one in told["served"]} == {60.0, 300.0}
    assert main(["forecast", "--trace", str(file), "--keep-alive", "90"]) == 0
    assert "as in the last 15 minutes" in capsys.readouterr().out
    wrong = [
        (head + "yesterday,M1,3\n", "line 2"),
        (head + "2024-11-15 10:00:00\n", "line 2: it is too short"),
        (head + "2024-11-15 10:00:00,M1,-3\n", "line 2: '-3'"),
        (head + "2024-11-15 10:00:00,M1,nan\n", "line 2: 'nan'"),
        (head, "no request"),
        ("", "no request"),
        ("a,b\n1,2\n", "has no column 'gmt_create'"),
    ]
    for text, words in wrong:
        file.write_text(text)
        assert main(["forecast", "--trace", str(file)]) == 1
        assert words in capsys.readouterr().err
    for option, value in (("--keep-alive", "nan"), ("--start-s", "0")):
        assert main(["forecast", "--trace", str(file), option, value]) == 1
        assert f"{option} = {float(value)} is out of bounds" in capsys.readouterr().err
    assert main(["forecast", "--trace", str(tmp_path / "none.csv")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_production_trace_is_foretold_better_than_by_the_last_value(capsys: pytest.CaptureFixture[str]) -> None:
    if not TRACE.exists():
        pytest.skip(f"{TRACE} is not here")
    assert main(["forecast", "--trace", str(TRACE), "--keep-alive", "60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["forecast"]
    errors = {one["forecast"]: one["root_mean_square"] for one in told["errors"]}
    assert errors["ours"] < min(errors["as in the last 15 minutes"], errors["mean so far"], errors["none come"])
    ours = next(one for one in told["served"] if one["worth"] == 0.2)
    assert ours["avoided_perc"] > 10
    assert ours["gpu_seconds"] < ours["keep_alive_alone_gpu_seconds"]
