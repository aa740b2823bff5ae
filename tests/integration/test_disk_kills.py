"""A real process that brings artifacts in is killed at random moments: never a wrong byte, never a lost pin."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from disk_child import BATCH_BYTES, MODELS, files_of, uri_of
from disk_rig import artifact_of, bring, open_store, stage, tree_of
from fal_contract.errors import Code, FalError

TESTS = Path(__file__).parents[1]
PACKAGES = [str(TESTS.parent / name) for name in ("proto", "fsd")]


class Told:
    """What the child said before it died."""

    def __init__(self) -> None:
        self.pieces: dict[str, set[int]] = defaultdict(set)
        self.pins: dict[str, set[str]] = defaultdict(set)
        self.ready: set[str] = set()

    def hear(self, line: str) -> None:
        kind, artifact, *rest = line.split()
        if kind == "piece":
            self.pieces[artifact].add(int(rest[0]))
        elif kind == "pin":
            self.pins[artifact].add(rest[0])
        elif kind == "ready":
            self.ready.add(artifact)
        elif kind == "gone":  # from here on it may be pinned, ready or not
            self.pieces.pop(artifact, None)
            self.pins.pop(artifact, None)
            self.ready.discard(artifact)


@contextmanager
def nursery() -> Iterator[subprocess.Popen[str]]:
    """The process that forks the ones to be killed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*PACKAGES, str(TESTS)])}
    command = [sys.executable, str(TESTS / "disk_child.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def run_and_kill(process: subprocess.Popen[str], root: Path, seed: int, lines: int, told: Told) -> None:
    """Fork, kill after so many lines were said, and hear the rest of what had been said by then."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{root} {seed}\n")
    process.stdin.flush()
    pid, said = 0, 0
    for line in process.stdout:
        if line.startswith("pid "):
            pid = int(line.split()[1])
        elif line == "dead\n":
            assert pid
            assert said >= lines, "it died by itself"
            return
        else:
            told.hear(line)
            said += 1
        if pid and said >= lines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    raise AssertionError("the nursery died")


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """On tmpfs where there is one: a killed process leaves the same there, and syncs cost nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="falctl-test-", dir="/dev/shm") as name:
        yield Path(name)


def check(root: Path, told: Told) -> int:
    """Everything on disk is right; bytes that were counted before and are not here now."""
    again = 0
    store = open_store(root)
    try:
        for number in range(MODELS):
            artifact = artifact_of(files_of(number), uri=uri_of(number))
            owners = {x.id: set(x.pinned_by) for x in store.artifacts()}.get(artifact.id, set())
            assert told.pins[artifact.id] <= owners, "a pin was lost"
            path = store.path_of(artifact.id)
            if path is not None:
                assert tree_of(path) == files_of(number)
            else:
                assert artifact.id not in told.ready, "what was ready is not"
            if not owners:
                continue
            part = store.open_part(artifact, model="t/m")
            assert part.discarded == []
            assert artifact.hashes is not None
            for piece in part.have:
                assert part.read_digest(piece) == artifact.hashes[piece], "a wrong byte counts"
            again += sum(artifact.layout.length(x) for x in told.pieces[artifact.id] if not part.has(x))
            part.close()
    finally:
        store.close()
    return again


def test_killed_at_random_moments(memory_folder: Path, scale: Callable[[int], int], base_seed: int) -> None:
    rng, told, root = random.Random(base_seed), Told(), memory_folder / "s"
    with nursery() as process:
        for moment in range(scale(100)):
            seed = base_seed * 1000 + moment
            run_and_kill(process, root, seed, rng.randrange(1, 90), told)
            again = check(root, told)
            assert again <= BATCH_BYTES, f"seed {seed}: {again} bytes to be fetched again"
            told.pieces.clear()
    store = open_store(root)
    for number in range(MODELS):
        artifact = artifact_of(files_of(number), uri=uri_of(number))
        part = store.open_part(artifact, model="t/m", owner="end")
        bring(part, files_of(number))
        assert tree_of(store.finish(artifact.id)) == files_of(number)
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 6 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], check=True, timeout=30)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


@pytest.mark.root
def test_a_real_full_disk(small_disk: Path) -> None:
    """A clear error, nothing counted that is not there, and it goes on when there is room."""
    store = open_store(small_disk / "s")
    files = {"x": random.Random(1).randbytes(3 << 20)}
    artifact = artifact_of(files)
    part = store.open_part(artifact, model="t/m", owner="r")
    (small_disk / "others").write_bytes(bytes(4 << 20))
    with pytest.raises(FalError) as raised:
        bring(part, files)
    assert raised.value.code == Code.NO_CAPACITY
    assert 0 < len(part.have) < artifact.layout.count
    with pytest.raises(FalError) as raised:
        store.open_part(artifact_of({"y": bytes(4 << 20)}, uri="s3://y"), model="t/y")
    assert raised.value.code == Code.NO_CAPACITY
    (small_disk / "others").unlink()
    with suppress(FalError):  # a sync that failed says so once
        bring(part, files)
    bring(part, files)
    assert tree_of(store.finish(artifact.id)) == files
    store.close()


@pytest.mark.root
def test_a_full_disk_is_emptied_for_what_comes(small_disk: Path) -> None:
    """Without a quota the disk is the bound: what is worth least goes from it at once."""
    store = open_store(small_disk / "s")
    made = [stage(store, {"x": random.Random(n).randbytes(2 << 20)}, uri=f"s3://b/{n}") for n in range(4)]
    assert [x.ready for x in store.artifacts()].count(True) <= 2
    assert store.path_of(made[-1].id) is not None
    assert store.room().bytes_used <= 4 << 20
    store.close()
