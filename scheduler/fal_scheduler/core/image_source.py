"""What names an image in a registry, checked before anybody asks the registry. Pure."""

from __future__ import annotations

import re
from typing import Final

from fal_contract.errors import invalid
from fal_contract.limits import IMAGE_SOURCE_CHARS_MAX

PLATFORM_DEFAULT: Final = "linux/amd64"
_HEAD: Final = "docker://"
_LOCAL: Final = ("oci:", "oci-archive:", "docker-archive:", "rootfs:", "dir:")
_HOST: Final = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
_PART: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
_PLATFORM: Final = re.compile(r"linux/[a-z0-9]+(?:/v[0-9]+)?")


def check_source(source: str) -> str:
    """`docker://REGISTRY/REPO:TAG` or `…@sha256:…`, as it is; else INVALID naming `source`, without a password."""
    if source.startswith(_LOCAL):
        what = f"is on the operator's machine ({source.partition(':')[0]})"
        raise invalid("source", source[:80], what, remedy="`falctl image add` packs it there and pushes it.")
    if not source.startswith(_HEAD):
        raise invalid("source", source[:80], "is no registry's", remedy="Write docker://REGISTRY/REPO:TAG.")
    name = source.removeprefix(_HEAD)
    user, at, _ = name.partition("/")[0].rpartition("@")
    if at and user:
        what = "holds credentials, which would be stored and shown"
        raise invalid("source", f"{_HEAD}…@{name.rpartition('@')[2][:60]}", what, remedy="Use --auth-secret.")
    if len(source) > IMAGE_SOURCE_CHARS_MAX or not _NAME.fullmatch(name):
        remedy = "Write docker://REGISTRY/REPO:TAG or docker://REGISTRY/REPO@sha256:DIGEST."
        raise invalid("source", source[:80], "names no image", remedy=remedy)
    return source


def check_platform(platform: str) -> str:
    """`linux/amd64` …; empty: that. INVALID naming `platform`."""
    if platform and (len(platform) > 64 or not _PLATFORM.fullmatch(platform)):
        raise invalid("platform", platform[:64], "is no platform", remedy="Write linux/amd64 or linux/arm64.")
    return platform or PLATFORM_DEFAULT


__all__ = ["PLATFORM_DEFAULT", "check_platform", "check_source"]
