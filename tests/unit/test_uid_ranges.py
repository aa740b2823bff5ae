"""User id ranges: never shared, found again after a restart, free again when the container is gone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_runtime.uid_ranges import FIRST_ID, RANGE_IDS, RANGES_MAX, UidRanges


def container(tmp_path: Path, name: str) -> Path:
    directory = tmp_path / "containers" / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def test_ranges_are_kept_and_released(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    one, two = container(tmp_path, "one"), container(tmp_path, "two")
    first, second = UidRanges(path).allocate(one), UidRanges(path).allocate(two)
    assert (first, second) == (FIRST_ID, FIRST_ID + RANGE_IDS)
    again = UidRanges(path)
    assert again.allocate(one) == first
    again.release(one)
    again.release(one)
    assert again.owners() == {second: str(two)}
    assert again.allocate(container(tmp_path, "three")) == first


def test_a_range_whose_container_vanished_is_free(tmp_path: Path) -> None:
    ranges = UidRanges(tmp_path / "ranges.json")
    gone = container(tmp_path, "gone")
    first = ranges.allocate(gone)
    gone.rmdir()
    assert ranges.allocate(container(tmp_path, "next")) == first


def test_all_taken_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    here = container(tmp_path, "here")
    full = {FIRST_ID + n * RANGE_IDS: str(here.parent) for n in range(RANGES_MAX)}
    path.write_text(json.dumps(full))
    with pytest.raises(FalError) as caught:
        UidRanges(path).allocate(here)
    assert caught.value.code is Code.NO_CAPACITY


def test_a_corrupt_journal_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text('{"18790')
    with pytest.raises(FalError) as caught:
        UidRanges(path).allocate(container(tmp_path, "one"))
    assert caught.value.code is Code.CORRUPT
    assert path.read_text() == '{"18790'


def test_the_highest_id_fits_31_bits() -> None:
    assert FIRST_ID + RANGES_MAX * RANGE_IDS == 1 << 31


def test_agents_of_one_machine_never_share(tmp_path: Path) -> None:
    groups = [[container(tmp_path, f"{agent}-{n}") for n in range(25)] for agent in range(3)]

    def allocate(group: list[Path]) -> list[int]:
        ranges = UidRanges(tmp_path / "ranges.json")  # locks are per open file: threads stand for processes
        return [ranges.allocate(directory) for directory in group]

    with ThreadPoolExecutor(3) as pool:
        starts = [start for group in pool.map(allocate, groups) for start in group]
    assert len(set(starts)) == 75


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_no_two_live_containers_share(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[bool, int]]) -> None:
    tmp_path = tmp_path_factory.mktemp("ranges")
    live: dict[int, int] = {}
    for allocate, number in moves:
        ranges = UidRanges(tmp_path / "ranges.json")  # a new object each time, as after restarts
        directory = container(tmp_path, str(number))
        if allocate:
            start = ranges.allocate(directory)
            assert live.setdefault(number, start) == start
        else:
            ranges.release(directory)
            live.pop(number, None)
        assert len(set(live.values())) == len(live)
        assert sorted(ranges.owners()) == sorted(live.values())
