"""`falctl sim warm`: each policy on a trace by hand, on the real one, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.forecast import Request, read
from fal_scheduler.sim.warm import Outcome, Rates, outcomes_of, size_of

TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gentd26" / "requests_nov.csv"
GIB = 1 << 30
RATES = Rates(disk_bytes_s=GIB, origin_bytes_s=GIB // 10)


def apps_of(gib: int, count: int) -> list[str]:
    """Names of models of this size."""
    return [name for at in range(1000) if size_of(name := f"M{at}") == gib * GIB][:count]


def by_policy(found: list[Outcome]) -> dict[str, Outcome]:
    return {one.policy: one for one in found}


def test_a_favourite_stays_in_memory_though_others_come_between() -> None:
    favourite, *others = apps_of(4, 9)
    requests: list[Request] = []
    for minute in range(0, 600, 5):
        requests.append(Request(minute * 60.0, favourite, 1.0))
        requests.append(Request(minute * 60.0 + 120.0, others[minute // 5 % 8], 1.0))
        requests.append(Request(minute * 60.0 + 180.0, others[(minute // 5 + 4) % 8], 1.0))
    found = by_policy(outcomes_of(requests, [(4, 400)], RATES, 30.0))
    assert {one.cold_starts for one in found.values()} == {len(requests)}
    assert found["nothing"].seconds == pytest.approx(40.0 * len(requests))
    lru, ours = found["lru"], found["value"]
    assert lru.from_memory == 0
    assert ours.from_memory > 100  # of 120
    assert ours.seconds < lru.seconds < found["nothing"].seconds
    assert 0 < ours.saved_perc < 100
    assert ours.changes <= 10


def test_the_least_valuable_goes_from_a_full_disk() -> None:
    favourite, *others = apps_of(4, 13)
    requests: list[Request] = []
    for round_ in range(60):  # between two requests for the favourite come twice as many as the disk holds
        requests.append(Request(round_ * 600.0, favourite, 1.0))
        requests += [Request(round_ * 600.0 + 40 * at, others[(round_ * 8 + at) % 12], 1.0) for at in range(1, 9)]
    found = by_policy(outcomes_of(requests, [(0, 16)], RATES, 30.0))
    assert found["lru"].from_disk == 0
    assert found["value"].from_disk > 40
    assert found["value"].from_memory == found["lru"].from_memory == 0


@pytest.mark.skipif(not TRACE.is_file(), reason=f"the GenTD26 trace is not at {TRACE}")
def test_on_the_real_trace_value_saves_more_than_lru() -> None:
    requests = read(TRACE, "gmt_create", "checkpoint_model_version_id", "exec_time_seconds")
    three_days = [one for one in requests if one.at_s < requests[0].at_s + 3 * 86_400]
    found = by_policy(outcomes_of(three_days, [(16, 64)], Rates(10**9, 10**8), 60.0))
    assert found["nothing"].saved_perc == 0
    assert found["value"].saved_perc > found["lru"].saved_perc > 20
    assert found["value"].from_memory > found["lru"].from_memory


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("gmt_create,checkpoint_model_version_id,exec_time_seconds", *lines)) + "\n")
    return path


def test_the_verb_prints_one_object_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t.csv", "2024-11-15 10:00:00,M0,4.0", "2024-11-15 11:00:00,M0,4.0")
    assert main(["warm", "--trace", str(trace), "--budget", "32:64", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)["warm"]
    assert told["requests"] == 2
    assert [one["policy"] for one in told["outcomes"]] == ["nothing", "lru", "value", "value, ahead"]
    assert main(["warm", "--trace", str(trace)]) == 0
    assert "2 of them cold starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--budget", "x"], "--budget"),
        (["--budget", "3"], "MEMORY:DISK"),
        (["--disk-gb-s", "0"], "--disk-gb-s"),
        (["--origin-gb-s", "nan"], "--origin-gb-s"),
        (["--keep-alive", "-1"], "--keep-alive"),
    ],
)
def test_wrong_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    trace = write(tmp_path / "t.csv", "2024-11-15 10:00:00,M0,4.0")
    assert main(["warm", "--trace", str(trace), *words]) == 1
    assert named in capsys.readouterr().err
