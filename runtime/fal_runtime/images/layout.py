"""The folder of a packed image: `image.erofs` or `image.squashfs`, and `config.json` that says what it is.

The configuration is the first file in order of path, so piece 0 of the artifact holds it. Its content comes from
whoever built the image and is hostile until it was read here: sizes are bounded, values that a kernel or a runtime
could misread are refused, names of variables that no shell could set are dropped with a note. Keys that we do not know
are ignored (the OCI image specification asks for that). Parsing is pure; only `read_layout` touches files.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_CONFIG_BYTES_MAX, IMAGE_SOURCE_CHARS_MAX

CONFIG_FILE: Final = "config.json"
VERSION: Final = 1
Format = Literal["erofs", "squashfs"]
FORMATS: Final[tuple[Format, ...]] = ("erofs", "squashfs")

ARGUMENTS_MAX: Final = 1024
ENV_MAX: Final = 1024
TEXT_BYTES_MAX: Final = 128 << 10  # of one argument or variable: the kernel's MAX_ARG_STRLEN
USER_CHARS_MAX: Final = 256
PATH_BYTES_MAX: Final = 4095
NOTES_MAX: Final = 16

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_PLATFORM: Final = re.compile(r"[a-z0-9]{1,32}/[a-z0-9_]{1,32}(/[a-z0-9_.]{1,32})?")
_REMEDY: Final = "Remove the image and add it again."


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What the image's builder wanted to run. `notes` says what was dropped and why."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    working_dir: str = "/"
    user: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """A packed image on this machine. `file` holds a file system of type `format`; `layer_bytes` as a registry counts
    them, `digest` of the OCI manifest (of a folder that was packed: of the packed file)."""

    file: Path
    format: Format
    source: str
    digest: str
    platform: str
    layer_bytes: int
    config: ImageConfig


def image_file(format: Format) -> str:
    """Name of the packed file in its folder."""
    return f"image.{format}"


def read_layout(folder: Path) -> ImageLayout:
    """Read and check `folder`. CORRUPT naming the field; NOT_FOUND when there is no configuration.

    Reads the configuration only: the packed file may still be arriving.
    """
    path = folder / CONFIG_FILE
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _corrupt(CONFIG_FILE, "is no plain file")
            text = file.read(IMAGE_CONFIG_BYTES_MAX + 1)
    except OSError as exc:
        code = Code.NOT_FOUND if isinstance(exc, FileNotFoundError) else Code.CORRUPT
        raise FalError(code, f"image {path} cannot be read: {exc.strerror}", remedy=_REMEDY) from None
    layout = parse_layout(text, folder)
    try:
        plain = stat.S_ISREG(layout.file.lstat().st_mode)
    except OSError as exc:
        raise _corrupt(layout.file.name, f"cannot be read: {exc.strerror}") from None
    if not plain:
        raise _corrupt(layout.file.name, "is no plain file")
    return layout


def parse_layout(text: bytes, folder: Path) -> ImageLayout:
    """What `config.json` says, for an image in `folder`. Pure. CORRUPT naming the field."""
    table = _object(json_of(text), CONFIG_FILE)
    if table.get("version") != VERSION:
        raise _corrupt("version", f"is {table.get('version')!r}, this release reads {VERSION}")
    format_ = table.get("format")
    if format_ not in FORMATS:
        raise _corrupt("format", f"is {format_!r}, not one of {', '.join(FORMATS)}")
    digest = _text(table, "digest")
    if not _DIGEST.fullmatch(digest):
        raise _corrupt("digest", "is no sha256 digest")
    platform = _text(table, "platform")
    if not _PLATFORM.fullmatch(platform):
        raise _corrupt("platform", "is no platform such as linux/amd64")
    layer_bytes = table.get("layer_bytes")
    if type(layer_bytes) is not int or not 0 <= layer_bytes < 1 << 63:
        raise _corrupt("layer_bytes", "is no number of bytes")
    source = _text(table, "source")
    if len(source) > IMAGE_SOURCE_CHARS_MAX:
        raise _corrupt("source", f"has more than {IMAGE_SOURCE_CHARS_MAX} characters")
    return ImageLayout(
        file=folder / image_file(format_),
        format=format_,
        source=source,
        digest=digest,
        platform=platform,
        layer_bytes=layer_bytes,
        config=parse_config(table.get("config")),
    )


def parse_config(value: object) -> ImageConfig:
    """The "config" object of an OCI image configuration. Pure. CORRUPT naming the field.

    Source: opencontainers/image-spec, config.md (Docker's configuration has the same keys).
    """
    table = {} if value is None else _object(value, "config")
    notes: list[str] = []
    env = _env(table, notes)
    working_dir = _text(table, "WorkingDir") or "/"
    if not working_dir.startswith("/") or len(working_dir.encode()) > PATH_BYTES_MAX:
        raise _corrupt("config.WorkingDir", "is no absolute path")
    if ".." in working_dir.split("/"):
        raise _corrupt("config.WorkingDir", "has '..' in it")
    user = _text(table, "User")
    if len(user) > USER_CHARS_MAX or any(char in user for char in "\n\r/ "):
        raise _corrupt("config.User", "is no user")
    return ImageConfig(
        entrypoint=_arguments(table, "Entrypoint"),
        cmd=_arguments(table, "Cmd"),
        env=MappingProxyType(env),
        working_dir=working_dir,
        user=user,
        notes=tuple(notes[:NOTES_MAX]),
    )


def json_of(text: bytes, what: str = CONFIG_FILE) -> Any:
    """Decode JSON of at most IMAGE_CONFIG_BYTES_MAX bytes. CORRUPT."""
    if len(text) > IMAGE_CONFIG_BYTES_MAX:
        raise _corrupt(what, f"has more than {IMAGE_CONFIG_BYTES_MAX >> 10} KiB")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _corrupt(what, "is no JSON") from None


# --- inside -----------------------------------------------------------------------------------------------------------


def _corrupt(field_: str, why: str) -> FalError:
    return FalError(Code.CORRUPT, f"the image's {field_} {why}", remedy=_REMEDY, field=field_)


def _object(value: object, field_: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _corrupt(field_, "is no JSON object")
    return value


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if value is None:
        return ""
    return _checked(value, key if key[0].islower() else f"config.{key}")


def _checked(value: object, field_: str) -> str:
    if not isinstance(value, str):
        raise _corrupt(field_, "is no text")
    if "\0" in value:
        raise _corrupt(field_, "has a NUL in it")
    try:
        encoded = value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        raise _corrupt(field_, "is no Unicode text") from None
    if len(encoded) >= TEXT_BYTES_MAX:
        raise _corrupt(field_, f"has more than {TEXT_BYTES_MAX >> 10} KiB")
    return value


def _list(table: Mapping[str, Any], key: str, count_max: int) -> Iterator[str]:
    value = table.get(key)
    if value is None:
        return
    if not isinstance(value, list) or len(value) > count_max:
        raise _corrupt(f"config.{key}", f"is no list of at most {count_max} texts")
    for index, one in enumerate(value):
        yield _checked(one, f"config.{key}[{index}]")


def _arguments(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_list(table, key, ARGUMENTS_MAX))


def _env(table: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
    env: dict[str, str] = {}
    for one in _list(table, "Env", ENV_MAX):
        name, equals, value = one.partition("=")
        if not equals:
            notes.append(f"variable {name[:64]!r} has no value and was dropped")
        elif not _ENV_NAME.fullmatch(name):
            notes.append(f"variable {name[:64]!r} has no usable name and was dropped")
        elif name.startswith("FAL_"):
            notes.append(f"variable {name[:64]!r} is ours to set and was dropped")
        else:
            env[name] = value
    return env
