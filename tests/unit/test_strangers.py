"""Folders that strangers filled: no depth and no name keeps us from seeing, refusing and removing what is there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent_fakes import Box, assignment
from fal_agent import build_output, packing, strangers
from fal_agent.launch import output_folder
from fal_contract.errors import Code, FalError
from fal_contract.limits import MODEL_FILES_MAX, MODEL_PATH_BYTES_MAX
from fal_contract.v1 import agent_pb2, state_pb2
from fal_fsd.ingest import read_folder
from virtual_time import LoopClock

RUNNER = "system/build-abab-00000001-00000001"
DEPTH = 3000  # more levels than Python calls itself, and a longer path than the kernel takes


def dig(folder: Path, depth: int, *, name: str = "dd") -> None:
    """`depth` folders in one another, with a file of 64 KiB at the bottom."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    file = os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(file, b"x" * (64 << 10))
    os.close(file)
    os.close(fd)


def build(**changes: object) -> agent_pb2.Assignment:
    task = state_pb2.BuildTask(namespace="cluster", key="cd" * 32, bytes_max=1 << 20)
    for name, value in changes.items():
        setattr(task, name, value)
    return assignment(RUNNER, app="system/build", share_group="system/build", build=task)


def test_a_deep_folder_is_seen_refused_and_removed(tmp_path: Path) -> None:
    places = Box(tmp_path, LoopClock()).places
    folder = output_folder(places, RUNNER)
    dig(folder, DEPTH)
    try:
        assert "longer than" in build_output.too_much(places, build())
        assert not build_output.too_much(places, build(image="t/img"))  # images are deep, and the packer bounds them
        with pytest.raises(FalError, match="too deep") as refused:
            read_folder(folder, "cache", 0, threading.Event())
        assert refused.value.code is Code.INVALID
    finally:
        asyncio.run(build_output.remove(places, RUNNER))
    assert not folder.exists()
    asyncio.run(build_output.remove(places, RUNNER))  # again is fine


HOLDER = """
import mmap, os, sys
file = os.open("nameless", os.O_CREAT | os.O_RDWR)
os.write(file, b"x" * (4 << 20))
os.unlink("nameless")
if sys.argv[1] == "mapped":
    kept = mmap.mmap(file, 0, prot=mmap.PROT_READ)  # which has a copy of the descriptor
    os.closerange(3, 100)
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["open", pytest.param("mapped", marks=pytest.mark.root)])
def test_a_file_without_a_name_counts_while_it_is_held(tmp_path: Path, how: str) -> None:
    places = Box(tmp_path, LoopClock()).places
    folder = output_folder(places, RUNNER)
    folder.mkdir(parents=True)
    argv = [sys.executable, "-c", HOLDER, how]
    with subprocess.Popen(argv, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        assert not build_output.too_much(places, build())  # what its names tell
        assert "at most 1048576 are allowed" in build_output.too_much(places, build(), holder.pid)
        assert strangers.held_unlinked([holder.pid], folder, looks_max=2) == (0, False)
        assert not build_output.too_much(places, build(bytes_max=8 << 20), holder.pid)
        holder.communicate(b"", timeout=20)
    assert strangers.held_unlinked([holder.pid], folder) == (0, True)


def test_what_lies_below_many_folders_counts(tmp_path: Path) -> None:
    dig(tmp_path / "a", MODEL_PATH_BYTES_MAX // 3 - 2)
    found = strangers.measure(tmp_path, entries_max=MODEL_FILES_MAX, path_chars_max=MODEL_PATH_BYTES_MAX)
    assert found.bytes >= 64 << 10
    assert found.entries == MODEL_PATH_BYTES_MAX // 3 - 2 + 2
    assert not found.too_deep


def test_counting_ends_at_the_bound(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "f").touch()
    assert 20 < strangers.measure(tmp_path, entries_max=20, path_chars_max=99).entries < 25


def test_a_packers_rest_is_removed_however_deep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    dig(tmp_path / ".work", DEPTH)
    packing.clear_rest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).write_text("x")
    with pytest.raises(FalError, match="is no text"):
        read_folder(tmp_path, "cache", 0, threading.Event())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to("/")
    found = strangers.measure(tmp_path / "in", entries_max=9, path_chars_max=99)
    assert (found.entries, found.too_deep) == (1, False)
    strangers.remove(tmp_path / "in")
    assert Path("/etc").is_dir()
