"""What an origin holds, as it was listed once; and which files must not be in it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from fal_contract.artifact import ArtifactFile, check_listing
from fal_contract.errors import invalid

# Formats that may hold a pickle, which runs code when it is loaded.
PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Listing:
    """One look at an origin.

    `uri`: resolved, so that it means the same bytes for ever or fails: a commit in place of a branch, a final '/' for a
    folder. `revision`: the commit, or empty. `files`: in order of path; `version` is the entity tag, `modified:` and
    the HTTP date where there is none, or the hub's content id; `sha256` where the origin publishes it.
    """

    uri: str
    revision: str
    files: tuple[ArtifactFile, ...]


def is_pickle(path: str) -> bool:
    """Whether a file of this name may hold a pickle."""
    return PurePosixPath(path).suffix.lower() in PICKLE_SUFFIXES


def check_files_allowed(files: Iterable[ArtifactFile], allow_pickle: bool) -> None:
    """Raise INVALID, naming the first file that may hold a pickle, unless those are allowed."""
    for file in files:
        if not allow_pickle and is_pickle(file.path):
            raise invalid(
                "file",
                file.path,
                "may hold a pickle, which runs code when it is loaded",
                remedy="Convert it to safetensors, take it out, or trust its author with --allow-pickle.",
            )


def made_listing(uri: str, revision: str, files: Iterable[ArtifactFile], *, allow_pickle: bool) -> Listing:
    """A listing whose files were checked. Raises INVALID naming the file that may not be in it."""
    ordered = tuple(sorted(files, key=lambda x: x.path.encode()))
    if not ordered:
        raise invalid("uri", uri, "holds no file", remedy="Name the folder that holds the model's files.")
    check_listing(ordered)
    check_files_allowed(ordered, allow_pickle)
    return Listing(uri, revision, ordered)


__all__ = ["PICKLE_SUFFIXES", "Listing", "check_files_allowed", "is_pickle", "made_listing"]
