"""The event log over restarts: what happened before is read back, torn lines and full files are no trouble."""

from __future__ import annotations

from pathlib import Path

import pytest

from fal_scheduler import event_log
from fal_scheduler.core.events import Logged
from fal_scheduler.event_log import EventLog


def event(number: int) -> Logged:
    return Logged("RUNNER_PLACED", f"default/a-{number}", "on node n1", 1.5, actor="ann", facts={"node": "n1"})


def test_events_of_an_earlier_start_are_read_back_with_their_numbers(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    written = [log.append(event(number)) for number in range(3)]
    log.flush()  # and no close: as after SIGKILL
    again = EventLog(tmp_path)
    assert again.since(0) == written
    assert again.append(event(9)).number == 4
    assert [each.number for each in again.since(2)] == [3, 4]
    for each in (log, again):
        each.close()


def test_a_torn_line_and_strange_ones_are_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    kept = log.append(event(1))
    log.close()
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'[]\n{"number": 7}\n{"number": "x", "facts": 3}\n{"number": 2, "kind": "RUN')
    again = EventLog(tmp_path)
    assert again.since(0) == [kept]
    assert again.last_number == 1
    more = again.append(event(2))
    again.close()
    third = EventLog(tmp_path)
    assert third.since(0) == [kept, more]
    third.close()


def test_events_of_the_file_before_are_read_back_too(tmp_path: Path) -> None:
    log = EventLog(tmp_path, file_bytes_max=300)
    for number in range(6):
        log.append(event(number))
    log.close()
    assert (tmp_path / "events.jsonl.1").exists()
    again = EventLog(tmp_path)
    assert again.last_number == 6
    assert [each.number for each in again.since(0)] == list(range(again.since(0)[0].number, 7))
    again.close()


def test_the_newest_of_a_kind_and_subject_is_found_until_the_ring_lets_go_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "RING_EVENTS_MAX", 4)
    log = EventLog(tmp_path)
    log.append(event(1))
    newest = log.append(event(1))
    assert log.latest("RUNNER_PLACED", "default/a-1") == newest
    assert log.latest("RUNNER_READY", "default/a-1") is None
    for number in (2, 3, 4):
        log.append(event(number))
    assert log.latest("RUNNER_PLACED", "default/a-1") == newest, "its predecessor left, it did not"
    log.append(event(5))
    assert log.latest("RUNNER_PLACED", "default/a-1") is None
    assert [each.number for each in log.since(0)] == [3, 4, 5, 6]
    assert log.since(4, subject="default/a-5") == log.since(5)
    log.close()
    again = EventLog(tmp_path)
    assert [each.number for each in again.since(0)] == [3, 4, 5, 6]
    assert again.latest("RUNNER_PLACED", "default/a-5") == again.since(5)[0]
    again.close()
