"""Which process an image's configuration means: arguments, environment, folder, user. Pure.

Rules are Docker's and the OCI image specification's (conversion.md): a command of ours takes the place of Entrypoint
and Cmd; without one it is Entrypoint followed by Cmd. Users and groups are looked up in the image's own /etc/passwd and
/etc/group, which are as hostile as the rest of it: lines that make no sense are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from fal_contract.errors import Code, FalError, invalid
from fal_runtime.images.layout import ImageConfig

PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IDS_MAX: Final = 65_536  # of a container's user namespace
USER_FILE_BYTES_MAX: Final = 1 << 20  # more of /etc/passwd or /etc/group than that is not read
_GROUPS_MAX: Final = 64


class ImageProcess(NamedTuple):
    """`user` as in an image's configuration: "", "uid", "uid:gid" or names; `user_of` resolves it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    working_dir: str
    user: str


class UserIds(NamedTuple):
    """Ids inside the container."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def process_of(config: ImageConfig, command: Sequence[str], env: Mapping[str, str]) -> ImageProcess:
    """The process to run. `env` wins over the image's. INVALID (field "command") when nobody names a command."""
    argv = tuple(command) or config.entrypoint + config.cmd
    if not argv or not argv[0]:
        raise FalError(
            Code.INVALID,
            "the image names no command",
            remedy='Give the app one: command = ["…"].',
            field="command",
        )
    merged = {"PATH": PATH_DEFAULT, **config.env, **env}
    return ImageProcess(argv, MappingProxyType(merged), config.working_dir, config.user)


def user_of(text: str, passwd: str, group: str) -> UserIds:
    """Ids of `text` ("", "uid", "name", "uid:gid", "name:group" …) by an image's /etc/passwd and /etc/group.

    A number needs no entry. Additional groups are those that list the user, unless `text` names a group (as runc and
    Docker do). INVALID (field "user"): a name that does not exist, an id outside of the container's range.
    """
    user, colon, group_text = text.partition(":")
    entry = _passwd_entry(user or "0", passwd)
    if entry is None and user and not user.isdecimal():
        raise invalid("user", text[:128], "is not in the image's /etc/passwd", remedy="Use a number: USER 1000:1000.")
    name, uid, gid = entry or ("", _id(user or "0", text), 0)
    groups: tuple[int, ...] = ()
    if colon and group_text:
        gid = _group_id(group_text, group, text)
    elif name:
        groups = _groups_of(name, group)
    for one in (uid, gid):
        if one >= IDS_MAX:
            raise invalid("user", text[:128], f"is above {IDS_MAX - 1}", remedy="Use a smaller id in the image.")
    return UserIds(uid, gid, tuple(one for one in groups if one < IDS_MAX and one != gid)[:_GROUPS_MAX])


def home_of(uid: int, passwd: str) -> str:
    """Home folder of `uid` by the image's /etc/passwd; "/" when there is none that is an absolute path."""
    for parts in _lines(passwd, 6):
        if parts[2] == str(uid):
            return parts[5] if parts[5].startswith("/") and "\0" not in parts[5] else "/"
    return "/"


# --- inside -----------------------------------------------------------------------------------------------------------


def _lines(text: str, fields_min: int) -> list[list[str]]:
    rows = (line.split(":") for line in text[:USER_FILE_BYTES_MAX].split("\n") if line and line[0] != "#")
    return [row for row in rows if len(row) >= fields_min and row[2].isdecimal() and row[2].isascii()]


def _id(text: str, whole: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 10:
        raise invalid("user", whole[:128], "is no user", remedy="Use a name or a number.")
    return int(text)


def _passwd_entry(user: str, passwd: str) -> tuple[str, int, int] | None:
    """(name, uid, gid) by name first, else by number."""
    rows = [row for row in _lines(passwd, 4) if row[3].isdecimal() and row[3].isascii()]
    by_name = [row for row in rows if row[0] == user]
    by_id = [row for row in rows if row[2] == user]
    for row in (*by_name, *by_id):
        if len(row[2]) <= 10 and len(row[3]) <= 10:
            return row[0], int(row[2]), int(row[3])
    return None


def _group_id(text: str, group: str, whole: str) -> int:
    for row in _lines(group, 3):
        if text in (row[0], row[2]):
            return _id(row[2], whole)
    if not text.isdecimal():
        raise invalid("user", whole[:128], "names a group that /etc/group of the image lacks", remedy="Use a number.")
    return _id(text, whole)


def _groups_of(name: str, group: str) -> tuple[int, ...]:
    found = (int(row[2]) for row in _lines(group, 4) if len(row[2]) <= 10 and name in row[3].split(","))
    return tuple(dict.fromkeys(found))
