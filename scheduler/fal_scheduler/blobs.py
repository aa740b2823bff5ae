"""Model manifests beside the store: one file each, named by its digest, checked whenever it is read.

Invariant: `blobs/DIGEST` holds a `ModelManifest` whose canonical digest is DIGEST, or is refused. Files are written
whole and durable before the store names them. Blocks on the disk: small files, called at registration and once per
model and leader afterwards (the cache). Must not be used for anything larger than a manifest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fal_contract.errors import Code, FalError
from fal_contract.identity import write_durably
from fal_contract.model_manifest import FileEntry, check_digest, manifest_digest
from fal_contract.v1 import state_pb2

_CACHED_MAX: Final = 256


class ManifestBlobs:
    """The folder of manifests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: OrderedDict[str, state_pb2.ModelManifest] = OrderedDict()

    def put(self, files: Sequence[FileEntry]) -> str:
        """Write the manifest of `files` unless it is there; returns its digest. Raises STORE_FAILED."""
        digest = manifest_digest(files)
        path = self._folder / digest
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                write_durably(path, to_manifest(files).SerializeToString(deterministic=True))
        except OSError as exc:
            raise FalError(
                Code.STORE_FAILED,
                f"the manifest {path} cannot be written: {exc.strerror}",
                remedy="Make room on the scheduler's disk, then register the model again.",
            ) from None
        return digest

    def has(self, digest: str) -> bool:
        """Whether the file is there; `get` tells whether it is whole."""
        return digest in self._cache or (self._folder / check_digest(digest)).exists()

    def get(self, digest: str) -> state_pb2.ModelManifest:
        """The manifest; do not change it. Raises NOT_FOUND or CORRUPT."""
        cached = self._cache.get(digest)
        if cached is not None:
            self._cache.move_to_end(digest)
            return cached
        path = self._folder / check_digest(digest)
        try:
            manifest = state_pb2.ModelManifest.FromString(path.read_bytes())
        except FileNotFoundError:
            raise FalError(
                Code.NOT_FOUND,
                f"the manifest {path} does not exist on this scheduler",
                remedy="Copy blobs/ from the scheduler that registered the model, or register it again.",
            ) from None
        except (OSError, DecodeError) as exc:
            raise _corrupt(path, str(exc)) from None
        if manifest_digest(to_entries(manifest)) != digest:
            raise _corrupt(path, "its digest is not its name")
        self._cache[digest] = manifest
        if len(self._cache) > _CACHED_MAX:
            self._cache.popitem(last=False)
        return manifest


def to_manifest(files: Sequence[FileEntry]) -> state_pb2.ModelManifest:
    """The message, files in order of path."""
    ordered = sorted(files, key=lambda x: x.path.encode())
    return state_pb2.ModelManifest(
        files=[state_pb2.ModelFile(path=x.path, bytes=x.size_bytes, sha256=x.sha256) for x in ordered]
    )


def to_entries(manifest: state_pb2.ModelManifest) -> list[FileEntry]:
    """The files of a message."""
    return [FileEntry(x.path, x.bytes, x.sha256) for x in manifest.files]


def _corrupt(path: Path, why: str) -> FalError:
    return FalError(
        Code.CORRUPT, f"the manifest {path} is damaged: {why}", remedy="Remove the file and register the model again."
    )


__all__ = ["ManifestBlobs", "to_entries", "to_manifest"]
