"""Unpacks one image of an OCI layout with umoci, which applies whiteouts and keeps every name inside the root.

umoci checks the digest of each layer, packed and unpacked. `umoci raw unpack` is used: it makes the same files as
`umoci unpack` without hashing all of them again for a list that nobody here reads. Three ways, by who we are:

- root of the machine: ownership is kept;
- root of a user namespace (a node's pack task): the same; umoci sees that it cannot make device nodes and makes empty
  files, which it names in its log and which are removed here;
- an ordinary user: `--rootless`; all files belong to root in the packed image (`Unpacked.one_owner`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_runtime.images.commands import Ran, require, run
from fal_runtime.images.manifest import (
    CONFIG_BLOB_BYTES_MAX,
    INDEX_DEPTH_MAX,
    MANIFEST_BYTES_MAX,
    PLAIN_LAYER_TYPE,
    ZSTD_LAYER_TYPE,
    Descriptor,
    Manifest,
    choose,
    config_of,
    diff_ids_of,
    is_index,
    named,
    parse_index,
    parse_manifest,
    too_large,
)
from fal_runtime.images.process import IDS_MAX
from fal_runtime.images.source import Platform
from fal_runtime.images.tree import Findings, Growth, inspect

_DEVICE: Final = re.compile(r"rootless\{(?P<path>.*)\} creating empty file in place of device")
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_DEVICES_MAX: Final = 10_000
_TAG: Final = "image"
_MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"


@dataclass(frozen=True, slots=True)
class LayoutImage:
    """One image of a layout on disk. `config` is the "config" object of its configuration, `diff_ids` the digests of
    its layers as plain tars."""

    layout: Path
    digest: str
    manifest: Manifest
    config: Mapping[str, Any]
    diff_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """`root` is the folder to pack; `one_owner`: ownership was lost, all of it is to be root's."""

    root: Path
    one_owner: bool
    findings: Findings
    notes: tuple[str, ...] = field(default=())


def find_image(layout: Path, tag: str, platform: Platform, *, bytes_max: int) -> LayoutImage:
    """The image of `platform` under `tag` (empty: the only one). Small blobs only are read, each checked by its digest.

    NOT_FOUND, CORRUPT, FAILED_PRECONDITION.
    """
    found = named(parse_index(_bounded(layout / "index.json", MANIFEST_BYTES_MAX)), tag)
    for _ in range(INDEX_DEPTH_MAX):
        one = found[0] if len(found) == 1 else choose(found, platform)
        text = _blob(layout, one, MANIFEST_BYTES_MAX)
        if not is_index(text):
            manifest = parse_manifest(text, bytes_max=bytes_max)
            text = _blob(layout, manifest.config, CONFIG_BLOB_BYTES_MAX)
            diff_ids = diff_ids_of(text)
            if len(diff_ids) != len(manifest.layers):
                raise FalError(Code.CORRUPT, "the image's configuration is of other layers", remedy="Build it again.")
            return LayoutImage(layout, one.digest, manifest, config_of(text, platform), diff_ids)
        found = parse_index(text)
        if not found:
            raise FalError(Code.FAILED_PRECONDITION, "the image's index is empty", remedy="Build it again.")
        found = (choose(found, platform),)
    raise FalError(Code.CORRUPT, "the image's indexes nest too deep", remedy="Build it again.", field="source")


async def pinned_layout(image: LayoutImage, folder: Path, *, bytes_max: int, timeout_s: float) -> Path:
    """A layout whose only image is `image`, sharing its blobs: whatever else the first one says, umoci sees one.

    umoci 0.4.7 cannot read zstd: such layers are inflated beside it. Their plain form has the digest that the
    configuration tells, by which umoci checks it.
    """
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(mode=0o700, parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    layers, growth = [], Growth(folder, bytes_max)
    for one, diff_id in zip(image.manifest.layers, image.diff_ids, strict=True):
        described = {"mediaType": one.media_type, "digest": one.digest, "size": one.size_bytes}
        if one.media_type == ZSTD_LAYER_TYPE:
            plain = _blob_path(folder, diff_id)
            await _inflated(_blob_path(image.layout, one.digest), plain, growth, bytes_max, timeout_s)
            described = {"mediaType": PLAIN_LAYER_TYPE, "digest": diff_id, "size": plain.stat().st_size}
        else:
            _share(image.layout, folder, one.digest)
        layers.append(described)
    config = image.manifest.config
    _share(image.layout, folder, config.digest)
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, "digest": config.digest, "size": config.size_bytes},
        "layers": layers,
    }
    text = json.dumps(manifest).encode()
    digest = hashlib.sha256(text).hexdigest()
    (blobs / digest).write_bytes(text)
    described = {"mediaType": _MANIFEST_TYPE, "digest": f"sha256:{digest}", "size": len(text)}
    annotated = {**described, "annotations": {"org.opencontainers.image.ref.name": _TAG}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [annotated]}))
    return folder


async def unpack(
    image: LayoutImage,
    folder: Path,
    *,
    bytes_max: int,
    timeout_s: float,
    say: Callable[[str], None] = lambda text: None,
) -> Unpacked:
    """Unpack below `folder`, which is made. FAILED_PRECONDITION (too large), CORRUPT (umoci's reason), TIMEOUT."""
    folder.mkdir(mode=0o700)
    layout = await pinned_layout(image, folder / "layout", bytes_max=bytes_max, timeout_s=timeout_s)
    # A folder of its own: `.wh...` in an image's root would name the folder above.
    root = folder / "unpacked" / "root"
    root.parent.mkdir(mode=0o700)
    ordinary = os.geteuid() != 0
    argv = [require("umoci", "umoci"), "--log=warn", "raw", "unpack", *(["--rootless"] if ordinary else [])]
    devices: list[str] = []
    growth, began_s = Growth(root.parent, bytes_max), SystemClock().wall_s()

    def line(text: str) -> None:
        found = _DEVICE.search(_ANSI.sub("", text))
        if found is not None and len(devices) < _DEVICES_MAX:
            devices.append(found["path"])

    ran = await run(
        [*argv, "--image", f"{layout}:{_TAG}", str(root)],
        timeout_s=timeout_s, folder=folder, file_bytes_max=bytes_max, watch=growth.check, on_line=line,
    )  # fmt: skip
    if ran.code:
        raise _failed(ran, root)
    if not root.is_dir() or root.is_symlink():
        raise FalError(Code.CORRUPT, "the image removes its own root", remedy="Do not use it.", field="source")
    say("checking files")
    removed = sum(1 for path in devices if _remove_empty(root, path))
    findings = await asyncio.to_thread(
        inspect, root, bytes_max=bytes_max, ids_max=IDS_MAX, since_s=began_s, repair=True
    )
    if not findings.size.files:
        raise FalError(
            Code.FAILED_PRECONDITION, "the image is empty: its layers hold no files", remedy="Add files to it."
        )
    return Unpacked(root, ordinary, findings, tuple(notes_of(findings, removed=removed, one_owner=ordinary)))


def notes_of(findings: Findings, *, removed: int = 0, one_owner: bool) -> list[str]:
    """What an operator should know about the packed image, in sentences. Pure."""
    notes = []
    if left_out := removed + len(findings.special):
        notes.append(f"{left_out} device nodes or sockets were left out")
    if findings.ids_beyond and not one_owner:
        notes.append(f"{findings.ids_beyond} files belong to ids above {IDS_MAX - 1}, which containers see as nobody's")
    if one_owner:
        notes.append("packed by an ordinary user: all files belong to root")
    if findings.unreadable:
        notes.append(f"{findings.unreadable} files had to be made readable for their owner")
    return notes


# --- inside -----------------------------------------------------------------------------------------------------------


def _failed(ran: Ran, root: Path) -> FalError:
    text = ran.stderr.lower()
    why = ran.last_line.removeprefix("⨯").strip().replace(str(root), "")
    if "no space left" in text:
        return FalError(Code.NO_CAPACITY, "the disk is full", remedy="Free space, or name another --work folder.")
    if "file too large" in text:
        return FalError(
            Code.FAILED_PRECONDITION,
            "a file of the image is above --bytes-max",
            remedy="Make it smaller.",
            field="source",
        )
    return FalError(
        Code.CORRUPT, f"the image cannot be unpacked: {why}", remedy="Build or push it again.", field="source"
    )


def _share(source: Path, layout: Path, digest: str) -> None:
    link = _blob_path(layout, digest)
    if not link.is_symlink():  # an image may name a blob twice
        link.symlink_to(_blob_path(source, digest).absolute())


async def _inflated(packed: Path, plain: Path, growth: Growth, bytes_max: int, timeout_s: float) -> None:
    """CORRUPT, FAILED_PRECONDITION (too large)."""
    argv = [require("zstd", "zstd"), "-d", "-q", "-f", "--no-sparse", "-o", str(plain), str(packed.resolve())]
    ran = await run(argv, timeout_s=timeout_s, folder=plain.parent, file_bytes_max=bytes_max, watch=growth.check)
    if ran.code in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ) or "file too large" in ran.stderr.lower():
        raise too_large(bytes_max, bytes_max)
    if ran.code:
        what = f"a zstd layer cannot be inflated: {ran.last_line.replace(str(packed), packed.name)}"
        raise FalError(Code.CORRUPT, what, remedy="Build or push it again.", field="source")


def _blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _blob(layout: Path, blob: Descriptor, bytes_max: int) -> bytes:
    text = _bounded(_blob_path(layout, blob.digest), bytes_max)
    if f"sha256:{hashlib.sha256(text).hexdigest()}" != blob.digest:
        raise FalError(
            Code.CORRUPT, f"blob {blob.digest[:19]}… is not what its digest says", remedy="Copy the image again."
        )
    return text


def _bounded(path: Path, bytes_max: int) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FalError(Code.CORRUPT, f"{path} is no plain file", remedy="Copy the image again.")
            text = file.read(bytes_max + 1)
    except OSError as exc:
        code = Code.NOT_FOUND if isinstance(exc, FileNotFoundError) else Code.FAILED_PRECONDITION
        raise FalError(code, f"{path} cannot be read: {exc.strerror}", remedy="Name an OCI layout.") from None
    if len(text) > bytes_max:
        raise FalError(Code.CORRUPT, f"{path} has more than {bytes_max} bytes", remedy="Build the image again.")
    return text


def _remove_empty(root: Path, path: str) -> bool:
    """Remove an empty plain file that umoci made for a device; `path` is a stranger's: no link is followed."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return False
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        facts = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size:
            return False
        os.unlink(parts[-1], dir_fd=folder)
    except OSError:
        return False  # a later layer has put something else there
    finally:
        os.close(folder)
    return True
