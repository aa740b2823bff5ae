"""Segments of the decision log as files: names, header, checksummed blocks, what may be kept.

An edge. `decisions-e0001-t0000000007-0000.log`: epoch, term, number of the segment in the term. One line of magic, one
line of JSON (the header, readable by `head -2`), then blocks: length and CRC-32 of the packed bytes (little endian, 4
bytes each), zlib data. A block that is cut short or wrong ends the reading: a crash tears the last one. Used by
`decision_log` (writing) and `fal_scheduler.sim` (reading).
"""

from __future__ import annotations

import json
import platform
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from fal_contract.errors import Code, FalError
from fal_contract.limits import DECISION_LOG_AGE_MAX_S, DECISION_LOG_BLOCK_BYTES_MAX, DECISION_LOG_BYTES_MAX
from fal_scheduler.core import log_entries, step
from fal_scheduler.core.log_codec import Unpacker

# What a log may hold is known by the modules that are loaded: these load all of them.
HOLDS: Final = (log_entries.Stepped, step.Core)

FORMAT: Final = 1
MAGIC: Final = b"falctl decisions 1\n"
_FRAME: Final = struct.Struct("<II")
_HEADER_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says of itself. `first`: number of its first entry; entries of a term are numbered from 1."""

    cluster_id: str
    epoch: int
    term: int
    segment: int
    first: int
    began_wall_s: float
    software: str
    numpy: str
    python: str
    cpu: str
    format: int = FORMAT

    @property
    def name(self) -> str:
        """The file's."""
        return f"decisions-e{self.epoch:04d}-t{self.term:010d}-{self.segment:04d}.log"

    @property
    def written_by(self) -> str:
        """For people: release and machine."""
        return f"release {self.software} (numpy {self.numpy}, Python {self.python}, {self.cpu})"

    def encode(self) -> bytes:
        """Both head lines."""
        return MAGIC + json.dumps(asdict(self)).encode() + b"\n"


def header_here(*, cluster_id: str, epoch: int, term: int, segment: int, first: int, wall_s: float) -> Header:
    """A header of this process."""
    return Header(
        cluster_id, epoch, term, segment, first, wall_s, software(), np.__version__, platform.python_version(), _cpu()
    )


def software() -> str:
    """This release."""
    try:
        return version("falctl")
    except PackageNotFoundError:
        return "unknown"


def _cpu() -> str:
    """The processor's model, as its kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}".strip()


def block_of(packed: bytes) -> bytes:
    """One block for the file."""
    data = zlib.compress(packed, 1)
    return _FRAME.pack(len(data), zlib.crc32(data)) + data


class Segment:
    """One file, read. `torn`: known after all entries were read: its end was missing or wrong."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises FalError: NOT_FOUND, CORRUPT (no such log), VERSION_MISMATCH."""
        self.path = path
        self.torn = False
        try:
            with path.open("rb") as file:
                magic, line = file.readline(len(MAGIC)), file.readline(_HEADER_BYTES_MAX)
        except OSError as error:
            raise FalError(
                Code.NOT_FOUND, f"{path} cannot be read: {error.strerror}", remedy="Name a log or its folder."
            ) from error
        if magic != MAGIC:
            raise FalError(Code.CORRUPT, f"{path} is no decision log", remedy="They are in DATA/decisions.")
        self.header = _header_of(path, line)
        self._at = len(magic) + len(line)

    def entries(self) -> Iterator[Any]:
        """Every whole entry, in order. Raises VERSION_MISMATCH where it holds what this release does not know."""
        unpacker = Unpacker(release=self.header.written_by)
        for block in self._blocks():
            yield from unpacker.unpack(block)

    def _blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self._at)
            while head := file.read(_FRAME.size):
                length, crc = _FRAME.unpack(head) if len(head) == _FRAME.size else (0, 1)
                data = file.read(length) if length <= DECISION_LOG_BLOCK_BYTES_MAX else b""
                if len(data) < length or zlib.crc32(data) != crc:
                    self.torn = True
                    return
                yield zlib.decompress(data)


def _header_of(path: Path, line: bytes) -> Header:
    try:
        told: Mapping[str, Any] = json.loads(line)
        if told["format"] > FORMAT:
            raise FalError(
                Code.VERSION_MISMATCH,
                f"{path} is of format {told['format']}, this release reads {FORMAT}",
                remedy=f"Replay it with release {told.get('software', '?')}.",
            )
        return Header(**{name: told[name] for name in Header.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise FalError(Code.CORRUPT, f"the header of {path} cannot be read", remedy="Take another log.") from error


def segments(path: Path) -> list[Segment]:
    """A file, or a folder's segments in order of epoch, term and number. Raises NOT_FOUND where there is none."""
    if not path.is_dir():
        return [Segment(path)]
    found = [Segment(one) for one in sorted(path.glob("decisions-*.log")) if _begun(one)]
    if not found:
        raise FalError(
            Code.NOT_FOUND, f"no decision log in {path}", remedy="A scheduler writes them to DATA/decisions."
        )
    return sorted(found, key=lambda one: (one.header.epoch, one.header.term, one.header.segment))


def _begun(path: Path) -> bool:
    """Whether the header is whole: a crash may leave a file without one."""
    with path.open("rb") as file:
        return (
            file.read(1) != b""
            and file.readline(_HEADER_BYTES_MAX).endswith(b"\n")
            and (file.readline(_HEADER_BYTES_MAX).endswith(b"\n"))
        )


def prune(folder: Path, *, now_wall_s: float, reserve_bytes: int) -> None:
    """Remove the oldest segments until `reserve_bytes` more fit the bound, and those past their age."""
    files = [(path, path.stat()) for path in sorted(folder.glob("decisions-*.log"))]
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda one: one[1].st_mtime):
        too_old = now_wall_s - stat.st_mtime > DECISION_LOG_AGE_MAX_S
        if too_old or total + reserve_bytes > DECISION_LOG_BYTES_MAX:
            path.unlink(missing_ok=True)
            total -= stat.st_size


__all__ = ["FORMAT", "Header", "Segment", "block_of", "header_here", "prune", "segments", "software"]
