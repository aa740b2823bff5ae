"""Manifests beside the store: one file an artifact, named by its id, checked whenever it is read.

Invariant: `blobs/ARTIFACT-ID` holds the `ModelManifest` of that artifact: the listing while it is REGISTERED (paths,
sizes, versions, SHA-256 where the origin publishes it), the manifest with every digest and the CA's signature once it
is ATTESTED; anything else is refused. Files are written whole and durable before the store names them. The first
release named files by manifest digest and wrote no piece digests: `legacy` reads those.
Blocks on the disk: small files. Must not be used for anything larger than a manifest.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict, deque
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from fal_contract.artifact import Artifact, from_manifest, listing_id, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.identity import write_durably
from fal_contract.limits import MANIFEST_EMBEDDED_BYTES_MAX
from fal_contract.model_manifest import FileEntry, check_digest, manifest_digest
from fal_contract.v1 import state_pb2

_WRITTEN_MAX: Final = 4096  # remembered for standbys
_CACHED_MAX: Final = 256  # of at most MANIFEST_EMBEDDED_BYTES_MAX each


class ManifestBlobs:
    """The folder of manifests. `ca_key`: what attested ones must be signed with."""

    def __init__(self, folder: Path, ca_key: ec.EllipticCurvePublicKey) -> None:
        self._folder = folder
        self.ca_key = ca_key
        self._count = itertools.count(1)
        self._written: deque[tuple[int, str]] = deque(maxlen=_WRITTEN_MAX)  # also by threads: only appended to
        self._cache: OrderedDict[str, state_pb2.ModelManifest] = OrderedDict()

    def put(self, artifact: Artifact) -> None:
        """Write an artifact's manifest, in the place of what was there. Raises STORE_FAILED."""
        path = self._folder / check_digest(artifact.id, field="artifact_id")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(path, to_manifest(artifact).SerializeToString(deterministic=True))
        except OSError as exc:
            raise FalError(
                Code.STORE_FAILED,
                f"the manifest {path} cannot be written: {exc.strerror}",
                remedy="Make room on the scheduler's disk, then register the model again.",
            ) from None
        self._cache.pop(artifact.id, None)
        self._written.append((next(self._count), artifact.id))

    def writes(self) -> int:
        """How many were written through this object."""
        return self._written[-1][0] if self._written else 0

    def written_since(self, number: int) -> list[str] | None:
        """Ids written after `writes()` was `number`, in order, each once; None where that is forgotten."""
        written = list(self._written)
        if written and written[0][0] > number + 1:
            return None
        return sorted({id_ for count, id_ in written if count > number})

    def has(self, id_: str) -> bool:
        """Whether the file is there; `get` tells whether it is whole."""
        return id_ in self._cache or (self._folder / check_digest(id_)).exists()

    def names(self, *, older_than_s: float = float("inf")) -> set[str]:
        """Every artifact id (and digest, of the first release) that has a file.

        `older_than_s`: only files written before that moment, Unix seconds.
        """
        try:
            with os.scandir(self._folder) as entries:
                return {
                    entry.name
                    for entry in entries
                    if len(entry.name) == 64 and (older_than_s == float("inf") or entry.stat().st_mtime < older_than_s)
                }
        except FileNotFoundError:
            return set()

    def drop(self, id_: str) -> None:
        """Remove a file; fine where there is none."""
        self._cache.pop(id_, None)
        (self._folder / check_digest(id_)).unlink(missing_ok=True)

    def get(self, artifact_id: str) -> state_pb2.ModelManifest:
        """The manifest; do not change it. Raises NOT_FOUND or CORRUPT."""
        cached = self._cache.get(artifact_id)
        if cached is not None:
            self._cache.move_to_end(artifact_id)
            return cached
        manifest = self.read(artifact_id)
        if manifest.ByteSize() <= MANIFEST_EMBEDDED_BYTES_MAX:
            self._cache[artifact_id] = manifest
            if len(self._cache) > _CACHED_MAX:
                self._cache.popitem(last=False)
        return manifest

    def read(self, artifact_id: str) -> state_pb2.ModelManifest:
        """As `get`, from the disk; may be called on any thread."""
        path = self._folder / check_digest(artifact_id, field="artifact_id")
        raw = _read(path)
        try:
            manifest = state_pb2.ModelManifest.FromString(raw)
            check_manifest(manifest, artifact_id, self.ca_key)
        except (DecodeError, FalError) as exc:
            raise _corrupt(path, str(exc)) from None
        return manifest

    def artifact(self, artifact_id: str) -> Artifact:
        """As `get`, ready to be worked with."""
        return from_manifest(self.get(artifact_id))

    def legacy(self, digest: str) -> list[FileEntry]:
        """Files of a manifest as the first release wrote it. Raises NOT_FOUND or CORRUPT."""
        path = self._folder / check_digest(digest)
        try:
            manifest = state_pb2.ModelManifest.FromString(_read(path))
        except DecodeError as exc:
            raise _corrupt(path, str(exc)) from None
        entries = [FileEntry(x.path, x.bytes, x.sha256) for x in manifest.files]
        if manifest_digest(entries) != digest:
            raise _corrupt(path, "its digest is not its name")
        return entries


def check_manifest(manifest: state_pb2.ModelManifest, artifact_id: str, ca_key: ec.EllipticCurvePublicKey) -> Artifact:
    """The artifact, once the message is known to be that artifact's: a listing by its hash, the rest by signature.

    Raises INVALID or CORRUPT.
    """
    artifact = from_manifest(manifest, ca_key=ca_key)
    if artifact.id != artifact_id:
        raise FalError(Code.CORRUPT, f"it is of artifact {artifact.id[:12]}", remedy="Remove the file.")
    if not artifact.attested and listing_id(artifact.uri, artifact.files) != artifact_id:
        raise FalError(Code.CORRUPT, "its files are not those that its id names", remedy="Remove the file.")
    return artifact


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FalError(
            Code.NOT_FOUND,
            f"the manifest {path} does not exist on this scheduler",
            remedy="A node that has the model brings it back; or copy blobs/ from the scheduler that registered it.",
        ) from None
    except OSError as exc:
        raise _corrupt(path, str(exc)) from None


def _corrupt(path: Path, why: str) -> FalError:
    return FalError(
        Code.CORRUPT, f"the manifest {path} is damaged: {why}", remedy="Remove the file and register the model again."
    )


__all__ = ["ManifestBlobs", "check_manifest"]
