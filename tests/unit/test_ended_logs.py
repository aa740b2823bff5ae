"""Output of removed containers: what is kept, and that it never grows without bound."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fal_runtime.ended_logs import EndedLogs


def written(folder: Path, size: int, older: int = 0) -> Path:
    """A container's log of so many bytes, and an older part."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    log.write_bytes(b"x" * size)
    if older:
        (folder / "log.1").write_bytes(b"y" * older)
    return log


def test_a_log_is_moved_with_its_older_part(tmp_path: Path) -> None:
    ended = EndedLogs(tmp_path)
    log = written(tmp_path / "c", 10, older=20)
    ended.keep("a", log, 100.0)
    found = ended.find("a")
    assert found is not None
    assert (found.stat().st_size, found.with_name("log.1").stat().st_size) == (10, 20)
    assert not log.exists()
    ended.keep("a", written(tmp_path / "c", 3), 101.0)
    assert found.stat().st_size == 3, "a later life of the same id takes its place"
    assert not found.with_name("log.1").exists()
    assert ended.find("../ended/a") is None
    ended.clear()
    assert ended.find("a") is None


def test_nothing_is_kept_of_the_silent(tmp_path: Path) -> None:
    ended = EndedLogs(tmp_path)
    ended.keep("a", written(tmp_path / "c", 0), 1.0)
    ended.keep("b", tmp_path / "none" / "log", 1.0)
    assert not (tmp_path / "ended").exists()
    ended.keep("c", written(tmp_path / "c", 0, older=5), 1.0)
    assert ended.find("c") is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 60)), min_size=1, max_size=12))
def test_the_oldest_go_first_and_the_newest_stays(tmp_path_factory, logs: list[tuple[int, int]]) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("ended")
    ended, now_s = EndedLogs(root, bytes_max=500, age_max_s=100.0), 1000.0
    kept: list[tuple[int, float]] = []
    for number, (size, wait_s) in enumerate(logs):
        now_s += 1 + wait_s
        ended.keep(f"c{number}", written(root / "c", size), now_s)
        kept.append((size, now_s))
        there = [ended.find(f"c{n}") is not None for n in range(len(kept))]
        assert there[-1]
        total = 0
        for n in reversed(range(len(kept))):
            total += kept[n][0]
            fits = n == len(kept) - 1 or total <= 500
            assert there[n] == (fits and now_s - kept[n][1] <= 100.0), (n, kept, there)
