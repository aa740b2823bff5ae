"""Takes a folder of this node in as an artifact: what a build task left. Nothing of it is READY before it is signed.

Invariants: the folder's files are read once for their digests and once more to be copied, and the copy is compared with
the digests, so a file that changes meanwhile is refused; symbolic links and special files are refused, not followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, check_listing, entries_of, listing_id, to_manifest
from fal_contract.errors import FalError, invalid, not_found
from fal_contract.limits import MODEL_FILES_MAX, MODEL_PATH_BYTES_MAX
from fal_contract.model_manifest import manifest_digest
from fal_contract.pieces import piece_bytes_of
from fal_contract.v1 import fsd_pb2
from fal_fsd.disk.reading import Cancelled

if TYPE_CHECKING:
    from fal_fsd.disk.store import DiskStore
    from fal_fsd.node import CacheNode

URI: Final = "push://ingest"
_BLOCK_BYTES: Final = 1 << 20


async def ingest(node: CacheNode, request: fsd_pb2.IngestRequest, owner: str) -> fsd_pb2.IngestReply:
    """See the module. INVALID naming the field, NOT_FOUND, NO_CAPACITY, CORRUPT (it changes while it is read)."""
    folder = Path(request.folder)
    if not folder.is_absolute():
        raise invalid("folder", request.folder, "is not absolute", remedy="Give the whole path.")
    kind = request.kind or "cache"
    stop = threading.Event()
    try:
        artifact = await asyncio.to_thread(read_folder, folder, kind, request.bytes_max, stop)
        await asyncio.to_thread(_take_in, node, artifact, request.model, folder, owner, stop)
    finally:
        stop.set()
    node.news.changed(artifact.id, at_once=True)
    manifest = to_manifest(artifact)
    return fsd_pb2.IngestReply(manifest=manifest, manifest_digest=manifest_digest(entries_of(artifact)))


def read_folder(folder: Path, kind: str, bytes_max: int, stop: threading.Event) -> Artifact:
    """The artifact that its files are: SHA-256 and BLAKE3 of everything, not signed. Blocks."""
    sizes = _sizes(folder, bytes_max)
    piece_bytes = piece_bytes_of(kind, sum(sizes.values()))
    files: list[ArtifactFile] = []
    hashes: list[bytes] = []
    for path, size in sorted(sizes.items(), key=lambda item: item[0].encode()):
        digest, pieces = _digests(folder / path, size, piece_bytes, stop)
        files.append(ArtifactFile(path, size, sha256=digest))
        hashes += pieces
    check_listing(files)
    return Artifact(listing_id(URI, files), kind, URI, piece_bytes, tuple(files), tuple(hashes))


def _sizes(folder: Path, bytes_max: int) -> dict[str, int]:
    if not folder.is_dir():
        raise not_found("folder", str(folder), remedy="Give a folder of this node.")
    found: dict[str, int] = {}
    below = [""]  # a list, as os.walk calls itself once per level, and strangers make levels
    while below:
        parent = below.pop()
        for name, info in _listed(folder, parent):
            path = f"{parent}{name}"
            if stat.S_ISDIR(info.st_mode):
                below.append(f"{path}/")
            elif stat.S_ISREG(info.st_mode):
                found[path] = info.st_size
            else:
                raise invalid("folder", path, "is neither file nor folder", remedy="Remove it.")
        if len(found) > MODEL_FILES_MAX or len(below) > MODEL_FILES_MAX:
            raise invalid("folder", len(found), "files are too many", remedy=f"At most {MODEL_FILES_MAX}.")
    total = sum(found.values())
    if bytes_max and total > bytes_max:
        raise invalid("folder", total, f"bytes are more than {bytes_max}", remedy="Keep less in it.")
    if not found:
        raise invalid("folder", str(folder), "has no files", remedy="Give one that has.")
    return found


def _listed(folder: Path, below: str) -> list[tuple[str, os.stat_result]]:
    """What is in a folder below it ("" or ending with "/"). INVALID: names that no artifact can have."""
    if len(os.fsencode(below)) > MODEL_PATH_BYTES_MAX:
        raise invalid("folder", below[:80], "is too deep", remedy=f"Paths have at most {MODEL_PATH_BYTES_MAX} bytes.")
    try:
        with os.scandir(folder / below) as entries:
            listed = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        _raise(error)
    for name, _ in listed:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise invalid("folder", ascii(name)[:80], "is no text", remedy="Name it in UTF-8.") from None
    return listed


def _digests(path: Path, size: int, piece_bytes: int, stop: threading.Event) -> tuple[bytes, list[bytes]]:
    whole, pieces, at = hashlib.sha256(), [], 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while at < size:
            piece, end = blake3(), min(at + piece_bytes, size)
            while at < end:
                data = os.pread(fd, min(_BLOCK_BYTES, end - at), at)
                if not data or stop.is_set():
                    raise invalid("folder", str(path), "became shorter while it was read", remedy="Stop its writer.")
                whole.update(data)
                piece.update(data)
                at += len(data)
            pieces.append(piece.digest())
    finally:
        os.close(fd)
    return whole.digest(), pieces


def _take_in(node: CacheNode, artifact: Artifact, model: str, folder: Path, owner: str, stop: threading.Event) -> None:
    unsigned = Artifact(artifact.id, artifact.kind, artifact.uri, artifact.piece_bytes, artifact.files)
    others = node.store.part(artifact.id) is not None
    part = node.store.open_part(unsigned, model=model)
    try:
        node.store.pin(artifact.id, owner)
        if not part.finished:
            node.store.copy_in(part, folder, stop, lambda count: None)
        for piece in range(artifact.layout.count):
            if artifact.hashes is not None and part.digest_of(piece) != artifact.hashes[piece]:
                raise invalid("folder", str(folder), "changed while it was read", remedy="Stop its writer; try again.")
    except (FalError, OSError, Cancelled):
        node.store.unpin(owner, artifact.id)
        if not others:
            part.close()  # one that is open is never removed
        node.store.abandon(artifact.id)
        raise


def taken_in(store: DiskStore, artifact: Artifact) -> Artifact | None:
    """What was taken in here and nobody has signed yet, with the digests of its pieces; None for all else. Blocks."""
    if artifact.uri != URI or not all(file.sha256 for file in artifact.files):
        return None
    part = store.part(artifact.id)
    opened = part is None
    part = part or store.open_part(artifact, model="")  # as after a restart
    try:
        hashes = [part.digest_of(piece) for piece in range(artifact.layout.count)]
    finally:
        if opened:
            part.close()
    known = [digest for digest in hashes if digest is not None]
    return replace(artifact, hashes=tuple(known)) if len(known) == len(hashes) else None


def _raise(error: OSError) -> NoReturn:
    raise invalid("folder", str(error.filename), f"cannot be read: {error.strerror}", remedy="Correct its permissions.")


__all__ = ["URI", "ingest", "read_folder", "taken_in"]
