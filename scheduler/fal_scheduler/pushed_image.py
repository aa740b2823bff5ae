"""What an operator's machine says of an image that it packed and pushes, checked. Pure."""

from __future__ import annotations

import re
from typing import Final

from fal_contract.artifact import Artifact
from fal_contract.errors import FalError, invalid
from fal_contract.limits import IMAGE_BYTES_MAX, IMAGE_SOURCE_CHARS_MAX
from fal_contract.v1 import state_pb2
from fal_scheduler.codec_weights import image_from_pb
from fal_scheduler.core.image_source import check_platform
from fal_scheduler.core.records import HOST_IMAGE, ImageFacts

LOCAL_SOURCES: Final = ("oci:", "docker-archive:", "rootfs:")
_FORMATS: Final = ("erofs", "squashfs")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def pushed_image(message: state_pb2.ImageFacts, artifact: Artifact) -> ImageFacts:
    """The facts of a pushed image. INVALID naming the field: they do not fit its files."""
    if artifact.uri.rpartition("/")[2] == HOST_IMAGE:
        raise _bad("id", artifact.uri.removeprefix("push://"), "is the name of the node's own system")
    if not message.source.startswith(LOCAL_SOURCES) or len(message.source) > IMAGE_SOURCE_CHARS_MAX:
        raise _bad("image.source", message.source[:80], "is no source of an operator's machine")
    if not _DIGEST.fullmatch(message.digest):
        raise _bad("image.digest", message.digest[:80], "is no digest")
    if message.format not in _FORMATS:
        raise _bad("image.format", message.format[:32], "is no format")
    if not message.platform:
        raise _bad("image.platform", "", "is missing")
    check_platform(message.platform)
    if message.first_pieces:
        raise _bad("image.first_pieces", len(message.first_pieces), "are found by a recorded start only")
    files = [file.path for file in artifact.files]
    if files != ["config.json", f"image.{message.format}"]:
        raise _bad("manifest", ", ".join(files[:4])[:80], "is not config.json and one image file")
    if artifact.bytes_total > IMAGE_BYTES_MAX:
        raise _bad("manifest", artifact.bytes_total, "bytes are too many")
    return image_from_pb(message)


def _bad(field: str, value: object, why: str) -> FalError:
    return invalid(
        field, value, why, remedy="Use `falctl image add` of this release, and another name if it is the name."
    )
