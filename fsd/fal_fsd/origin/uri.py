"""Names of origins, taken apart and put together again. Pure.

    s3://BUCKET[/PREFIX]               gs://BUCKET[/PREFIX]          az://ACCOUNT/CONTAINER[/PREFIX]
    hf://ORG/REPO[@REVISION][/FOLDER]  file:///FOLDER                push://TEAM/NAME
    https://HOST/PATH                  one file
    https://HOST/PATH/                 a folder with a list of its files, `falctl-files.json` (see `listing`)

A *resolved* URI names a folder with a final '/' and one file without it, so nobody has to ask the origin again which of
both it is. `http://` is for this machine's own servers, and for hosts that the credentials file allows. A URI is
stored, shown and logged; so one that carries a secret is refused, and no error repeats it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from fal_contract.errors import FalError, invalid
from fal_contract.limits import ORIGIN_URI_CHARS_MAX
from fal_contract.model_manifest import check_path

SCHEMES: Final = ("s3", "gs", "az", "hf", "https", "http", "file", "push")
LIST_FILE: Final = "falctl-files.json"
_FORMS: Final = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://ACCOUNT/CONTAINER/PREFIX",
    "hf": "hf://ORG/REPO@REVISION",
    "https": "https://HOST/PATH",
    "http": "https://HOST/PATH",
    "file": "file:///path/to/folder",
    "push": "push://TEAM/NAME",
}
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}", re.ASCII)
_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
_REPO_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,249}", re.ASCII)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?)(:[0-9]{1,5})?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
# Query parameters that carry secrets of the usual stores and mirrors.
_SECRET_KEYS: Final = re.compile(
    r"(?i)(x-(amz|goog)-.*|sig|signature|awsaccesskeyid|key|api_?key|.*token|.*secret.*|passw(or)?d|auth.*|credential.*)"
)
_LOOPBACK: Final = re.compile(r"127(\.[0-9]{1,3}){3}|localhost|\[::1\]")


@dataclass(frozen=True, slots=True)
class OriginUri:
    """A URI's parts.

    `authority`: bucket, ACCOUNT/CONTAINER, ORG/REPO, or host[:port]. `path`: what follows, without the leading '/' (of
    https also the query; of file the absolute path). `revision`: of hf only.
    """

    scheme: str
    authority: str
    path: str = ""
    revision: str = ""

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.path}"
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        if self.scheme == "hf" and not self.path:
            return f"hf://{self.authority}{revision}"
        return f"{self.scheme}://{self.authority}{revision}/{self.path}"

    @property
    def is_folder(self) -> bool:
        """Whether a resolved URI names a folder."""
        return not self.path or self.path.endswith("/")

    @property
    def is_commit(self) -> bool:
        """Whether `revision` cannot move."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def is_loopback(self) -> bool:
        """Whether an https or http host is this machine."""
        return _LOOPBACK.fullmatch(host_of(self.authority)) is not None

    def key_of(self, file_path: str) -> str:
        """Where a file of the listing is: the key in the bucket, the path in the repository or below the host."""
        return f"{self.path}{file_path}" if self.is_folder else self.path

    def as_folder(self) -> OriginUri:
        """The same, named as a folder."""
        return self if self.is_folder else replace(self, path=f"{self.path}/")


def host_of(authority: str) -> str:
    """Host of host[:port], lower case."""
    return re.sub(r":[0-9]+$", "", authority).lower()


def parse_uri(uri: str) -> OriginUri:
    """The parts of `uri`. Raises INVALID naming what is wrong with it; never repeats a secret that stands in it."""
    if len(uri) > ORIGIN_URI_CHARS_MAX:
        raise _wrong(uri, "is too long", "https")
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{x}://" for x in SCHEMES if x not in ("http", "push"))
        raise invalid("uri", _shown(uri), "has no scheme that is known", remedy=f"Use one of {known}.")
    if not uri.isprintable() or "\\" in uri:
        raise _wrong(uri, "holds a control character or a backslash", scheme)
    if "#" in rest or ("?" in rest and scheme not in ("https", "http")):
        raise _wrong(uri, "has a query or a fragment", scheme)
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise _wrong(uri, "holds a user or a password", scheme, remedy="Secrets belong into the credentials file.")
    if scheme in ("https", "http"):
        return _web(uri, scheme, authority, path if slash else "?")
    if scheme == "file":
        return _file(uri, authority, path)
    return _OF[scheme](uri, authority, path)


def with_revision(uri: OriginUri, revision: str) -> OriginUri:
    """`uri` at `revision` (of `--rev`; empty: as it is). Raises INVALID where a revision has no meaning."""
    if not revision:
        return uri
    if uri.scheme != "hf":
        raise invalid(
            "revision", revision[:80], f"means nothing to {uri.scheme}://", remedy="Only hf:// has revisions."
        )
    if uri.revision not in ("", revision):
        raise invalid("revision", revision[:80], "is not the one in the URI", remedy="Give one of them.")
    _check_revision(revision)
    return replace(uri, revision=revision)


def _web(uri: str, scheme: str, authority: str, path: str) -> OriginUri:
    if not _HOST.fullmatch(authority):
        raise _wrong(uri, "names no host", scheme)
    if not uri.isascii() or any(char in uri for char in ' "<>^`{|}'):
        raise _wrong(uri, "holds a blank or a character that must be written as %XX", scheme)
    place, _, query = path.partition("?")
    if path.startswith("?"):
        raise _wrong(uri, "names no file", scheme, remedy="Name a file, or a folder with a final '/'.")
    if any(part in (".", "..") for part in place.split("/")):
        raise _wrong(uri, "holds '.' or '..'", scheme)
    if query and (not place or place.endswith("/")):
        raise _wrong(uri, "is a folder with a query", scheme)
    if any(_SECRET_KEYS.fullmatch(key) for key, _ in parse_qsl(query, keep_blank_values=True)):
        raise _wrong(uri, "holds a secret in its query", scheme, remedy="Secrets belong into the credentials file.")
    return OriginUri(scheme, authority.lower(), path)


def _file(uri: str, authority: str, path: str) -> OriginUri:
    if authority not in ("", "localhost"):
        raise _wrong(uri, "names a host", "file")
    if not path or ".." in path.split("/"):
        raise _wrong(uri, "is not an absolute path without '..'", "file")
    return OriginUri("file", "", f"/{path}")


def _bucket(scheme: str, uri: str, authority: str, path: str) -> OriginUri:
    if not _BUCKET.fullmatch(authority):
        raise _wrong(uri, "names no bucket", scheme)
    return OriginUri(scheme, authority, _prefix(uri, path, scheme))


def _azure(uri: str, authority: str, path: str) -> OriginUri:
    container, _, prefix = path.partition("/")
    if not _ACCOUNT.fullmatch(authority) or not _BUCKET.fullmatch(container):
        raise _wrong(uri, "does not name an account and a container", "az")
    return OriginUri("az", f"{authority}/{container}", _prefix(uri, prefix, "az"))


def _hub(uri: str, authority: str, path: str) -> OriginUri:
    head, _, folder = path.partition("/")
    repo, at, revision = head.partition("@")
    if not _REPO_PART.fullmatch(authority) or not _REPO_PART.fullmatch(repo):
        raise _wrong(uri, "does not name an organisation and a repository", "hf")
    revision = re.sub("(?i)%2f", "/", revision)
    if at:
        _check_revision(revision)
    return OriginUri("hf", f"{authority}/{repo}", _prefix(uri, folder, "hf"), revision)


def _push(uri: str, authority: str, path: str) -> OriginUri:
    if not _REPO_PART.fullmatch(authority) or (path and not _REPO_PART.fullmatch(path)):
        raise _wrong(uri, "names no upload", "push")
    return OriginUri("push", authority, path)


_OF: Final = {
    "s3": lambda uri, authority, path: _bucket("s3", uri, authority, path),
    "gs": lambda uri, authority, path: _bucket("gs", uri, authority, path),
    "az": _azure,
    "hf": _hub,
    "push": _push,
}


def _check_revision(revision: str) -> None:
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise invalid("revision", revision[:80], "is no branch, tag or commit", remedy="Use main, v1.0, or a commit.")


def _prefix(uri: str, path: str, scheme: str) -> str:
    if path.strip("/"):
        try:
            check_path(path.removesuffix("/"))
        except FalError:
            raise _wrong(uri, "has an empty part, '.' or '..' in its path", scheme) from None
    elif path:
        raise _wrong(uri, "has an empty part in its path", scheme)
    return path


def _wrong(uri: str, why: str, scheme: str, *, remedy: str = "") -> FalError:
    return invalid("uri", _shown(uri), why, remedy=remedy or f"Write it as {_FORMS[scheme]}.")


def _shown(uri: str) -> str:
    """`uri` without what might be a secret."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0][:16] + "://…"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"[:120] if parts.scheme else uri.partition("?")[0][:120]


__all__ = ["LIST_FILE", "SCHEMES", "OriginUri", "host_of", "parse_uri", "with_revision"]
