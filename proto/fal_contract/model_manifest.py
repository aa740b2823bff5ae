"""What a model manifest is: which paths are legal, and the digest that names it. Pure.

Invariant: equal file lists have equal digests on every machine, whatever order or protobuf version they came in. The
scheduler's registry computes the digest, fsd computes it again before it stages. Protobuf bytes are no
canonical form, so the digest is SHA-256 over a text of our own:

    fal-manifest 1\n
    SHA256-HEX SPACE BYTES SPACE PATH\n        one line a file, in order of the path's UTF-8 bytes
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fal_contract.errors import invalid
from fal_contract.limits import MODEL_FILES_MAX, MODEL_PATH_BYTES_MAX

_HEAD: Final = b"fal-manifest 1\n"
_SHA256_BYTES: Final = 32
_NAME_BYTES_MAX: Final = 255  # what Linux file systems hold


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: relative path with '/', size in bytes, SHA-256 of the content (32 bytes)."""

    path: str
    size_bytes: int
    sha256: bytes


def check_path(path: str) -> str:
    """Return `path` when a file may have it below a model's folder, else raise INVALID."""
    why = _fault(path)
    if why:
        raise invalid("path", path, why, remedy="Use a relative path of plain names joined by '/'.")
    return path


def _fault(path: str) -> str:
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if not path.isprintable() or "\\" in path:
        return "holds a control character or a backslash"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(raw) > MODEL_PATH_BYTES_MAX:
        return f"is longer than {MODEL_PATH_BYTES_MAX} bytes"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"has the part {part!r}"
        if len(part.encode()) > _NAME_BYTES_MAX:
            return f"has a part longer than {_NAME_BYTES_MAX} bytes"
    return ""


def check_files(files: Sequence[FileEntry]) -> None:
    """Raise INVALID, naming the file, unless these could be the files of one model."""
    if not files:
        raise invalid("files", 0, "is no model", remedy="A manifest names at least one file.")
    if len(files) > MODEL_FILES_MAX:
        raise invalid("files", len(files), "are too many", remedy=f"A model has at most {MODEL_FILES_MAX} files.")
    paths: set[str] = set()
    for entry in files:
        check_path(entry.path)
        if entry.path in paths:
            raise invalid("path", entry.path, "is there twice", remedy="Name each file once.")
        if entry.size_bytes < 0:
            raise invalid("bytes", entry.size_bytes, f"is the size of {entry.path!r}", remedy="Give the size in bytes.")
        if len(entry.sha256) != _SHA256_BYTES:
            raise invalid("sha256", entry.sha256.hex(), f"of {entry.path!r} is not 32 bytes", remedy="Hash it again.")
        paths.add(entry.path)
    for path in paths:
        for end in (i for i, char in enumerate(path) if char == "/"):
            if path[:end] in paths:
                raise invalid("path", path, f"is below the file {path[:end]!r}", remedy="A file is not a folder.")


def manifest_digest(files: Iterable[FileEntry]) -> str:
    """SHA-256 over the canonical form, lower-case hexadecimal."""
    hasher = hashlib.sha256(_HEAD)
    for entry in sorted(files, key=lambda e: e.path.encode()):
        hasher.update(f"{entry.sha256.hex()} {entry.size_bytes} {entry.path}\n".encode())
    return hasher.hexdigest()


def check_digest(digest: str, *, field: str = "manifest_digest") -> str:
    """Return `digest` when it looks like one; it becomes a folder's name."""
    if len(digest) != 2 * _SHA256_BYTES or any(char not in "0123456789abcdef" for char in digest):
        raise invalid(field, digest[:80], "is not a SHA-256", remedy="Give 64 lower-case hexadecimal digits.")
    return digest


__all__ = ["FileEntry", "check_digest", "check_files", "check_path", "manifest_digest"]
