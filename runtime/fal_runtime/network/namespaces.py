"""Network namespaces with a name: a file on which the namespace is mounted, so that it outlives who made it.

A namespace is entered by an operating system thread; one that did is never used for anything else. So everything here
runs in a thread of its own that ends afterwards, and the caller waits: call it by asyncio.to_thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fal_runtime.driver import driver_failed
from fal_runtime.oci import mounts

COMMAND_TIMEOUT_S: Final = 30.0
_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 4096
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("16sh22x")
_libc: Final = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> T:
    """Run `work` in a fresh thread to its end; what it raises is raised here."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def create(path: Path, sysctls: Mapping[str, str]) -> None:
    """A new namespace at `path`, loopback up, with these settings below /proc/sys/net. DRIVER_FAILED.

    It belongs to the node's user namespace. The name comes last: a namespace that has one is ready.
    """

    def work() -> None:
        _check(_libc.unshare(ctypes.c_int(_CLONE_NEWNET)), "a new network namespace")
        _loopback_up()
        for key, value in sysctls.items():
            (Path("/proc/sys/net") / key).write_text(value)
        path.touch(mode=0o600)
        mounts.mount("/proc/thread-self/ns/net", path, "", _MS_BIND)

    try:
        in_thread(work, "netns-create")
    except OSError as error:
        raise driver_failed(f"network namespace {path.name}: {error}", remedy="Run as root.") from error


def exists(path: Path) -> bool:
    """Whether a namespace has this name (a file alone is what a killed creation leaves)."""
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except FileNotFoundError:
        return False


def delete(path: Path) -> None:
    """Take the name away; the namespace ends with its last process. Unknown names are fine."""
    mounts.unmount_all(path)
    path.unlink(missing_ok=True)


def enter(fd: int) -> None:
    """Move the calling thread into the network namespace of this descriptor. Raises OSError."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(_CLONE_NEWNET)), "entering a network namespace")


def inside(path: Path, work: Callable[[], T]) -> T:
    """Run `work` in the namespace at `path`; programs that it starts are in it, too."""

    def enter_and_work() -> T:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(fd)
        finally:
            os.close(fd)
        return work()

    return in_thread(enter_and_work, "netns-inside")


def command(argv: Sequence[str], *, given: str = "", timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """What a program says; it is killed after `timeout_s`. DRIVER_FAILED with its own words."""
    try:
        done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise driver_failed(f"{argv[0]}: {error}", remedy="Is it installed? Try again.") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise driver_failed(f"{' '.join(argv)}: {said}", remedy="Look at the node's network settings.")
    return done.stdout


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        flags: int = _IFREQ.unpack(answer)[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def _check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
