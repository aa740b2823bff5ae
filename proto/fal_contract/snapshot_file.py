"""The file of a snapshot: a head with everything that can be said before reading on, then the body under its digest.

    4096 bytes   "falctl-snapshot 1\\n", one JSON object, spaces, "\\n"
    body         entries: kind (1 byte), length of the key and of the value (4 bytes each, big endian), key, value

A record's key is its key in the store; a manifest's is its artifact id, its value the `ModelManifest` as it lies beside
the store. The head names the body's length and SHA-256, so that a file that was cut or changed is refused before
anything of it is used. Written beside its place and renamed once it is durable: what has the name is whole.

falctl writes these files, the scheduler reads them. Blocks on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from fal_contract.errors import Code, FalError
from fal_contract.identity import fsync_folder

FORMAT: Final = 1
HEAD_BYTES: Final = 4096
RECORD: Final = 1
MANIFEST: Final = 2
CHUNK_BYTES: Final = 1 << 20
_MAGIC: Final = b"falctl-snapshot "
_ENTRY: Final = struct.Struct(">BII")
_KEY_BYTES_MAX: Final = 4096
_VALUE_BYTES_MAX: Final = 64 << 20
_KINDS: Final = (RECORD, MANIFEST)
_WORDS: Final = ("cluster_id", "sha256")
_NUMBERS: Final = ("epoch", "term", "revision", "records", "bytes")
_NEEDED: Final = {**dict.fromkeys(_WORDS, str), **dict.fromkeys(_NUMBERS, int)}


def entry(kind: int, key: str, value: bytes) -> bytes:
    """One entry of the body."""
    name = key.encode()
    return _ENTRY.pack(kind, len(name), len(value)) + name + value


def chunks(entries: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about CHUNK_BYTES."""
    held: list[bytes] = []
    size = 0
    for one in entries:
        held.append(one)
        size += len(one)
        if size >= CHUNK_BYTES:
            whole = b"".join(held)
            for at in range(0, len(whole), CHUNK_BYTES):
                yield whole[at : at + CHUNK_BYTES]
            held, size = [], 0
    if held:
        yield b"".join(held)


class SnapshotWriter:
    """`with SnapshotWriter(path) as file:` write the body, then `finish`; without it nothing stays behind."""

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        """Raises ALREADY_EXISTS, INVALID where nothing can be written there."""
        if path.exists() and not replace:
            raise FalError(Code.ALREADY_EXISTS, f"{path} exists", remedy="Name another file, or give --force.")
        self._path = path
        self._scratch = path.with_name(f".{path.name}.part")
        self._sha256 = hashlib.sha256()
        self._size = 0
        try:
            fd = os.open(self._scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failed(error) from None
        self._file: BinaryIO | None = os.fdopen(fd, "wb")
        self._file.seek(HEAD_BYTES)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
            self._scratch.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of what was written so far, hexadecimal."""
        return self._sha256.hexdigest()

    def write(self, body: bytes) -> None:
        """The next bytes. Raises STORE_FAILED."""
        assert self._file is not None
        self._sha256.update(body)
        self._size += len(body)
        try:
            self._file.write(body)
        except OSError as error:
            raise self._failed(error) from None

    def finish(self, facts: Mapping[str, Any], *, sha256: str) -> dict[str, Any]:
        """Give it its head and its name; returns the head. Raises CORRUPT where `sha256` is not the body's."""
        assert self._file is not None
        if sha256 != self._sha256.hexdigest():
            raise FalError(Code.CORRUPT, "the snapshot's bytes are not those that were sent", remedy="Save it again.")
        head = {**facts, "bytes": self._size, "sha256": sha256}
        text = _MAGIC + b"%d\n" % FORMAT + json.dumps(head, sort_keys=True).encode()
        try:
            self._file.seek(0)
            self._file.write(text.ljust(HEAD_BYTES - 1) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._scratch, self._path)
            fsync_folder(self._path.absolute().parent)
        except OSError as error:
            raise self._failed(error) from None
        self._file = None
        return head

    def _failed(self, error: OSError) -> FalError:
        return FalError(
            Code.STORE_FAILED,
            f"{self._path} cannot be written: {error.strerror}",
            remedy="Check the folder, its owner and its free space.",
        )


def read_head(path: Path) -> dict[str, Any]:
    """What a file says of itself. Raises NOT_FOUND, CORRUPT, VERSION_MISMATCH."""
    with _opened(path) as file:
        return _head(path, file)


def check(path: Path) -> dict[str, Any]:
    """Read all of it; the head. Raises as `read_head`, CORRUPT too where the body is not what the head says."""
    with _opened(path) as file:
        head = _head(path, file)
        digest, left = hashlib.sha256(), int(head["bytes"])
        while left and (part := file.read(min(left, CHUNK_BYTES))):
            digest.update(part)
            left -= len(part)
        if left:
            raise _corrupt(path, f"it is cut: {left} bytes of its end are missing")
        if file.read(1):
            raise _corrupt(path, "something was added at its end")
        if digest.hexdigest() != head["sha256"]:
            raise _corrupt(path, "its bytes are not those that its digest names")
    return head


def entries(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """(kind, key, value) of each entry, in order. The file was checked before."""
    with _opened(path) as file:
        left = int(_head(path, file)["bytes"])
        while left > 0:
            kind, key_bytes, value_bytes = _ENTRY.unpack(_exactly(path, file, _ENTRY.size))
            if kind not in _KINDS or key_bytes > _KEY_BYTES_MAX or value_bytes > _VALUE_BYTES_MAX:
                raise _corrupt(path, "it holds an entry that is none")
            key = _exactly(path, file, key_bytes).decode()
            yield kind, key, _exactly(path, file, value_bytes)
            left -= _ENTRY.size + key_bytes + value_bytes


def _head(path: Path, file: BinaryIO) -> dict[str, Any]:
    raw = file.read(HEAD_BYTES)
    if len(raw) < HEAD_BYTES or not raw.startswith(_MAGIC):
        raise _corrupt(path, "it does not begin as one")
    version, _, text = raw[len(_MAGIC) :].partition(b"\n")
    if version.isdigit() and int(version) > FORMAT:
        raise FalError(
            Code.VERSION_MISMATCH,
            f"{path} is a snapshot of format {int(version)}, this release reads up to {FORMAT}",
            remedy="Use the release that saved it.",
        )
    try:
        head = json.loads(text)
        if not version.isdigit() or not all(isinstance(head[key], kind) for key, kind in _NEEDED.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise _corrupt(path, "its head cannot be read") from None
    result: dict[str, Any] = head
    return result


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise FalError(
            Code.NOT_FOUND, f"snapshot {path} cannot be read: {error.strerror}", remedy="Name a file that is one."
        ) from None


def _exactly(path: Path, file: BinaryIO, size: int) -> bytes:
    raw = file.read(size)
    if len(raw) != size:
        raise _corrupt(path, "it is cut")
    return raw


def _corrupt(path: Path, why: str) -> FalError:
    return FalError(
        Code.CORRUPT, f"{path} is no whole snapshot: {why}", remedy="Nothing was changed. Name another snapshot."
    )


__all__ = [
    "CHUNK_BYTES",
    "MANIFEST",
    "RECORD",
    "SnapshotWriter",
    "check",
    "chunks",
    "entries",
    "entry",
    "read_head",
]
