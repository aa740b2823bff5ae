"""The decision log: what its codec keeps, what a snapshot keeps, what files do when they tear, fill up or grow old."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core_world import CountingIds, World, random_step
from decision_rig import RecordedCore, recorded_world, replay_folder
from fal_contract.errors import Code, FalError
from fal_contract.limits import DECISION_LOG_AGE_MAX_S
from fal_scheduler import decision_files, decision_log
from fal_scheduler.core import log_codec, snapshot
from fal_scheduler.core.events import Moment, NodeReport, Outcome, RedeemToken, ScaleApp, Tick
from fal_scheduler.core.log_codec import Packer, UnknownType, Unpacker
from fal_scheduler.core.log_entries import Beats, Ended, Stepped, Whole
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Goal, Pool, ScaleOverride
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.core.told import Health
from fal_scheduler.decision_files import Segment, segments
from fal_scheduler.decision_log import DecisionLog

WALL_S = 1_700_000_000.0


def back(value: object) -> Any:
    (read,) = Unpacker().unpack(Packer().pack((value,)))
    return read[0]


# --- codec


@pytest.mark.parametrize(
    "value",
    [
        (), (1,), ((1, 2), [3, (4,)]), [], {}, {("a", 1): {"b": None}}, {1: 2.5, "x": b"\x00"},
        2**64 - 1, -(2**63), 0.1 + 0.2,
        float("inf"), "\udcff", frozenset({"a"}), deque([1, (2,)], maxlen=4), Goal.DRAIN, Health.LOST,
        Pool("p", labels={"a": "b"}), (Pool("p"), Goal.RUN),
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_as_they_were(value: object) -> None:
    read = back(value)
    assert read == value
    assert type(read) is type(value)
    if isinstance(value, deque):
        assert read.maxlen == value.maxlen


def test_order_of_a_dict_is_kept() -> None:
    assert list(back({"z": 1, "a": 2, ("m", 0): 3})) == ["z", "a", ("m", 0)]


def test_arrays_come_back_and_can_be_written() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    read = back(array)
    assert (read == array).all()
    assert read.dtype == array.dtype
    read[0, 0] = 7


class _Stranger:
    pass


@pytest.mark.parametrize("value", [{1, 2}, _Stranger(), np.int64(3), object()], ids=lambda value: type(value).__name__)
def test_what_has_no_order_or_name_is_refused(value: object) -> None:
    with pytest.raises(UnknownType, match=type(value).__name__):
        Packer().pack(("x", [value]))


@dataclass(frozen=True)
class _Old:
    id: str
    gone: int = 0


@dataclass(frozen=True)
class _New:
    id: str
    more: str = "by default"


@dataclass(frozen=True)
class _Demanding:
    id: str
    must: str


OLD = log_codec.name_of(_Old)


class _Word(StrEnum):
    A = "a"


class _Number(IntEnum):
    ONE = 1


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Names of classes as this release knows them; a test changes what stands behind a name."""
    known: dict[str, type] = {log_codec.name_of(one): one for one in (_Old, _Word, _Number)}
    monkeypatch.setattr(log_codec, "known_classes", lambda: known)
    return known


def test_a_field_that_was_added_takes_its_default(classes: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packer().pack(_Old("a"))
    monkeypatch.setattr(log_codec, "RENAMED", {OLD: "_New"})
    monkeypatch.setattr(log_codec, "DROPPED", {"_New": frozenset({"gone"})})
    classes["_New"] = _New
    assert list(Unpacker().unpack(packed)) == [_New("a")]


def test_a_class_that_is_not_known_names_the_release(classes: dict[str, type]) -> None:
    packed = Packer().pack(_Old("a"))
    del classes[OLD]
    with pytest.raises(FalError, match=r"_Old.*release 7\.1") as caught:
        list(Unpacker(release="release 7.1").unpack(packed))
    assert caught.value.code is Code.VERSION_MISMATCH


@pytest.mark.parametrize(("now", "word"), [(_New, "gone"), (_Demanding, "gone|must")])
def test_a_field_that_is_not_known_or_missing_is_named(classes: dict[str, type], now: type, word: str) -> None:
    packed = Packer().pack(_Old("a"))
    classes[OLD] = now
    with pytest.raises(FalError, match=word) as caught:
        list(Unpacker().unpack(packed))
    assert caught.value.code is Code.VERSION_MISMATCH


def test_a_class_may_move_to_another_module_and_two_may_have_one_name(classes: dict[str, type]) -> None:
    packed = Packer().pack((_Old("a"), _Word.A))
    del classes[OLD]
    classes["_Old"] = _Old  # as it is listed where no other class has its name
    assert list(Unpacker().unpack(packed)) == [(_Old("a"), _Word.A)]
    assert list(Unpacker().unpack(Packer().pack(_Number.ONE))) == [_Number.ONE]


def test_bytes_that_are_no_values_are_corrupt() -> None:
    with pytest.raises(FalError) as caught:
        list(Unpacker().unpack(b"\xc1\xff\x00"))
    assert caught.value.code is Code.CORRUPT


# --- snapshot


@pytest.fixture(scope="module")
def lived() -> World:
    """A world after a long random history."""
    world = World(Random(3))
    for _ in range(400):
        random_step(world)
    return world


def test_everything_in_a_state_can_be_logged(lived: World) -> None:
    """Fails, naming the attribute, where somebody adds a table that the codec cannot write."""
    try:
        snapshot.check(lived.state)
    except UnknownType as error:
        pytest.fail(
            f"{error}\nKeep what State holds to dataclasses, enums and plain classes of fal_scheduler.core, tuples, "
            f"lists, dicts, deques and numpy arrays: `falctl sim replay` begins with a snapshot of it."
        )


def test_a_state_brought_back_is_the_same(lived: World) -> None:
    restored = snapshot.restore(back(snapshot.take(lived.state)))
    differing = snapshot.differences(lived.state, restored)
    assert not differing, (
        f"{differing} differ after a snapshot. A table of State must survive `core.log_codec`; a column of Fleet must "
        f"follow from facts and occupancy in `Fleet._rebuild`, or stand in `snapshot.FLEET_KEPT`."
    )


def test_a_difference_is_named(lived: World) -> None:
    restored = snapshot.restore(back(snapshot.take(lived.state)))
    restored.stall_total_s += 1.0
    restored.asked["default/other"] = None
    assert sorted(snapshot.differences(lived.state, restored)) == ["asked", "stall_total_s"]


def test_a_table_that_is_not_known_is_told() -> None:
    taken = back(snapshot.take(State()))
    with pytest.raises(FalError, match="moods") as caught:
        snapshot.restore({**taken, "moods": {}})
    assert caught.value.code is Code.VERSION_MISMATCH


def test_a_table_that_an_older_log_lacks_begins_empty() -> None:
    taken = back(snapshot.take(State()))
    del taken["build_failures"]
    assert snapshot.restore(taken).build_failures == {}


# --- files


def entries_of(folder: Path) -> list[Any]:
    return [entry for segment in segments(folder) for entry in segment.entries()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[tuple[DecisionLog, State]]:
    log = DecisionLog(tmp_path, cluster_id="c1", wall_s=WALL_S)
    state = State()
    log.began(state, None)
    yield log, state
    log.close()


def tick(log: DecisionLog, now_s: float, *, changes: tuple[Any, ...] = ()) -> None:
    log.stepped(Tick(), Moment(now_s, WALL_S + now_s), (), Outcome(changes))


def test_a_torn_end_loses_the_last_block_only(log: tuple[DecisionLog, State], tmp_path: Path) -> None:
    for second in range(20):
        tick(log[0], float(second))
    log[0].close()
    whole = len(entries_of(tmp_path))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    segment = Segment(path)
    read = list(segment.entries())
    assert segment.torn
    assert 0 < len(read) < whole
    path.write_bytes(data[:-3] + b"xyz")  # as long as it was, but not what it was
    segment = Segment(path)
    assert list(segment.entries())[1:] == read[1:]
    assert segment.torn
    assert replay_folder(tmp_path).runs[0].view["torn"] is True


def test_heartbeats_that_change_nothing_are_gathered(log: tuple[DecisionLog, State], tmp_path: Path) -> None:
    for second in range(5):
        for node in ("n-1", "n-2"):
            moment = Moment(float(second), WALL_S)
            log[0].stepped(NodeReport(node, f"s-{node}", second + 0.5, tunnels=()), moment, (), Outcome())
    tick(log[0], 5.0)
    log[0].close()
    told = entries_of(tmp_path)[1:]
    assert [type(entry) for entry in told] == [Beats, Stepped, Ended]
    assert told[0] == Beats((("n-1", "s-n-1", 4.5), ("n-2", "s-n-2", 4.5)))


def test_a_heartbeat_while_work_is_left_is_a_step(log: tuple[DecisionLog, State], tmp_path: Path) -> None:
    log[1].dirty["default/a"] = None
    tick(log[0], 1.0)
    log[0].stepped(NodeReport("n-1", "s", 1.5), Moment(1.5, WALL_S), (), Outcome())
    log[0].close()
    assert [type(entry) for entry in entries_of(tmp_path)] == [Whole, Stepped, Stepped, Ended]


def test_files_are_for_their_owner_only_and_hold_no_join_secret(tmp_path: Path) -> None:
    world = recorded_world(4, tmp_path / "log", steps=0)
    log = DecisionLog(tmp_path / "log", cluster_id="c1", wall_s=WALL_S)
    world.core = RecordedCore(world.core, log)
    for secret in ("secret", "a guess"):
        world.step(RedeemToken("t-east", secret, f"n-{secret}", f"m-{secret}"))
    world.step(RedeemToken("t-nowhere", "secret", "n-9", "m-9"))
    log.close()
    told = [entry for entry in entries_of(tmp_path / "log") if isinstance(entry, Stepped)]
    assert [entry.event.secret for entry in told if isinstance(entry.event, RedeemToken)] == ["right", "wrong", "wrong"]
    assert [bool(entry.error) for entry in told] == [False, True, True]
    assert replay_folder(tmp_path / "log").same
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "log").iterdir())


def test_a_full_segment_is_followed_by_another_that_begins_with_everything(tmp_path: Path) -> None:
    recorded_world(5, tmp_path, steps=150, segment_bytes_max=2_000, block_bytes=1_000)
    found = segments(tmp_path)
    assert len(found) > 1
    assert [one.header.segment for one in found] == list(range(len(found)))
    assert all(isinstance(next(one.entries()), Whole) for one in found)
    assert replay_folder(tmp_path).same
    found[0].path.unlink()  # pruned
    report = replay_folder(tmp_path)
    assert report.same
    assert len(report.runs) == len(found) - 1


def test_old_and_surplus_segments_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, (size, age_s) in enumerate(((10, DECISION_LOG_AGE_MAX_S + 5.0), (600, 30.0), (300, 20.0), (50, 10.0))):
        path = tmp_path / f"decisions-e0001-t{at:010d}-0000.log"
        path.write_bytes(bytes(size))
        os.utime(path, (WALL_S - age_s, WALL_S - age_s))
    monkeypatch.setattr(decision_files, "DECISION_LOG_BYTES_MAX", 500)
    decision_files.prune(tmp_path, now_wall_s=WALL_S, reserve_bytes=100)
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == [300, 50]


def test_a_disk_that_refuses_is_told_once_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(decision_log, "_log", SimpleNamespace(warning=lambda text, **_: told.append(text)))
    blocked = tmp_path / "decisions"
    blocked.write_text("a file where the folder should be")
    log = DecisionLog(blocked, cluster_id="c1", wall_s=WALL_S)
    log.began(State(), None)
    assert log.wait_for_disk(10.0)
    for second in range(1, 200):
        tick(log, float(second))
    assert log.failures == 1
    assert told == ["decision log not written"]
    blocked.unlink()
    for second in range(1000, 1010):
        tick(log, float(second))
    log.close()
    (segment,) = segments(blocked)
    read = list(segment.entries())
    assert [type(entry) for entry in read] == [Whole, *(9 * [Stepped]), Ended]
    assert segment.header.first > 1


def test_what_cannot_be_written_is_no_error_for_the_engine(log: tuple[DecisionLog, State], tmp_path: Path) -> None:
    log[0].stepped(ScaleApp("default/a", ScaleOverride(2**70)), Moment(1.0, WALL_S), (), Outcome())
    tick(log[0], 2.0)
    assert log[0].failures == 1


def test_no_log_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(FalError, match="no decision log"):
        segments(tmp_path)
    with pytest.raises(FalError, match="cannot be read"):
        segments(tmp_path / "nowhere.log")
    (tmp_path / "x.log").write_text("something else")
    with pytest.raises(FalError, match="is no decision log"):
        segments(tmp_path / "x.log")


@pytest.mark.parametrize(
    "left", [b"", b"falctl dec", b'falctl decisions 1\n{"cluster_id"'], ids=("nothing", "half", "most")
)
def test_a_file_that_a_crash_left_without_a_header_is_passed_over(
    left: bytes, log: tuple[DecisionLog, State], tmp_path: Path
) -> None:
    log[0].close()
    (tmp_path / "decisions-e0009-t0000000009-0000.log").write_bytes(left)
    assert len(segments(tmp_path)) == 1


def test_a_newer_format_is_told(log: tuple[DecisionLog, State], tmp_path: Path) -> None:
    log[0].close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(FalError, match="format 9") as caught:
        Segment(path)
    assert caught.value.code is Code.VERSION_MISMATCH


def test_a_restored_state_decides_as_the_first(lived: World) -> None:
    """Both go on with the same events."""
    restored = snapshot.restore(back(snapshot.take(lived.state)))
    first = snapshot.restore(back(snapshot.take(lived.state)))
    cores = [Core(state, Placer(state.fleet), CountingIds()) for state in (first, restored)]
    for at in range(5):
        outcomes = [core.step(Tick(), Moment(lived.now_s + at, lived.wall_s + at)) for core in cores]
        assert replace(outcomes[0]) == outcomes[1]
    assert not snapshot.differences(first, restored)
