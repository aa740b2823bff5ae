"""Folders that strangers' code has filled: how large they are, and their end.

Invariant: no depth and no name in such a folder ends a walk early or makes a removal fail: nothing here calls itself
once per level, and what cannot be walked is said, not passed over. Everything blocks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError

REMOVE_TIMEOUT_S: Final = 600.0
_LOOKS_MAX: Final = 1 << 18  # open files and mappings, some 3 µs each


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes that its files take on the disk, number of entries; `too_deep`: a folder below was not looked into."""

    bytes: int
    entries: int
    too_deep: bool


def measure(folder: Path, *, entries_max: int, path_chars_max: int) -> Extent:
    """How large it is; stops once it has more than `entries_max`. What vanishes meanwhile is not counted."""
    size = entries = 0
    too_deep = False
    stack = [str(folder)]
    while stack and entries <= entries_max:
        parent = stack.pop()
        if len(parent) - len(str(folder)) > path_chars_max:
            too_deep = True
            continue
        # Gone again, as a compiler's temporary files are.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(parent) as found:
            for entry in found:
                entries += 1
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                    continue
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
    return Extent(size, entries, too_deep)


def held_unlinked(pids: Iterable[int], folder: Path, *, looks_max: int = _LOOKS_MAX) -> tuple[int, bool]:
    """Bytes on the disk of `folder` of files that have no name any more, but that these processes have open or mapped.

    False: there was more than `looks_max` to look at. A thread can have open files of its own, and outlive the first.
    """
    sizes: dict[int, int] = {}
    looks, device = 0, None
    for pid in pids:
        mapped = False
        device = device if device is not None else folder.stat().st_dev
        for thread in _names(f"/proc/{pid}/task"):
            mappings = [] if mapped else _names(f"/proc/{thread}/map_files")  # all its threads have the same
            mapped = mapped or bool(mappings)
            paths = [f"/proc/{thread}/fd/{name}" for name in _names(f"/proc/{thread}/fd")]
            paths += [f"/proc/{thread}/map_files/{name}" for name in mappings]
            looks += len(paths)
            if looks > looks_max:
                return sum(sizes.values()), False
            for path in paths:
                with contextlib.suppress(OSError):
                    found = os.stat(path)
                    if found.st_nlink == 0 and found.st_dev == device:
                        sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values()), True


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it ended
        return []


def remove(folder: Path) -> None:
    """Remove it with all that is in it; what is not there is fine. TIMEOUT: it is removed further when asked again."""
    # `rm` walks by descriptors: shutil.rmtree fails beyond a depth of some hundred, and paths have a largest length.
    argv = ["rm", "-rf", "--one-file-system", "--", str(folder)]
    null = subprocess.DEVNULL
    try:
        subprocess.run(argv, stdin=null, stdout=null, stderr=null, timeout=REMOVE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        what = f"{folder} was not removed within {REMOVE_TIMEOUT_S:.0f} s"
        raise FalError(Code.TIMEOUT, what, remedy="It is tried again; look at the disk.") from None


__all__ = ["Extent", "held_unlinked", "measure", "remove"]
