"""The folder in which a container finds its secrets, one file each.

Invariant: values lie in memory only, and go with the container. On an isolating driver the folder is a tmpfs of its
own, never swapped where the kernel can promise that, read-only once it is filled, owned by the container's user. On
the process driver it is a folder of mode 0700 on the machine's own tmpfs, which every process of the same user can
read. Made by the drivers; nobody else writes there. Values never get into errors or logs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError, invalid
from fal_contract.limits import SECRET_BYTES_MAX, SECRETS_PER_APP_MAX
from fal_runtime.driver import driver_failed
from fal_runtime.oci import mounts

FOLDER: Final = "secrets"  # in a container's run directory
FILE_MODE: Final = 0o400
_PAGE_BYTES: Final = 4096
_SOURCE: Final = "falctl-secrets"
_FLAGS: Final = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC | mounts.MS_NOSYMFOLLOW
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def check(values: Mapping[str, bytes]) -> None:
    """Raise INVALID for names that are no file names, and for too many or too large values."""
    if len(values) > SECRETS_PER_APP_MAX + 1:
        raise invalid("secrets", len(values), "are too many", remedy=f"At most {SECRETS_PER_APP_MAX}.")
    for name, value in values.items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise invalid("secrets", name[:80], "is not a file name", remedy="Use a-z, 0-9, '.', '_' and '-'.")
        if len(value) > SECRET_BYTES_MAX:
            raise invalid("secrets", name, "is too large", remedy=f"At most {SECRET_BYTES_MAX} bytes.")


def create(path: Path, values: Mapping[str, bytes], *, owner_uid: int) -> None:
    """A read-only tmpfs at `path` with a file for each value, readable by `owner_uid` (a host id) alone."""
    check(values)
    remove(path)  # of a creation that was interrupted
    path.mkdir(parents=True, mode=0o700)
    options = f"{_room(values)},mode=0500,uid={owner_uid},gid={owner_uid}"
    try:
        mounts.mount(_SOURCE, path, "tmpfs", _FLAGS, f"{options},noswap")
    except FalError:  # kernels before 6.4
        mounts.mount(_SOURCE, path, "tmpfs", _FLAGS, options)
    _fill(path, values, owner_uid)
    mounts.mount(_SOURCE, path, "tmpfs", _FLAGS | mounts.MS_REMOUNT | mounts.MS_RDONLY)


def replace_all(path: Path, values: Mapping[str, bytes], *, owner_uid: int) -> None:
    """Have these in the tmpfs of `create` in place of what it was made with; who has it bound sees them, too."""
    check(values)
    mounts.mount(_SOURCE, path, "tmpfs", _FLAGS | mounts.MS_REMOUNT, _room(values))
    for old in list(path.iterdir()):
        old.unlink()
    _fill(path, values, owner_uid)
    mounts.mount(_SOURCE, path, "tmpfs", _FLAGS | mounts.MS_REMOUNT | mounts.MS_RDONLY)


def _room(values: Mapping[str, bytes]) -> str:
    """Mount options: as large as these values, and one page and one file more."""
    pages = sum(-(-len(value) // _PAGE_BYTES) for value in values.values()) + 1
    return f"size={pages * _PAGE_BYTES},nr_inodes={len(values) + 2}"


def remove_plain(container: Path) -> None:
    """Take away what the process driver's container with this folder has, if it has any."""
    for parent in _plain_parents():
        remove(parent / _plain_name(container))


def plain_path(container: Path) -> Path:
    """Where the process driver's container with this folder has its secrets."""
    parent = next((one for one in _plain_parents() if os.access(one, os.W_OK)), None)
    if parent is None:
        raise driver_failed(
            "there is no memory to keep secrets in: neither /dev/shm nor XDG_RUNTIME_DIR can be written",
            remedy="Mount a tmpfs at /dev/shm, or run the app on a node with the oci driver.",
        )
    return parent / _plain_name(container)


def _plain_parents() -> list[Path]:
    return [Path(one) for one in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", "")) if one]


def _plain_name(container: Path) -> str:
    return f"falctl-{os.geteuid()}-{hashlib.sha256(os.fsencode(container)).hexdigest()[:16]}"


def create_plain(path: Path, values: Mapping[str, bytes]) -> None:
    """A folder for the process driver."""
    check(values)
    remove(path)
    path.mkdir(mode=0o700)
    _fill(path, values, os.geteuid())


def remove(path: Path) -> None:
    """Take it away, mounted or not; a path that does not exist is fine."""
    mounts.unmount_all(path)
    shutil.rmtree(path, ignore_errors=True)


def _fill(path: Path, values: Mapping[str, bytes], owner_uid: int) -> None:
    for name, value in values.items():
        fd = os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        with open(fd, "wb", buffering=0) as file:
            file.write(value)
            os.fchmod(fd, FILE_MODE)
            if owner_uid != os.geteuid():
                os.fchown(fd, owner_uid, owner_uid)
