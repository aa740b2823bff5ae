"""Loop devices by their ioctls (linux/loop.h), read-only, and nothing else.

Invariant: every device is attached with LO_FLAGS_AUTOCLEAR, so it goes with the last mount or descriptor that uses it,
whoever was killed in between; nothing has to be remembered for that. All calls block. Called by `image_mounts`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fal_runtime.driver import driver_failed

MAJOR: Final = 7
_CONTROL: Final = Path("/dev/loop-control")
_CONTROL_DEVICE: Final = (10, 237)
_CTL_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_CHANGE_FD: Final = 0x4C06
_GET_STATUS64: Final = 0x4C05
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
# struct loop_info64: device, inode, rdevice, offset, size limit; number, two of encryption, flags; file name, crypt
# name, key; init. struct loop_config: fd, block size, loop_info64, 8 reserved.
_INFO: Final = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG_HEAD: Final = struct.Struct("=2I")
_CONFIG_RESERVED: Final = bytes(64)
_ATTEMPTS_MAX: Final = 64  # another process may be faster each time
_BLOCK_BYTES: Final = 4096


@contextmanager
def attached(file_fd: int, name: str, nodes: Path) -> Iterator[Path]:
    """A device that shows the file; it stays only if it is mounted before this ends. `nodes`: for a device node where
    /dev lacks one. DRIVER_FAILED."""
    size = os.fstat(file_fd).st_size
    block = _BLOCK_BYTES if size % _BLOCK_BYTES == 0 else 512
    label = os.fsencode(name)[:63]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _READ_ONLY | _AUTOCLEAR, label, b"", b"", 0, 0)
    config = _CONFIG_HEAD.pack(file_fd, block) + info + _CONFIG_RESERVED
    with _node(_CONTROL, stat.S_IFCHR, os.makedev(*_CONTROL_DEVICE), nodes) as control_path:
        control = _open(control_path)
        try:
            for _ in range(_ATTEMPTS_MAX):
                number = _ioctl(control, _CTL_GET_FREE, 0, "a free loop device")
                with device(number, nodes) as path:
                    fd = _open(path)
                    try:
                        fcntl.ioctl(fd, _CONFIGURE, config)
                    except OSError as error:
                        os.close(fd)
                        if error.errno == errno.EBUSY:  # taken between the two calls
                            continue
                        raise driver_failed(
                            f"loop device for {name}: {error.strerror}", remedy="Run as root."
                        ) from error
                    try:
                        yield path
                        return
                    finally:
                        os.close(fd)
        finally:
            os.close(control)
    raise driver_failed(f"no loop device is free for {name}", remedy="Look at `losetup -l`.")


@contextmanager
def device(number: int, nodes: Path) -> Iterator[Path]:
    """Its device node, made for as long as this lasts where /dev lacks it."""
    with _node(Path(f"/dev/loop{number}"), stat.S_IFBLK, os.makedev(MAJOR, number), nodes) as path:
        yield path


def change_file(number: int, file_fd: int, nodes: Path) -> None:
    """From now on the device reads this file, which has the same size. Waits for reads under way. DRIVER_FAILED."""
    with device(number, nodes) as path:
        fd = _open(path)
        try:
            _ioctl(fd, _CHANGE_FD, file_fd, f"change of the file behind loop{number}")
        finally:
            os.close(fd)


def backing(number: int, nodes: Path) -> tuple[int, int] | None:
    """(device, inode) of the file behind it; None when it is free."""
    status = bytearray(_INFO.size)
    with device(number, nodes) as path:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.ioctl(fd, _GET_STATUS64, status)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise driver_failed(f"loop{number}: {error.strerror}", remedy="Run as root.") from error
        finally:
            os.close(fd)
    found = _INFO.unpack(status)
    return int(found[0]), int(found[1])


@contextmanager
def _node(usual: Path, kind: int, rdev: int, nodes: Path) -> Iterator[Path]:
    """A container's /dev often has no node for a device that was made after it."""
    if usual.exists():
        yield usual
        return
    made = nodes / f".{usual.name}.{os.getpid()}.{threading.get_ident()}"
    with contextlib.suppress(FileExistsError):
        os.mknod(made, kind | 0o600, rdev)
    try:
        yield made
    finally:
        made.unlink(missing_ok=True)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise driver_failed(f"{path}: {error.strerror}", remedy="Run as root; load the module `loop`.") from error


def _ioctl(fd: int, request: int, argument: int, what: str) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise driver_failed(f"{what}: {error.strerror}", remedy="Run as root.") from error
