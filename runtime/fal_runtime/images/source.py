"""Where an image comes from, as an operator writes it. Pure.

`docker://[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`, `oci:DIR[:TAG]`, `docker-archive:FILE`, `rootfs:DIR`. Without a
registry it is Docker's own, as everywhere. Credentials never stand in a source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fal_contract.errors import invalid
from fal_contract.limits import IMAGE_SOURCE_CHARS_MAX

SourceKind = Literal["docker", "oci", "docker-archive", "rootfs"]
TAG_DEFAULT: Final = "latest"
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

_REMEDY: Final = "Write docker://REGISTRY/REPOSITORY:TAG, oci:DIR[:TAG], docker-archive:FILE or rootfs:DIR."
_REGISTRY: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9a-fA-F:]{2,45}\])(?::[0-9]{1,5})?")
# distribution/reference: lower case path components with single separators.
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_REGISTRY_DEFAULT: Final = "docker.io"
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PLATFORM: Final = re.compile(r"([a-z0-9]{1,32})/([a-z0-9_]{1,32})(?:/([a-z0-9_.]{1,32}))?")
_REPOSITORY_CHARS_MAX: Final = 255


@dataclass(frozen=True, slots=True)
class Source:
    """One of four kinds. `registry`, `repository`, `digest`: of docker; `path`: of the others; `tag`: of docker, oci"""

    kind: SourceKind
    text: str
    registry: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""
    path: Path = Path()

    @property
    def local(self) -> bool:
        """Whether it is on the machine that packs."""
        return self.kind != "docker"

    def reference(self, digest: str = "") -> str:
        """What skopeo takes, of a docker source; pinned to `digest` where one is given."""
        pinned = digest or self.digest
        return f"docker://{self.registry}/{self.repository}" + (f"@{pinned}" if pinned else f":{self.tag}")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system, an architecture and, rarely, its variant, in Go's words."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def parse_source(text: str) -> Source:
    """INVALID (field "source") saying what is wrong."""
    if len(text) > IMAGE_SOURCE_CHARS_MAX:
        raise invalid("source", text[:64] + "…", "is too long", remedy=_REMEDY)
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in text):
        raise invalid("source", text, "has a control character in it", remedy=_REMEDY)
    if text.startswith("docker://"):
        return _docker(text)
    kinds: tuple[SourceKind, ...] = ("oci", "docker-archive", "rootfs")
    for kind in kinds:
        if text.startswith(f"{kind}:"):
            return _local(text, kind, text[len(kind) + 1 :])
    raise invalid("source", text, "is of no kind that is known", remedy=_REMEDY)


def parse_platform(text: str) -> Platform:
    """INVALID (field "platform")."""
    found = _PLATFORM.fullmatch(text)
    if found is None:
        raise invalid("platform", text[:128], "is no platform", remedy="Write OS/ARCHITECTURE, such as linux/amd64.")
    return Platform(found[1], found[2], found[3] or "")


def _docker(text: str) -> Source:
    rest = text.removeprefix("docker://")
    if "@" in rest.partition("/")[0]:  # the value is not repeated: it may hold a password
        remedy = "Give them by a secret or --authfile."
        raise invalid("source", "docker://…@…", "has credentials in it", remedy=remedy)
    if "@" in rest and not DIGEST.fullmatch(rest.partition("@")[2]):
        raise invalid("source", text, "has no sha256 digest behind '@'", remedy=_REMEDY)
    rest, _, digest = rest.partition("@")
    registry, slash, path = rest.partition("/")
    if not slash or not re.search(r"[.:\]]|^localhost$", registry):
        registry, path = _REGISTRY_DEFAULT, rest if slash else f"library/{rest}"
    if not _REGISTRY.fullmatch(registry):
        raise invalid("source", text, "names no registry", remedy="Write docker://REGISTRY/REPOSITORY:TAG.")
    repository, _, tag = path.partition(":")
    port = registry.rpartition("]")[2].partition(":")[2]
    if port and not 0 < int(port) < 65536:
        raise invalid("source", text, "names a port that cannot be", remedy=_REMEDY)
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _REPOSITORY_CHARS_MAX:
        raise invalid("source", text, "names no repository", remedy="Repositories are lower case: team/name.")
    if ":" in path and not _TAG.fullmatch(tag):
        raise invalid("source", text, "has no tag behind ':'", remedy=_REMEDY)
    return Source("docker", text, registry, repository, tag or TAG_DEFAULT, digest)


def _local(text: str, kind: SourceKind, path: str) -> Source:
    tag = ""
    if kind == "oci":
        before, colon, after = path.rpartition(":")
        if colon and before and "/" not in after:
            path, tag = before, after
            if not _TAG.fullmatch(tag):
                raise invalid("source", text, "has no tag behind ':'", remedy=_REMEDY)
    if not path:
        raise invalid("source", text, "names no path", remedy=_REMEDY)
    return Source(kind, text, tag=tag, path=Path(path))
