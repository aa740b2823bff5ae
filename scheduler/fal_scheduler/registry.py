"""Reads `file://` models where they are: lists a folder's files, hashes them, refuses what must never reach a worker.

Other origins are listed by `fal_fsd.origin` and read by nodes. What is listed is what is hashed: a file that changes
between the two ends the attestation with CONFLICT. All functions here block on the disk: call them in a thread.
Must not write anything and must not decide what becomes of a model (the engine does).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Final
from urllib.parse import unquote, urlsplit

import blake3

from fal_contract.artifact import Artifact, ArtifactFile, check_listing, listing_id
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import MODEL_FILES_MAX
from fal_contract.model_manifest import check_path
from fal_contract.pieces import PieceLayout, piece_bytes_of

PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_DEPTH_MAX: Final = 16
_READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that belongs to a model: its path below the folder, where its bytes are, size, change time."""

    path: str
    real: Path
    size_bytes: int
    changed_ns: int


def folder_of(uri: str, roots: Sequence[Path] = ()) -> Path:
    """The folder that a `file://` URI names. Raises INVALID for other schemes and for folders outside `roots`."""
    parts = urlsplit(uri)
    if parts.scheme != "file":
        raise invalid(
            "uri", uri, "is not a file:// URI", remedy="Use s3://, gs://, az://, https://, hf:// or file:///path."
        )
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise invalid("uri", uri, "names a host, query or fragment", remedy="Use file:///path/to/model.")
    folder = Path(unquote(parts.path))
    if not folder.is_absolute() or ".." in folder.parts:
        raise invalid("uri", uri, "is not an absolute path without '..'", remedy="Use file:///path/to/model.")
    try:
        real = folder.resolve(strict=True)
        is_folder = real.is_dir()
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        raise invalid(
            "uri", uri, f"cannot be read: {why}", remedy="Name a folder on the scheduler's machine."
        ) from None
    if not is_folder:
        raise invalid("uri", uri, "is not a folder", remedy="Name the folder that holds the model's files.")
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise invalid("uri", uri, "is outside the scheduler's model_roots", remedy="Move it below one of them.")
    return real


def list_files(folder: Path, *, allow_pickle: bool = False) -> tuple[Listed, ...]:
    """All files of a model, in order of path. Raises INVALID naming the first file that may not be there."""
    files: list[Listed] = []
    for listed in _walk(folder, "", 0):
        if not allow_pickle:
            refuse_pickle(listed.path)
        files.append(listed)
        if len(files) > MODEL_FILES_MAX:
            raise invalid("uri", str(folder), "has too many files", remedy=f"A model has at most {MODEL_FILES_MAX}.")
    if not files:
        raise invalid("uri", str(folder), "holds no file", remedy="Name the folder that holds the model's files.")
    return tuple(sorted(files, key=lambda x: x.path.encode()))


def _walk(folder: Path, above: str, depth: int) -> Iterator[Listed]:
    if depth > _DEPTH_MAX:
        raise invalid("uri", above, f"is nested deeper than {_DEPTH_MAX} folders", remedy="Flatten the model's folder.")
    root = folder if not above else Path(*folder.parts[: len(folder.parts) - depth])
    try:
        entries = sorted(os.scandir(folder), key=lambda x: x.name)
    except OSError as exc:
        raise invalid(
            "uri", str(folder), f"cannot be read: {exc.strerror}", remedy="Correct its permissions."
        ) from None
    for entry in entries:
        path = f"{above}{entry.name}"
        check_path(path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{path}/", depth + 1)
        else:
            yield _listed(root, folder / entry.name, path)


def refuse_pickle(path: str) -> None:
    """Raise INVALID for a file whose name says that it may hold a pickle."""
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        raise invalid(
            "file",
            path,
            "may hold a pickle, which runs code when it is loaded",
            remedy="Convert it to safetensors, take it out of the folder, or trust its author with --allow-pickle.",
        )


def _listed(root: Path, where: Path, path: str) -> Listed:
    try:
        real = where.resolve(strict=True)
        facts = real.stat()
    except OSError as exc:
        raise invalid("file", path, f"cannot be read: {exc.strerror}", remedy="Repair or remove it.") from None
    if not real.is_relative_to(root):
        raise invalid("file", path, "is a link that leaves the folder", remedy="Copy the file into the folder.")
    if not stat.S_ISREG(facts.st_mode):
        raise invalid("file", path, "is not a regular file", remedy="A model holds files and folders only.")
    return Listed(path, real, facts.st_size, facts.st_mtime_ns)


def folder_listing(uri: str, kind: str, files: Sequence[Listed]) -> Artifact:
    """The artifact of a folder before it is read. A file's version is its change time and size, so that an untouched
    folder has the same id again."""
    return listing_of(uri, kind, [ArtifactFile(x.path, x.size_bytes, f"{x.changed_ns}-{x.size_bytes}") for x in files])


def listing_of(uri: str, kind: str, files: Sequence[ArtifactFile]) -> Artifact:
    """The artifact of a listing, without digests of pieces. Raises INVALID naming the file that may not be in it."""
    check_listing(files)
    ordered = tuple(sorted(files, key=lambda x: x.path.encode()))
    piece_bytes = piece_bytes_of(kind, sum(x.size_bytes for x in ordered))
    artifact = Artifact(listing_id(uri, ordered), kind, uri, piece_bytes, ordered)
    PieceLayout([x.size_bytes for x in ordered], piece_bytes)  # too many pieces raise here, before anything is stored
    return artifact


def hash_files(listing: Artifact, files: Sequence[Listed], stop: Event) -> Artifact:
    """Read every file once: SHA-256 of each, BLAKE3 of each piece; unsigned.

    Raises CONFLICT when a file is not as it was listed, CANCELLED once `stop` is set.
    """
    entries: list[ArtifactFile] = []
    hashes: list[bytes] = []
    for entry, file in zip(listing.files, files, strict=True):
        digest, pieces = _hash(file, listing.piece_bytes, stop)
        entries.append(replace(entry, sha256=digest))
        hashes += pieces
    return replace(listing, files=tuple(entries), hashes=tuple(hashes))


def _hash(file: Listed, piece_bytes: int, stop: Event) -> tuple[bytes, list[bytes]]:
    whole, piece, pieces = hashlib.sha256(), blake3.blake3(), []
    try:
        fd = os.open(file.real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise _changed(file, exc.strerror or str(exc)) from None
    with os.fdopen(fd, "rb", buffering=0) as stream:
        left, left_in_piece = file.size_bytes, piece_bytes
        while block := stream.read(min(_READ_BYTES, left_in_piece)):
            if stop.is_set():
                raise FalError(Code.CANCELLED, f"hashing {file.path} was cancelled", remedy="Register it again.")
            whole.update(block)
            piece.update(block)
            left -= len(block)
            left_in_piece -= len(block)
            if left < 0:
                break
            if not left_in_piece:
                pieces.append(piece.digest())
                piece, left_in_piece = blake3.blake3(), piece_bytes
        facts = os.fstat(stream.fileno())
    if left or facts.st_mtime_ns != file.changed_ns or not stat.S_ISREG(facts.st_mode):
        raise _changed(file, "its size or time differs")
    if left_in_piece != piece_bytes:
        pieces.append(piece.digest())
    return whole.digest(), pieces


def _changed(file: Listed, why: str) -> FalError:
    return FalError(
        Code.CONFLICT,
        f"{file.path} changed while the model was registered: {why}",
        remedy="Register the model again once its files are complete.",
    )


__all__ = ["PICKLE_SUFFIXES", "Listed", "folder_listing", "folder_of", "hash_files", "list_files", "listing_of"]
