"""A folder of this machine as the origin: files are cloned (reflink) where the file systems can, else copied.

Invariant: either way each piece is hashed from what arrived and counted like any other.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.reading import Cancelled
from fal_fsd.disk.tree import clone, disk_error
from fal_fsd.ports import BadPiece

_BLOCK_BYTES: Final = 1 << 20
SOURCE: Final = "origin"


def copy_in(part: DiskPart, folder: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> None:
    """Bring every missing piece from `folder`. `on_bytes` is told of what was read, as it comes.

    Raises NOT_FOUND, CORRUPT naming the file, NO_CAPACITY, Cancelled. Pieces that others write just now are left out.
    """
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for index, file in enumerate(part.artifact.files):
        pieces = [piece for piece in part.artifact.layout.of_file(index) if not part.has(piece)]
        if not pieces:
            continue
        source_fd = _open_source(folder / file.path, file.path, file.size_bytes)
        try:
            cloned = part.fill_file(index, partial(clone, source_fd))
            for piece in pieces:
                if stop.is_set():
                    raise Cancelled
                _copy_piece(part, piece, source_fd, cloned, buffer, on_bytes)
        except BadPiece as exc:
            raise _corrupt(folder, file.path, str(exc)) from None
        except OSError as exc:
            raise disk_error(exc, f"copying {file.path!r}", folder) from exc
        finally:
            os.close(source_fd)


def _copy_piece(
    part: DiskPart,
    piece: int,
    source_fd: int,
    cloned: bool,
    buffer: memoryview,
    on_bytes: Callable[[int], None],
) -> None:
    writer = part.writer(piece, source=SOURCE)
    if writer is None:
        return
    span = part.artifact.layout.span(piece)
    at, end = span.offset, span.offset + span.length
    try:
        while at < end:
            # From where it arrived, so that the clone itself is checked.
            fd = writer.fd if cloned else source_fd
            count = os.preadv(fd, [buffer[: min(len(buffer), end - at)]], at)
            if count == 0:
                raise BadPiece(piece, SOURCE)  # it shrank under us
            if cloned:
                writer.took(buffer[:count])
            else:
                writer.write(buffer[:count])
            at += count
            on_bytes(count)
        writer.finish()
    finally:
        writer.abort()


def _open_source(source: Path, path: str, size_bytes: int) -> int:
    try:
        # O_NONBLOCK: a FIFO in the folder must not hang us.
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise FalError(
            Code.NOT_FOUND,
            f"file {path!r} cannot be read at {source}: {exc.strerror}",
            remedy="Put it back where the model was registered, or register the model again.",
            field=path,
        ) from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size != size_bytes:
        os.close(fd)
        what = f"it has {info.st_size} bytes, not {size_bytes}" if stat.S_ISREG(info.st_mode) else "it is no file"
        raise _corrupt(source.parent, path, what)
    return fd


def _corrupt(folder: Path, path: str, why: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"file {path!r} in {folder} is not what was registered: {why}",
        remedy="Nothing of the model was exposed. Restore the file, or register the model again.",
        field=path,
    )
