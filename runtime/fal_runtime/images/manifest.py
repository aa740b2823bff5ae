"""OCI indexes, manifests and configurations as registries and layouts hold them, checked before anything is fetched.

Pure. Sources: opencontainers/image-spec (image-index.md, manifest.md, config.md) and Docker's image manifest v2,
schema 2, whose media types mean the same. Everything here was written by strangers: sizes, counts, types are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_runtime.images.source import DIGEST, Platform

MANIFEST_BYTES_MAX: Final = 4 << 20  # as registries have it
CONFIG_BLOB_BYTES_MAX: Final = 4 << 20
LAYERS_MAX: Final = 1024
MANIFESTS_MAX: Final = 4096  # of one index
INDEX_DEPTH_MAX: Final = 4

_INDEX_TYPES: Final = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
_MANIFEST_TYPES: Final = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
_CONFIG_TYPES: Final = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
PLAIN_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
ZSTD_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+zstd"
_LAYER_TYPES: Final = frozenset(
    {
        PLAIN_LAYER_TYPE,
        "application/vnd.oci.image.layer.v1.tar+gzip",
        ZSTD_LAYER_TYPE,
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    }
)
_REF_NAME: Final = "org.opencontainers.image.ref.name"
_REMEDY: Final = "Build or push the image again."


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob: its digest ("sha256:…"), size in bytes and media type. `platform` and `name` where the index says so."""

    digest: str
    size_bytes: int
    media_type: str
    platform: Platform | None = None
    name: str = ""

    @property
    def is_index(self) -> bool:
        return self.media_type in _INDEX_TYPES


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def layer_bytes(self) -> int:
        """As the registry sends them."""
        return sum(layer.size_bytes for layer in self.layers)


def parse_index(text: bytes) -> tuple[Descriptor, ...]:
    """The manifests of an index. CORRUPT."""
    table = _table(text, "index")
    found = table.get("manifests")
    if not isinstance(found, list) or len(found) > MANIFESTS_MAX:
        raise _corrupt("index", f"has no list of at most {MANIFESTS_MAX} manifests")
    return tuple(_descriptor(one, "index") for one in found)


def media_type(text: bytes) -> str:
    """Of a document that a registry sent: OCI ones may leave it out. CORRUPT."""
    table = _table(text, "manifest")
    named = table.get("mediaType")
    if isinstance(named, str) and named:
        return named
    if table.get("schemaVersion") == 1:
        return "application/vnd.docker.distribution.manifest.v1+json"
    kinds = ("application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json")
    return kinds[0] if "manifests" in table else kinds[1]


def is_index(text: bytes) -> bool:
    """Whether the document lists images of several platforms. CORRUPT."""
    return media_type(text) in _INDEX_TYPES


def parse_manifest(text: bytes, *, bytes_max: int) -> Manifest:
    """An image's manifest. CORRUPT; FAILED_PRECONDITION: other types, or layers above the bound."""
    kind = media_type(text)
    if kind not in _MANIFEST_TYPES:
        raise _refused(f"the manifest is a {kind[:128]!r}, which is no image of today", _REMEDY)
    table = _table(text, "manifest")
    config = _descriptor(table.get("config"), "manifest.config")
    if config.media_type not in _CONFIG_TYPES:
        raise _refused(f"its configuration is a {config.media_type[:128]!r}: this is no container image", _REMEDY)
    if config.size_bytes > CONFIG_BLOB_BYTES_MAX:
        raise _refused(
            f"its configuration has {config.size_bytes} bytes, at most {CONFIG_BLOB_BYTES_MAX} are read", _REMEDY
        )
    found = table.get("layers")
    if not isinstance(found, list) or len(found) > LAYERS_MAX:
        raise _corrupt("manifest", f"has no list of at most {LAYERS_MAX} layers")
    layers = tuple(_descriptor(one, "manifest.layers") for one in found)
    if not layers:
        raise _refused("the image is empty: it has no layers", "Add files to it.")
    for layer in layers:
        if layer.media_type not in _LAYER_TYPES:
            remedy = "Push it with gzip or zstd layers."
            raise _refused(f"a layer is a {layer.media_type[:128]!r}, which is not unpacked here", remedy)
    manifest = Manifest(config, layers)
    if manifest.layer_bytes > bytes_max:
        raise too_large(manifest.layer_bytes, bytes_max)
    return manifest


def choose(found: Sequence[Descriptor], platform: Platform) -> Descriptor:
    """The manifest for `platform`; the first, should there be several. FAILED_PRECONDITION naming what there is."""
    for one in found:
        if one.platform is not None and _runs(one.platform, platform):
            return one
    bare = [one for one in found if one.platform is None]
    if len(bare) == 1 and len(found) == 1:
        return bare[0]  # its configuration says which it is for
    there = sorted({str(one.platform) for one in found if one.platform is not None})
    has = ", ".join(there[:8]) or "none"
    raise _refused(f"the image has nothing for {platform}, only: {has}", "Build it for this platform, or name another.")


def named(found: Sequence[Descriptor], tag: str) -> tuple[Descriptor, ...]:
    """What an OCI layout's index has under `tag`; without one, all of it. NOT_FOUND naming what there is."""
    if not tag:
        if not found:
            raise FalError(Code.NOT_FOUND, "the layout holds no image", remedy="Put one in it.", field="source")
        return tuple(found)
    chosen = tuple(one for one in found if one.name == tag or one.name.endswith(f":{tag}"))
    if not chosen:
        there = ", ".join(sorted({one.name for one in found if one.name})[:8]) or "none"
        raise FalError(
            Code.NOT_FOUND, f"the layout has no tag {tag!r}, only: {there}", remedy="Name one of them.", field="source"
        )
    return chosen


def config_of(text: bytes, platform: Platform) -> Mapping[str, Any]:
    """The "config" object of an image configuration. CORRUPT, or FAILED_PRECONDITION: it is for another platform."""
    table = _table(text, "configuration")
    meant = Platform(*(_word(table, key) for key in ("os", "architecture", "variant")))
    if meant.os and meant.architecture and not _runs(meant, platform):
        raise _refused(f"the image is for {meant}, not for {platform}", "Build it for this platform, or name another.")
    config = table.get("config")
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise _corrupt("configuration", "has a config that is no JSON object")
    return config


def diff_ids_of(text: bytes) -> tuple[str, ...]:
    """Digests of the layers as plain tars, by an image configuration. CORRUPT."""
    rootfs = _table(text, "configuration").get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, str) and DIGEST.fullmatch(one) for one in found):
        raise _corrupt("configuration", "has no digests of its layers")
    return tuple(found)


def too_large(bytes_: int, bytes_max: int) -> FalError:
    """The one form of this refusal."""
    return _refused(
        f"the image has at least {bytes_} bytes, the bound is {bytes_max}", "Make it smaller, or raise --bytes-max."
    )


# --- inside -----------------------------------------------------------------------------------------------------------


def _refused(what: str, remedy: str) -> FalError:
    return FalError(Code.FAILED_PRECONDITION, what, remedy=remedy, field="source")


def _corrupt(what: str, why: str) -> FalError:
    return FalError(Code.CORRUPT, f"the image's {what} {why}", remedy=_REMEDY, field="source")


def _table(text: bytes, what: str) -> Mapping[str, Any]:
    if len(text) > MANIFEST_BYTES_MAX:
        raise _corrupt(what, f"has more than {MANIFEST_BYTES_MAX >> 20} MiB")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise _corrupt(what, "is no JSON") from None
    if not isinstance(table, dict):
        raise _corrupt(what, "is no JSON object")
    return table


def _word(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    return value[:64] if isinstance(value, str) else ""


def _descriptor(value: object, what: str) -> Descriptor:
    if not isinstance(value, dict):
        raise _corrupt(what, "has an entry that is no JSON object")
    digest, size = value.get("digest"), value.get("size")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise _corrupt(what, "has an entry without a sha256 digest")
    if type(size) is not int or not 0 <= size < 1 << 50:
        raise _corrupt(what, "has an entry without a size")
    kind = value.get("mediaType")
    table = value.get("platform")
    platform = None
    if isinstance(table, dict) and _word(table, "os") not in ("", "unknown"):
        platform = Platform(_word(table, "os"), _word(table, "architecture"), _word(table, "variant"))
    notes = value.get("annotations")
    name = notes.get(_REF_NAME) if isinstance(notes, dict) else ""
    return Descriptor(
        digest, size, kind if isinstance(kind, str) else "", platform, name if isinstance(name, str) else ""
    )


def _runs(has: Platform, wanted: Platform) -> bool:
    """Whether what `has` says will do: a variant matters only where both name one (arm64 means arm64/v8)."""
    same = (has.os, has.architecture) == (wanted.os, wanted.architecture)
    return same and (not has.variant or not wanted.variant or has.variant == wanted.variant)
