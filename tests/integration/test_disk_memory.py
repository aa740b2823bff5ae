"""The memory tier: locked pages stay, whoever reads under whatever limit."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_fsd.disk.memory import MemoryTier

MIB = 1 << 20
LOCKED_BY_ANYONE = 64 << 10  # what every process may lock


def resident(path: Path) -> int:
    """Bytes of a file in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
    ):
        buffer = ctypes.c_char.from_buffer(view)
        vector = (ctypes.c_ubyte * pages)()
        assert libc.mincore(ctypes.byref(buffer), ctypes.c_size_t(size), vector) == 0, os.strerror(ctypes.get_errno())
        del buffer
    return sum(x & 1 for x in vector) * mmap.PAGESIZE


def drop(path: Path) -> None:
    """Out of the page cache, as far as that may be."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def make(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(MIB) * (size // MIB) + b"x" * (size % MIB))
    return path


@pytest.fixture
def tier() -> Iterator[MemoryTier]:
    made = MemoryTier(8 * MIB, clock=SystemClock())
    if made.available:
        made.close()
        pytest.skip(made.available)
    yield made
    made.close()


def test_locked_pages_stay_until_unlocked(tier: MemoryTier, tmp_path: Path) -> None:
    one, empty = make(tmp_path / "one", 3 * MIB), make(tmp_path / "empty", 0)
    assert tier.lock("a", [one, empty]) == 3 * MIB == tier.bytes_locked
    assert tier.lock("a", [one, empty]) == 3 * MIB == tier.bytes_of("a")
    drop(one)
    assert resident(one) == 3 * MIB
    assert tier.unlock("a") == 3 * MIB
    assert tier.unlock("a") == 0 == tier.bytes_locked
    drop(one)
    assert resident(one) < 3 * MIB


def test_the_budget_and_what_is_missing_are_refused(tier: MemoryTier, tmp_path: Path) -> None:
    tier.lock("a", [make(tmp_path / "one", 5 * MIB)])
    two = make(tmp_path / "two", 5 * MIB)
    with pytest.raises(FalError, match="do not fit") as raised:
        tier.lock("b", [two])
    assert raised.value.code == Code.NO_CAPACITY
    tier.unlock("a")
    tier.lock("b", [two])
    with pytest.raises(FalError) as raised:
        tier.lock("c", [tmp_path / "none"])
    assert raised.value.code == Code.NOT_FOUND
    assert tier.bytes_locked == 5 * MIB


def test_a_locker_that_died_is_replaced(tier: MemoryTier, tmp_path: Path) -> None:
    one = make(tmp_path / "one", MIB)
    tier.lock("a", [one])
    assert tier._process is not None
    tier._process.kill()
    tier._process.wait(30)
    assert tier.bytes_of("a") == 0
    assert tier.lock("a", [one]) == MIB


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, os\nfrom fal_contract.clock import SystemClock\nfrom fal_fsd.disk.memory import MemoryTier\n"
        "tier = MemoryTier(4096, clock=SystemClock())\ntier.available\nprint(tier._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}/proto:{root}/fsd"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(30_000), "it lives on"
    os.close(fd)


def test_no_budget_says_so() -> None:
    tier = MemoryTier(0, clock=SystemClock())
    assert tier.available == "no memory budget is set"
    with pytest.raises(FalError):
        tier.lock("a", [])


@pytest.mark.root
def test_where_locking_is_not_allowed_it_says_why(tmp_path: Path) -> None:
    if shutil.which("setpriv") is None or shutil.which("prlimit") is None:
        pytest.skip("needs util-linux")
    command = ["prlimit", f"--memlock={LOCKED_BY_ANYONE}", "setpriv", "--reuid=65534", "--inh-caps=-all"]
    if subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, timeout=30).returncode:
        pytest.skip("another user cannot run this interpreter")
    tier = MemoryTier(8 * MIB, clock=SystemClock(), command=command)
    assert "cannot be locked" in tier.available
    with pytest.raises(FalError, match="does not work here"):
        tier.lock("a", [make(tmp_path / "one", MIB)])
    tier.close()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 16 MiB; the path of its list of processes."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    folder = (old if old.is_dir() else root) / f"falctl-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        name = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
        (folder / name).write_text(str(16 * MIB))
    except OSError as exc:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    yield folder / "cgroup.procs"
    folder.rmdir()


@pytest.mark.root
def test_a_readers_memory_limit_does_not_push_it_out(
    small_cgroup: Path, tmp_path: Path, scale: Callable[[int], int]
) -> None:
    size = max(scale(512), 48) * MIB  # 512 MiB with --all
    locked, plain = make(tmp_path / "locked", size), make(tmp_path / "plain", size)
    tier = MemoryTier(size, clock=SystemClock())
    if tier.available:
        tier.close()
        pytest.skip(tier.available)
    drop(plain)
    try:
        tier.lock("a", [locked])
        code = (
            "import sys\nopen(sys.argv[1], 'w').write('0')\n"
            "for path in sys.argv[2:]:\n"
            "    with open(path, 'rb', buffering=0) as file:\n"
            "        while file.read(1 << 20): pass\n"
        )
        command = [sys.executable, "-I", "-S", "-c", code, str(small_cgroup), str(locked), str(plain)]
        subprocess.run(command, check=True, timeout=120)
        assert resident(locked) == size
        assert resident(plain) < 24 * MIB  # what the tier is for
    finally:
        tier.close()
