"""Where things are below the state folder, and how a finished artifact becomes visible.

lock  cache.db  manifests/ARTIFACT_ID
blobs/aa/SHA256                      finished files, 0444: the unit of storage
parts/ARTIFACT_ID/data/N  bits …     artifacts on their way; N: index of the file
models/MANIFEST_DIGEST/…             READY: hard links to blobs, folders 0555; appears by one rename
trash/…                              renamed away under the store's lock, removed after; swept at a start
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from google.protobuf.message import DecodeError

from fal_contract.artifact import Artifact, from_manifest, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2
from fal_fsd.disk.catalog import BlobRow
from fal_fsd.disk.tree import copy_file, fsync_folder, remove_tree, write_durable


class Layout:
    """Paths below `root`; makes the folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.parts = root / "parts"
        self.models = root / "models"
        self.manifests = root / "manifests"
        self.trash = root / "trash"
        self._numbers = itertools.count()
        for folder in (root, self.blobs, self.parts, self.models, self.manifests, self.trash):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256[:2] / sha256

    def part(self, id: str) -> Path:
        return self.parts / id

    def tree(self, digest: str) -> Path:
        return self.models / digest

    def part_files(self, artifact: Artifact) -> list[Path]:
        """Where each file's bytes are while it is on its way."""
        return [self.part(artifact.id) / "data" / str(n) for n in range(len(artifact.files))]

    def tree_files(self, artifact: Artifact) -> list[Path]:
        """Where each file is once READY."""
        return [self.tree(artifact.manifest_digest) / file.path for file in artifact.files]

    # ---- manifests

    def save_manifest(self, artifact: Artifact) -> None:
        """Durable when this returns."""
        write_durable(self.manifests / artifact.id, to_manifest(artifact).SerializeToString())

    def load_manifest(self, id: str) -> Artifact | None:
        """None when there is none that can be read."""
        try:
            return from_manifest(state_pb2.ModelManifest.FromString((self.manifests / id).read_bytes()))
        except (FileNotFoundError, DecodeError, FalError):
            return None

    # ---- parts

    def make_part(self, artifact: Artifact) -> None:
        """Its folder with sparse files of their full lengths; what is there stays. Raises OSError."""
        data = self.part(artifact.id) / "data"
        data.mkdir(parents=True, exist_ok=True, mode=0o755)
        for path, file in zip(self.part_files(artifact), artifact.files, strict=True):
            if not path.exists():
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    os.ftruncate(fd, file.size_bytes)
                finally:
                    os.close(fd)
        for folder in (data, self.part(artifact.id), self.parts):
            fsync_folder(folder)

    # ---- finished

    def add_blob(self, path: Path, sha256: str, *, replace: bool) -> None:
        """Name the finished, durable file at `path` by its content; `replace`: instead of the blob that is there."""
        path.chmod(0o444)
        blob = self.blob(sha256)
        if not blob.parent.exists():
            blob.parent.mkdir(mode=0o755, exist_ok=True)
            fsync_folder(self.blobs)
        if replace:
            blob.unlink(missing_ok=True)
        _link(path, blob)

    def build_tree(self, artifact: Artifact, sources: Sequence[Path]) -> Path:
        """A tree of hard links that nobody sees yet; durable. Raises OSError."""
        tree = self.part(artifact.id) / "tree"
        remove_tree(tree)
        tree.mkdir(parents=True, mode=0o755)
        found = {str(parent) for file in artifact.files for parent in PurePosixPath(file.path).parents}
        folders = [tree / folder for folder in sorted(found - {"."})]
        for folder in folders:
            folder.mkdir(mode=0o755)
        for file, source in zip(artifact.files, sources, strict=True):
            _link(source, tree / file.path)
        for folder in reversed(folders):
            folder.chmod(0o555)
            fsync_folder(folder)
        fsync_folder(tree)
        for parent in {source.parent for source in sources}:
            fsync_folder(parent)
        return tree

    def expose(self, tree: Path, digest: str) -> Path:
        """The one rename. What is there already stays."""
        final = self.tree(digest)
        if not final.is_dir():
            os.rename(tree, final)
            final.chmod(0o555)  # only now: without root a folder that is read-only cannot be moved
            fsync_folder(final)
            fsync_folder(self.models)
        return final

    def to_trash(self, path: Path) -> Path | None:
        """Out of sight at once; the caller removes it later. None when it was not there."""
        target = self.trash / f"{os.getpid()}-{next(self._numbers)}-{path.name}"
        try:
            if path.is_dir():
                path.chmod(0o755)
            os.rename(path, target)
        except FileNotFoundError:
            return None
        return target

    def blob_row(self, sha256: str, boot: str) -> BlobRow:
        """As it is now. Raises OSError."""
        info = self.blob(sha256).lstat()
        return BlobRow(sha256, info.st_size, info.st_ino, info.st_mtime_ns, boot)


def purge(paths: Iterable[Path]) -> None:
    """Remove what went to the trash; bounded by the disk alone, so without locks."""
    for path in paths:
        remove_tree(path)


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where an inode cannot have another name."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError as exc:
        if exc.errno != errno.EMLINK:
            raise
        copy_file(source, target)
        target.chmod(0o444)
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def needs_attestation(artifact: Artifact) -> FalError:
    """FAILED_PRECONDITION."""
    return FalError(
        Code.FAILED_PRECONDITION,
        f"nobody has attested artifact {artifact.id[:12]} yet",
        remedy="Wait for its signed manifest.",
    )
