"""Packs a folder into one read-only file system image, the same bytes for the same content.

EROFS, uncompressed: made at the disk's speed, read without CPU. SquashFS where mkfs.erofs is missing, when asked for,
or when there is an order to keep: `mksquashfs -sort` lays files out by first use, which Debian's mkfs.erofs cannot.

Times of files are kept (Python checks its compiled files by them), the file system's own time and identity are fixed.
Extended attributes are dropped: file capabilities could do nothing in a container without new privileges, and others
need rights that not every packer has, so bytes would differ. Set-uid bits are kept; mounts are nosuid.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_runtime.images.commands import Ran, require, run
from fal_runtime.images.layout import Format
from fal_runtime.images.manifest import too_large

UUID: Final = "fa1c71ff-0000-4000-8000-000000000001"  # of every image: its content is named by its digest
ORDER_PATHS_MAX: Final = 100_000
ORDER_BYTES_MAX: Final = 32 << 20
_SORT_MAX: Final = 32_767
_EXCLUDED_MAX: Final = 1000


def choose_format(asked: str, *, ordered: bool) -> Format:
    """The format for `asked` ("auto", "erofs", "squashfs") with the programs that are here. INVALID,
    FAILED_PRECONDITION."""
    if asked not in ("auto", "erofs", "squashfs"):
        raise invalid("--format", asked, "is no format", remedy="Use auto, erofs or squashfs.")
    if asked == "erofs" and ordered:
        raise invalid("--order", "…", "means nothing to mkfs.erofs", remedy="Use --format squashfs.")
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    if asked == "squashfs" or (asked == "auto" and (ordered or shutil.which("mkfs.erofs", path=path) is None)):
        require("mksquashfs", "squashfs-tools")
        return "squashfs"
    require("mkfs.erofs", "erofs-utils")
    return "erofs"


def sort_list(text: str) -> str:
    """mksquashfs' sort file for an access list: one path a line, the first use first. Pure. INVALID naming the line.

    Priorities are 16 bits: what comes beyond them keeps its own order behind the rest.
    """
    lines: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        path = line.strip().lstrip("/")
        if not path or path in seen:
            continue
        if "\0" in path or ".." in path.split("/"):
            raise invalid("--order", line[:128], f"in line {number} is no path", remedy="Write paths below the root.")
        seen.add(path)
        if len(seen) > ORDER_PATHS_MAX:
            raise invalid("--order", number, "lines are too many", remedy=f"Give at most {ORDER_PATHS_MAX} paths.")
        # Spaces, quotes and backslashes are mksquashfs' own characters.
        quoted = "".join(f"\\{char}" if char in ' \t"\\' else char for char in path)
        lines.append(f"{quoted} {max(1, _SORT_MAX - len(lines))}\n")
    return "".join(lines)


async def make_image(
    root: Path,
    file: Path,
    format: Format,
    *,
    folder: Path,
    one_owner: bool,
    excluded: Sequence[str] = (),
    order: str = "",
    bytes_max: int,
    timeout_s: float,
) -> None:
    """Pack `root` into `file`. `excluded`: paths below the root; `order`: as `sort_list` returns; `folder`: for its
    own files. FAILED_PRECONDITION (too large), NO_CAPACITY (disk full), TIMEOUT."""
    if len(excluded) > _EXCLUDED_MAX:
        raise invalid("source", len(excluded), "device nodes or sockets are too many", remedy="Remove them.")
    argv = _erofs(root, file, one_owner, excluded) if format == "erofs" else _squashfs(root, file, one_owner, excluded)
    if order and format == "squashfs":
        (folder / "order").write_text(order)
        argv += ["-sort", str(folder / "order")]
    ran = await run(argv, timeout_s=timeout_s, folder=folder, file_bytes_max=bytes_max)
    if ran.code:
        raise _failed(ran, format, bytes_max)
    size = file.stat().st_size
    if size > bytes_max:
        raise too_large(size, bytes_max)


def _erofs(root: Path, file: Path, one_owner: bool, excluded: Sequence[str]) -> list[str]:
    argv = [require("mkfs.erofs", "erofs-utils"), "--quiet", "-x-1", "-T0", "--preserve-mtime", f"-U{UUID}"]
    argv += ["--all-root"] if one_owner else []
    argv += [f"--exclude-path={path}" for path in excluded]
    return [*argv, str(file), str(root)]


def _squashfs(root: Path, file: Path, one_owner: bool, excluded: Sequence[str]) -> list[str]:
    argv = [require("mksquashfs", "squashfs-tools"), str(root), str(file), "-noappend", "-quiet", "-no-progress"]
    # Not by SOURCE_DATE_EPOCH: that would set the times of all files, too.
    argv += ["-no-xattrs", "-noI", "-noD", "-noF", "-reproducible", "-mkfs-time", "0"]
    argv += ["-all-root"] if one_owner else []
    return argv + (["-e", *excluded] if excluded else [])


def _failed(ran: Ran, format: Format, bytes_max: int) -> FalError:
    text = ran.stderr.lower() + ran.stdout.decode(errors="replace").lower()
    if "no space left" in text:
        return FalError(Code.NO_CAPACITY, "the disk is full", remedy="Free space, or name another folder.")
    if ran.code in (-25, 128 + 25, 153) or "file too large" in text:  # SIGXFSZ
        return too_large(bytes_max, bytes_max)
    said = [line for line in ran.stderr.splitlines() if line.startswith(("<E>", "FATAL", "mkfs.erofs: "))]
    why = said[0][:512] if said else ran.last_line
    return FalError(Code.FAILED_PRECONDITION, f"{format} cannot hold it: {why}", remedy="Look at the source.")
