"""What an origin's answer means: which bytes it carries, or which error it is. Pure.

Every range must be of the version that was listed. A server tells that by the status 412 where it knows If-Match; many
ignore it, so the entity tag, the total length and the place of each answer are compared as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import ORIGIN_RETRY_AFTER_MAX_S

MODIFIED: Final = "modified:"  # before a version that is an HTTP date
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>", re.ASCII)
_EXPIRED: Final = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestTimeTooSkewed")


class OriginBusy(FalError):
    """BUSY or UNAVAILABLE: come back. `retry_s`: after so many seconds, as the origin asked (0: it did not say)."""

    def __init__(self, code: Code, what: str, *, remedy: str, retry_s: float = 0.0) -> None:
        super().__init__(code, what, remedy=remedy, field="uri")
        self.retry_s = retry_s


class CutShort(FalError):
    """CORRUPT: an answer ended before its last byte. Asking for the rest may help."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for: `length` bytes from `offset` of a file of `size` bytes.

    `label`: how errors call the file; no secret is in it. `version`: what the answer must be, or empty where the
    address itself says so.
    """

    label: str
    offset: int
    length: int
    size: int
    version: str = ""


def check_status(status: int, headers: Mapping[str, str], label: str, now_s: float, *, hub: bool, text: str) -> None:
    """Raise what a status other than 2xx means. `now_s`: wall clock, for dates. `text`: the answer's first bytes."""
    if 200 <= status < 300:
        return
    found = _CODE.search(text)
    code = found[1] if found else ""
    said = f"{status} {code}" if code else str(status)
    if status in (401, 403, 407) or code in _EXPIRED:
        raise _refused(status, headers, label, said, hub=hub, expired=code in _EXPIRED)
    if status in (404, 410):
        raise FalError(
            Code.NOT_FOUND,
            f"{label} is not at the origin ({said})",
            remedy="Check the name, or register the model again.",
            field="uri",
        )
    if status in (412, 416):
        raise changed(label, f"the origin answers {said}")
    if status in (429, 503):
        raise OriginBusy(
            Code.BUSY if status == 429 else Code.UNAVAILABLE,
            f"the origin of {label} asks for patience ({said})",
            remedy="It is tried again by itself.",
            retry_s=retry_after_s(headers.get("Retry-After", ""), now_s),
        )
    if status >= 500 or status in (408, 425):
        raise unavailable(label, f"answers {said}")
    raise invalid("uri", label, f"is answered with {said}", remedy="Check the address and the endpoint.")


def _refused(status: int, headers: Mapping[str, str], label: str, said: str, *, hub: bool, expired: bool) -> FalError:
    if status == 407:
        return FalError(
            Code.UNAUTHENTICATED,
            "the proxy wants a user and a password (407)",
            remedy="Give them in [proxy] of the credentials file.",
            field="proxy",
        )
    code = Code.PERMISSION_DENIED if status == 403 and not expired else Code.UNAUTHENTICATED
    if hub and headers.get("X-Error-Code") == "GatedRepo":
        return gated(label, code)
    remedy = "Give the origin's credentials in the credentials file."
    if hub:
        remedy = "Give a token that may read it: [hf] token in the credentials file, or HF_TOKEN. It may have expired."
    elif code is Code.PERMISSION_DENIED:
        remedy = "Let these credentials read it, or give others in the credentials file."
    return FalError(code, f"the origin refuses to give {label} ({said})", remedy=remedy, field="uri")


def gated(label: str, code: Code) -> FalError:
    """A repository whose licence must be accepted first."""
    return FalError(
        code,
        f"{label} belongs to a gated repository",
        remedy="Accept its licence on the hub with your account, then set that account's token: [hf] token in the "
        "credentials file, or HF_TOKEN. An expired token is refused in the same way.",
        field="uri",
    )


def check_body(status: int, headers: Mapping[str, str], wanted: Wanted) -> int:
    """How many bytes of the body come before the wanted ones: 0, or `wanted.offset` where ranges are ignored.

    Raises CONFLICT when the answer is of another version, FAILED_PRECONDITION (see `no_ranges`) when the server ignores
    ranges and a part was asked for, INVALID for a body that is packed.
    """
    label = wanted.label
    if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise invalid("uri", label, "is sent compressed", remedy="Serve model files without Content-Encoding.")
    _check_version(headers, wanted)
    told = _length(headers)
    if status != 206 and "Content-Range" not in headers:
        if told is not None and told != wanted.size:
            raise changed(label, f"it has {told} bytes, not {wanted.size}")
        return wanted.offset
    # Some servers say 200 and send the range all the same; Content-Range decides.
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        raise changed(label, "the origin does not say which bytes it sends")
    first, last, total = int(found[1]), int(found[2]), found[3]
    if total not in ("*", str(wanted.size)):
        raise changed(label, f"it has {total} bytes, not {wanted.size}")
    if first != wanted.offset or last != wanted.offset + wanted.length - 1:
        raise changed(label, f"asked for {wanted.length} bytes from {wanted.offset}, the origin sends {first}-{last}")
    if told is not None and told != wanted.length:
        raise overlong(label) if told > wanted.length else changed(label, f"the origin sends {told} bytes of a range")
    return 0


def size_of(status: int, headers: Mapping[str, str]) -> int | None:
    """The whole file's length that an answer to a range tells; None when it does not."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is not None:
        return None if found[3] == "*" else int(found[3])
    return _length(headers) if status == 200 else None


def version_of(headers: Mapping[str, str]) -> str:
    """What names this version: the entity tag, else the date of change, else nothing."""
    tag = headers.get("ETag", "").strip()
    if tag:
        return canonical_tag(tag)
    date = headers.get("Last-Modified", "").strip()
    return f"{MODIFIED}{date}" if date else ""


def canonical_tag(tag: str) -> str:
    """An entity tag in quotes: listings of object stores leave them out. A weak one keeps its W/."""
    weak, bare = tag.startswith("W/"), tag.removeprefix("W/").strip('"')
    return f'W/"{bare}"' if weak else f'"{bare}"'


def condition_of(version: str) -> dict[str, str]:
    """Request headers that make a server refuse another version. A weak tag never matches, so it is only compared."""
    if version.startswith(MODIFIED):
        return {"If-Unmodified-Since": version.removeprefix(MODIFIED)}
    return {"If-Match": version} if version.startswith('"') else {}


def _check_version(headers: Mapping[str, str], wanted: Wanted) -> None:
    if not wanted.version:
        return
    date = wanted.version.startswith(MODIFIED)
    here = headers.get("Last-Modified" if date else "ETag", "").strip()
    if not here:
        raise changed(wanted.label, "the origin does not say which version it sends")
    if (f"{MODIFIED}{here}" if date else canonical_tag(here)) != wanted.version:
        raise changed(wanted.label, "it has another version")


def _length(headers: Mapping[str, str]) -> int | None:
    told = headers.get("Content-Length", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) < 20 else None


def retry_after_s(value: str, now_s: float) -> float:
    """Seconds of a Retry-After header, in either of its forms, within [0, 300]; 0 when there is none that is good."""
    value = value.strip()
    try:
        seconds = float(value) if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value, re.ASCII) else _until(value, now_s)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), ORIGIN_RETRY_AFTER_MAX_S)


def _until(date: str, now_s: float) -> float:
    return parsedate_to_datetime(date).timestamp() - now_s


def changed(label: str, why: str) -> FalError:
    """The origin has another file than the one that was listed."""
    return FalError(
        Code.CONFLICT,
        f"{label} changed at the origin: {why}",
        remedy="Register the model again under a new name.",
        field="uri",
    )


def overlong(label: str) -> FalError:
    """More bytes than the range has."""
    return FalError(
        Code.CORRUPT, f"the origin sends more bytes of {label} than asked for", remedy="Check the server.", field="uri"
    )


def cut_short(label: str) -> CutShort:
    """Fewer bytes than the range has."""
    return CutShort(
        Code.CORRUPT,
        f"the origin breaks off {label} before its end",
        remedy="Check the server, and the file there.",
        field="uri",
    )


def unavailable(label: str, why: str) -> OriginBusy:
    """It may work later."""
    return OriginBusy(
        Code.UNAVAILABLE, f"the origin of {label} {why}", remedy="It is tried again by itself; check the origin."
    )


def no_ranges(label: str) -> FalError:
    """A part was asked of a server that only gives whole files."""
    return FalError(
        Code.FAILED_PRECONDITION,
        f"the origin of {label} cannot give a part of a file",
        remedy="Read the file from the start in one pass (offset 0, length = size).",
        field="uri",
    )


__all__ = [
    "MODIFIED",
    "CutShort",
    "OriginBusy",
    "Wanted",
    "canonical_tag",
    "changed",
    "check_body",
    "check_status",
    "condition_of",
    "cut_short",
    "gated",
    "no_ranges",
    "overlong",
    "retry_after_s",
    "size_of",
    "unavailable",
    "version_of",
]
