"""What is to be staged: a checked manifest, and what of it is still missing. Pure.

Invariant: a Manifest exists only if its digest is the digest of its files and every path may be joined to a folder.
Called by fal_fsd.service and fal_fsd.store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from fal_contract.errors import Code, FalError, invalid
from fal_contract.model_manifest import FileEntry, check_digest, check_files, manifest_digest


@dataclass(frozen=True, slots=True)
class Manifest:
    """An artifact's files. `digest` names it everywhere."""

    digest: str
    files: tuple[FileEntry, ...]

    @property
    def bytes_total(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def folders(self) -> list[str]:
        """Every folder that the files need, parents first."""
        found = {str(parent) for entry in self.files for parent in PurePosixPath(entry.path).parents}
        return sorted(found - {"."})


def checked(digest: str, files: Sequence[FileEntry]) -> Manifest:
    """The manifest, or INVALID naming the field, or CORRUPT when the digest is another's."""
    check_digest(digest)
    check_files(files)
    actual = manifest_digest(files)
    if actual != digest:
        raise FalError(
            Code.CORRUPT,
            f"the manifest's digest is {actual}, {digest} was asked for",
            remedy="Register the model again (falctl weights add).",
            field="manifest_digest",
        )
    return Manifest(digest, tuple(files))


def local_folder(uri: str) -> str:
    """The absolute path of a file:// URI. INVALID for other origins."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise invalid("uri", uri, "is no local folder", remedy="This release stages from file:///FOLDER only.")
    return unquote(parts.path)
