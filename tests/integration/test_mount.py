"""Unfinished artifacts through a real FUSE mount: readers, server and holder are processes, some of them killed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fal_contract.clock import SystemClock
from fal_fsd.mount import kernel
from fal_fsd.mount.keeper import Keeper
from fal_fsd.mount.probe import MODES, YES, probe
from mount_rig import Forks, Reader, Rig, rig

pytestmark = pytest.mark.root
PIECE = 1 << 16
SMALL: dict[str, Any] = {
    "files": [["a.bin", 5 * PIECE + 77], ["empty", 0], ["sub/deep/b.bin", 2 * PIECE], ["sub/c.json", 10]],
    "piece_bytes": PIECE,
    "seed": 1,
}
OTHER: dict[str, Any] = {"files": [["other.bin", 3 * PIECE]], "piece_bytes": PIECE, "seed": 2}


@pytest.fixture(autouse=True)
def _needs_fuse(tmp_path: Path) -> None:
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture
def made(forks: Forks, tmp_path: Path) -> Iterator[Rig]:
    """Serves `SMALL`, nothing of which is here, and `OTHER`."""
    with rig(forks, tmp_path, [SMALL, OTHER], read_timeout_s=60.0) as rig_:
        rig_.serve()
        assert rig_.do("open") == str(tmp_path / "mounts" / rig_.artifacts[0].id)
        yield rig_


def digest(data: bytes) -> list[Any]:
    return [hashlib.sha256(data).hexdigest(), len(data)]


def start_read(rig_: Rig, reader: Reader, file: str = "a.bin", offset: int = 0, size: int = 100) -> None:
    """Let it wait in a read; other readers that wait are counted by the caller."""
    fd = reader.do(open=rig_.path(file))
    reader.send({"read": [fd, offset, size]})


def test_tree_and_attributes(made: Rig) -> None:
    reader = made.reader()
    assert reader.do(list=made.path("")) == ["a.bin", "empty", "sub"]
    assert reader.do(list=made.path("sub")) == ["c.json", "deep"]
    assert reader.do(stat=made.path("a.bin")) == [stat.S_IFREG | 0o444, 5 * PIECE + 77]
    assert reader.do(stat=made.path("sub/deep"))[0] == stat.S_IFDIR | 0o555
    assert reader.do(read=[reader.do(open=made.path("empty")), 0, 100]) == digest(b"")
    assert reader.ask(open=made.path("absent")) == {"errno": errno.ENOENT}
    assert reader.ask(list=made.path("a.bin")) == {"errno": errno.ENOTDIR}
    fd = reader.do(open=made.path("a.bin"))
    assert reader.do(read=[fd, 6 * PIECE, 100]) == digest(b"")
    made.do("put", pieces=[5])
    assert reader.do(read=[fd, 5 * PIECE + 70, 4096]) == digest(made.content("a.bin")[5 * PIECE + 70 :])


def test_many_names_in_one_folder(forks: Forks, tmp_path: Path) -> None:
    names = [f"part-{n:04}-{'x' * 100}" for n in range(300)]
    spec = {"files": [[name, 1] for name in names], "piece_bytes": PIECE, "seed": 3}
    with rig(forks, tmp_path, [spec]) as rig_:
        rig_.serve()
        rig_.do("open")
        assert rig_.reader().do(list=rig_.path("")) == names


def test_random_reads_while_pieces_come_in_random_order(
    forks: Forks, tmp_path: Path, base_seed: int, scale: Callable[[int], int]
) -> None:
    rng = random.Random(base_seed)
    turns = scale(200)
    sizes = {"a": 40 * PIECE * (1 + turns // 40) + 1, "b/c": 20 * PIECE * (1 + turns // 40) - 1, "d": 7}
    spec = {"files": [[name, size] for name, size in sizes.items()], "piece_bytes": PIECE, "seed": base_seed}
    with rig(forks, tmp_path, [spec], read_timeout_s=60.0) as rig_:
        rig_.serve()
        rig_.do("open")
        layout = rig_.artifacts[0].layout
        contents = [rig_.content(file.path) for file in rig_.artifacts[0].files]
        readers = [rig_.reader() for _ in range(3)]
        fds = [[reader.do(open=rig_.path(file.path)) for file in rig_.artifacts[0].files] for reader in readers]
        here: set[int] = set()
        waited = 0
        for _ in range(turns):
            expected, missing = [], []
            for reader, of_reader in zip(readers, fds, strict=True):
                file = rng.randrange(len(contents))
                offset = rng.randrange(len(contents[file]) + 10)
                size = rng.choice((1, 100, PIECE - 1, PIECE, 3 * PIECE))
                reader.send({"read": [of_reader[file], offset, size]})
                expected.append(digest(contents[file][offset : offset + size]))
                missing.append(set(layout.covering(file, offset, size)) - here)
            rig_.do("until_waiting", count=sum(bool(pieces) for pieces in missing))
            waited += any(missing)
            wanted = sorted(set().union(*missing))
            assert rig_.wanted() >= set(wanted)
            rng.shuffle(wanted)
            for piece in wanted:
                rig_.do("put", pieces=[piece])
            here.update(wanted)
            assert [reader.answer()["result"] for reader in readers] == expected
        assert waited


def test_a_reader_in_order_is_read_ahead_of(made: Rig) -> None:
    reader = made.reader()
    fd = reader.do(open=made.path("a.bin"))
    reader.send({"read": [fd, 0, 10]})
    made.do("until_waiting", count=1)
    assert made.wanted() == {0, 1}
    made.do("put", pieces=[0, 1])
    reader.answer()
    reader.send({"read": [fd, PIECE, PIECE + 1]})
    made.do("until_waiting", count=1)
    assert made.wanted() >= {2, 3, 4}
    made.do("put", pieces=[2])
    reader.answer()
    reader.kill()
    made.do("until_unwanted", piece=4)  # who goes wants nothing any more
    assert made.wanted() <= {0, 1, 2}  # what is here is not worth a word


def test_a_killed_reader_goes_at_once(made: Rig) -> None:
    killed, other = made.reader(), made.reader()
    start_read(made, killed)
    start_read(made, other)
    made.do("until_waiting", count=2)
    killed.kill()  # waits for its end: a process in D would not end
    made.do("until_waiting", count=1)
    made.do("put", pieces=[0])
    assert other.answer()["result"] == digest(made.content("a.bin")[:100])


def test_signals_while_pieces_come(forks: Forks, tmp_path: Path, base_seed: int, scale: Callable[[int], int]) -> None:
    """Interrupts and arrivals race for the same reads; every read is answered once, and rightly."""
    rng = random.Random(base_seed)
    spec = {"files": [["a", scale(1000) * PIECE + 5]], "piece_bytes": PIECE, "seed": base_seed}
    with rig(forks, tmp_path, [spec], read_timeout_s=60.0) as rig_:
        rig_.serve()
        rig_.do("open")
        readers = [rig_.reader() for _ in range(2)]
        for reader in readers:
            reader.send({"whole": rig_.path("a")})
        for piece in range(rig_.artifacts[0].layout.count):
            for _ in range(rng.randrange(4)):
                os.kill(rng.choice(readers).pid, signal.SIGUSR1)
            rig_.do("put", pieces=[piece])
            os.kill(rng.choice(readers).pid, signal.SIGUSR1)
        expected = digest(rig_.content("a"))
        assert [reader.answer()["result"] for reader in readers] == [expected, expected]
        assert not [event for event in rig_.log() if event["level"] in ("error", "warning")]


def test_reads_end_by_themselves(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL], read_timeout_s=0.3) as rig_:
        rig_.serve()
        rig_.do("open")
        reader = rig_.reader()
        fd = reader.do(open=rig_.path("a.bin"))
        assert reader.ask(read=[fd, 2 * PIECE + 5, 100]) == {"errno": errno.EIO}
        (event,) = [event for event in rig_.log() if event["event"] == "read_ends_with_eio"]
        assert (event["artifact"], event["file"]) == (rig_.artifacts[0].id, "a.bin")
        assert (event["offset"], event["pieces"]) == (2 * PIECE + 5, [2])
        rig_.do("put", pieces=[2])
        assert reader.do(read=[fd, 2 * PIECE + 5, 100]) == digest(rig_.content("a.bin")[2 * PIECE + 5 :][:100])


def test_cancelled_reads_end_of_these_processes_only(made: Rig) -> None:
    cancelled, other = made.reader(), made.reader()
    start_read(made, cancelled)
    start_read(made, other)
    made.do("until_waiting", count=2)
    assert made.do("cancel", pids=[]) == 0
    assert made.do("cancel", pids=[cancelled.pid, os.getpid()]) == 1
    assert cancelled.answer() == {"errno": errno.EINTR}
    made.do("put", pieces=[0])
    assert other.answer()["result"] == digest(made.content("a.bin")[:100])


def test_a_failed_artifact_and_its_second_try(made: Rig) -> None:
    reader = made.reader()
    made.do("put", pieces=[0])
    start_read(made, reader, offset=PIECE)
    made.do("until_waiting", count=1)
    made.do("fail", reason="the origin has another file now")
    assert reader.answer() == {"errno": errno.EIO}
    assert any(event.get("why") == "the origin has another file now" for event in made.log())
    fd = reader.do(open=made.path("a.bin"))
    assert reader.ask(read=[fd, PIECE, 1]) == {"errno": errno.EIO}
    assert reader.do(read=[fd, 0, 50]) == digest(made.content("a.bin")[:50])
    made.do("open")
    reader.send({"read": [fd, PIECE, 1]})
    made.do("until_waiting", count=1)
    made.do("put", pieces=[1])
    assert reader.answer()["result"] == digest(made.content("a.bin")[PIECE : PIECE + 1])


def test_a_closed_mount_is_gone_and_open_files_read_on(made: Rig) -> None:
    open_one, waiting = made.reader(), made.reader()
    made.do("put", pieces=range_of(made, but=[3]))
    fd = open_one.do(open=made.path("a.bin"))
    start_read(made, waiting, offset=3 * PIECE)
    made.do("until_waiting", count=1)
    made.do("close")
    assert waiting.answer() == {"errno": errno.EIO}
    assert sorted(os.listdir(made.folder)) == ["holder.log", "holder.sock"]
    made.do("forget_part")
    assert open_one.do(read=[fd, 4 * PIECE, 100]) == digest(made.content("a.bin")[4 * PIECE :][:100])
    assert open_one.ask(read=[fd, 3 * PIECE, 100]) == {"errno": errno.EIO}
    assert made.status["lingering"] == 1
    waiting.kill()
    open_one.kill()
    made.do("until_lingering", count=0)


def range_of(rig_: Rig, *, but: list[int]) -> list[int]:
    return [piece for piece in range(rig_.artifacts[0].layout.count) if piece not in but]


@pytest.mark.parametrize("shared", [True, False])
def test_a_loader_maps_an_unfinished_file(forks: Forks, tmp_path: Path, shared: bool) -> None:
    spec = {"files": [["model.safetensors", 40 * PIECE + 123]], "piece_bytes": PIECE, "seed": 4}
    with rig(forks, tmp_path, [spec], read_timeout_s=60.0) as rig_:
        rig_.serve(give=True)  # pieces come when they are asked for
        rig_.do("open")
        reader = rig_.reader()
        found = reader.do(map=[rig_.path("model.safetensors"), shared])
        assert found == hashlib.sha256(rig_.content("model.safetensors")).hexdigest()


def test_a_mapping_of_what_never_comes_is_sigbus(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL], read_timeout_s=0.3) as rig_:
        rig_.serve()
        rig_.do("open")
        reader = rig_.reader()
        reader.send({"map": [rig_.path("a.bin"), False]})
        assert reader.process.wait(30) == -signal.SIGBUS


def test_without_shared_mappings(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL]) as rig_:
        rig_.serve(off=["allow_mmap"], give=True)
        assert rig_.status["modes"]["allow_mmap"] == "switched off"
        rig_.do("open")
        reader = rig_.reader()
        assert reader.ask(map=[rig_.path("a.bin"), True]) == {"errno": errno.ENODEV}
        assert reader.do(map=[rig_.path("a.bin"), False]) == hashlib.sha256(rig_.content("a.bin")).hexdigest()


def test_fsd_killed_three_times_under_a_reader(made: Rig) -> None:
    reader = made.reader()
    fd = reader.do(open=made.path("a.bin"))
    for piece in range(3):
        offset = piece * PIECE
        reader.send({"read": [fd, offset, PIECE]})
        made.do("until_waiting", count=1)
        made.server.kill()
        assert reader.silent()  # it waits, for a server that is not there
        made.serve()
        assert made.taken == [made.artifacts[0].id]
        made.do("until_waiting", count=1)  # the kernel has sent it again
        made.do("put", pieces=[piece])
        assert reader.answer()["result"] == digest(made.content("a.bin")[offset : offset + PIECE])
        # Another file, and another model.
        made.do("open", artifact=1)
        made.do("put", artifact=1, pieces=[piece])
        another = reader.do(open=made.path("other.bin", artifact=1))
        assert reader.do(read=[another, offset, PIECE]) == digest(made.content("other.bin", 1)[offset:][:PIECE])
        made.do("close", artifact=1)
    assert len({event["pid"] for event in made.log() if event["event"] == "holder_started"}) == 1


def test_a_closed_mount_that_is_open_survives_fsd(made: Rig) -> None:
    reader = made.reader()
    made.do("put", pieces=range_of(made, but=[]))
    fd = reader.do(open=made.path("a.bin"))
    made.do("close")
    made.server.kill()
    reader.send({"read": [fd, PIECE, 100]})
    made.serve(finished=[made.artifacts[0].id])
    assert made.taken == []
    assert made.status["lingering"] == 1
    assert reader.answer()["result"] == digest(made.content("a.bin")[PIECE:][:100])
    reader.kill()
    made.do("until_lingering", count=0)


def test_in_order_stop_keeps_mounts_for_the_next(made: Rig) -> None:
    reader = made.reader()
    start_read(made, reader)
    made.do("until_waiting", count=1)
    made.do("stop", keep=True)
    assert made.status["available"] == "it was stopped"
    made.server.kill()
    made.serve()
    made.do("put", pieces=[0])
    assert reader.answer()["result"] == digest(made.content("a.bin")[:100])


def test_without_resend_a_killed_fsd_ends_its_readers(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL], read_timeout_s=60.0) as rig_:
        rig_.serve(off=["resend"])
        rig_.do("open")
        reader = rig_.reader()
        start_read(rig_, reader)
        rig_.do("until_waiting", count=1)
        rig_.server.kill()
        rig_.serve(off=["resend"])
        assert rig_.taken == []
        assert reader.answer()["errno"] in (errno.ENOTCONN, errno.ECONNABORTED)
        rig_.do("open")  # mounted anew
        rig_.do("put", pieces=[0])
        fd = reader.do(open=rig_.path("a.bin"))
        assert reader.do(read=[fd, 0, 10]) == digest(rig_.content("a.bin")[:10])


def test_nobody_takes_over(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL], read_timeout_s=60.0, orphan_s=0.3) as rig_:
        rig_.serve()
        rig_.do("open")
        waiting, later = rig_.reader(), rig_.reader()
        fd = later.do(open=rig_.path("a.bin"))
        start_read(rig_, waiting)
        rig_.do("until_waiting", count=1)
        rig_.server.kill()
        assert waiting.answer() == {"errno": errno.EIO}  # taken by the dead one, sent again, ended by the holder
        assert later.ask(read=[fd, 0, 10]) == {"errno": errno.EIO}
        said = [event["event"] for event in rig_.holder_log()]
        assert said[-3:] == ["fsd_left", "orphaned", "refused"]
        rig_.serve()  # better late
        assert rig_.taken == [rig_.artifacts[0].id]
        rig_.do("put", pieces=[0])
        assert later.do(read=[fd, 0, 10]) == digest(rig_.content("a.bin")[:10])


def test_the_holder_ends_when_nobody_ever_comes(forks: Forks, tmp_path: Path) -> None:
    with rig(forks, tmp_path, [SMALL], read_timeout_s=60.0, orphan_s=0.1, keep_s=0.2) as rig_:
        rig_.serve()
        rig_.do("open")
        reader = rig_.reader()
        start_read(rig_, reader)
        rig_.do("until_waiting", count=1)
        fd = os.pidfd_open(rig_.status["holder"])
        try:
            rig_.server.kill()
            assert select.select([fd], [], [], 30)[0]
        finally:
            os.close(fd)
        assert reader.answer()["errno"] in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        rig_.serve()  # the dead mount in the way is no hindrance
        rig_.do("open")
        assert reader.do(list=rig_.path("")) == ["a.bin", "empty", "sub"]


def test_a_killed_holder_is_replaced_and_nobody_notices(made: Rig) -> None:
    reader = made.reader()
    start_read(made, reader)
    made.do("until_waiting", count=1)
    first = made.status["holder"]
    os.kill(first, signal.SIGKILL)
    made.do("until_held", not_pid=first)
    made.server.kill()  # the new holder has everything
    made.serve()
    assert made.taken == [made.artifacts[0].id]
    made.do("put", pieces=[0])
    assert reader.answer()["result"] == digest(made.content("a.bin")[:100])


def test_holder_and_fsd_killed_at_once(made: Rig) -> None:
    reader = made.reader()
    start_read(made, reader)
    made.do("until_waiting", count=1)
    os.kill(made.status["holder"], signal.SIGKILL)
    made.server.kill()
    assert reader.answer()["errno"] in (errno.ENOTCONN, errno.ECONNABORTED)
    made.serve()
    assert made.taken == []
    made.do("open")
    assert reader.do(list=made.path("sub")) == ["c.json", "deep"]


def test_an_aborted_connection_ends_its_readers_alone(made: Rig) -> None:
    made.do("open", artifact=1)
    aborted, other = made.reader(), made.reader()
    start_read(made, aborted)
    fd = other.do(open=made.path("other.bin", artifact=1))
    other.send({"read": [fd, 0, 100]})
    made.do("until_waiting", count=2)
    (found,) = [x for x in kernel.mounted_below(made.folder) if x.path.name == made.artifacts[0].id]
    assert kernel.abort(found.connection)
    assert aborted.answer()["errno"] in (errno.ENOTCONN, errno.ECONNABORTED)
    made.do("put", artifact=1, pieces=[0])
    assert other.answer()["result"] == digest(made.content("other.bin", 1)[:100])
    made.do("close")
    made.do("open")  # it can be had again
    assert aborted.do(stat=made.path("a.bin"))[1] == 5 * PIECE + 77


def test_many_readers(made: Rig, scale: Callable[[int], int]) -> None:
    readers = [made.reader() for _ in range(scale(80))]
    for number, reader in enumerate(readers):
        start_read(made, reader, offset=number % 5 * PIECE, size=PIECE)
    made.do("until_waiting", count=len(readers))
    threads = made.status["threads"]
    made.do("put", pieces=range_of(made, but=[]))
    for number, reader in enumerate(readers):
        offset = number % 5 * PIECE
        assert reader.answer()["result"] == digest(made.content("a.bin")[offset : offset + PIECE])
    assert made.status["threads"] == threads  # a wait costs none


def test_every_mode_can_be_switched_off(forks: Forks, tmp_path: Path) -> None:
    assert tuple(probe(tmp_path)) == MODES
    assert probe(tmp_path, off=MODES)["fuse"] == "switched off"
    assert list(tmp_path.iterdir()) == []
    with rig(forks, tmp_path, [SMALL]) as rig_:
        rig_.serve(off=["fuse"])
        assert rig_.status["available"] == "no FUSE here: switched off"
        with pytest.raises(AssertionError, match="unfinished models cannot be shown"):
            rig_.do("open")
        assert rig_.status["holder"] == 0


def test_the_holder_is_small_and_in_a_session_of_its_own(made: Rig) -> None:
    pid = made.status["holder"]
    assert os.getsid(pid) == pid
    resident_kib = int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])
    assert resident_kib < 24 << 10
    assert Keeper(made.folder, SystemClock()).held()[0].artifact_id == made.artifacts[0].id


def test_killing_all_of_fsds_cgroup_misses_the_holder(made: Rig) -> None:
    tree = Path("/sys/fs/cgroup")
    top = tree / "unified" if (tree / "unified").is_dir() else tree
    group = top / f"fmount-{os.getpid()}"
    group.mkdir()
    try:
        made.do("stop", keep=False)
        made.serve(cgroup=str(group))
        made.do("open")
        reader = made.reader()
        start_read(made, reader)
        made.do("until_waiting", count=1)
        in_it = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        assert made.server.pid in in_it
        assert made.status["holder"] not in in_it
        made.server.kill()
        made.serve()
        made.do("put", pieces=[0])
        assert reader.answer()["result"] == digest(made.content("a.bin")[:100])
    finally:
        made.clean()
        for path in (group, group.with_name(f"{group.name}-holder")):
            if path.exists():
                path.rmdir()


def test_a_look_below_a_mount_ends_the_serving_process(made: Rig) -> None:
    """The guard that all these tests run under works."""
    made.server.send({"op": "look"})
    with pytest.raises(AssertionError, match="it ended"):
        made.server.answer()
    assert "FORBIDDEN: stat of " in made.server.last_words()
