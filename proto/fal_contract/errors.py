"""Errors that an operator can see: what failed, what to do about it, and whether trying again can help.

Pure. The gRPC status of an error is derived from its code here and nowhere else (`GRPC_STATUS`); the wire
form (`fal.v1.ErrorDetail` in trailing metadata) is made and read by `fal_contract.rpc`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Code(StrEnum):
    """Why something failed, as a stable word that programs may compare."""

    INVALID = "INVALID"  # bad input: a field, its value, the remedy
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    CONFLICT = "CONFLICT"  # somebody changed the object since it was read
    FAILED_PRECONDITION = "FAILED_PRECONDITION"  # the object's state forbids it
    UNAUTHENTICATED = "UNAUTHENTICATED"  # no, expired, revoked or foreign credential
    PERMISSION_DENIED = "PERMISSION_DENIED"  # the role may not do this
    NO_CAPACITY = "NO_CAPACITY"
    BUSY = "BUSY"  # a bound was reached; try later
    DRAINING = "DRAINING"  # on its way out and takes nothing new; ask another
    STALE_TERM = "STALE_TERM"  # from a deposed leader
    NOT_LEADER = "NOT_LEADER"
    VERSION_MISMATCH = "VERSION_MISMATCH"  # wire, journal or store of a version we do not speak
    CORRUPT = "CORRUPT"  # a stored file or a digest is wrong
    STORE_FAILED = "STORE_FAILED"  # a commit did not happen
    STORE_UNKNOWN = "STORE_UNKNOWN"  # a commit may or may not have happened
    UNAVAILABLE = "UNAVAILABLE"  # a peer did not answer
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    DRIVER_FAILED = "DRIVER_FAILED"  # the container runtime said no
    RUNNER_FAILED = "RUNNER_FAILED"  # the worker in the container said no
    OUT_OF_MEMORY = "OUT_OF_MEMORY"  # one request did not fit
    INVARIANT = "INVARIANT"  # a proposed change broke a rule and was refused
    INTERNAL = "INTERNAL"


RETRYABLE: Final = frozenset(
    {
        Code.CONFLICT,
        Code.NO_CAPACITY,
        Code.BUSY,
        Code.DRAINING,
        Code.NOT_LEADER,
        Code.STORE_UNKNOWN,
        Code.UNAVAILABLE,
        Code.TIMEOUT,
    }
)

# grpc.StatusCode names; kept as text so that this module stays pure.
GRPC_STATUS: Final[dict[Code, str]] = {
    Code.INVALID: "INVALID_ARGUMENT",
    Code.NOT_FOUND: "NOT_FOUND",
    Code.ALREADY_EXISTS: "ALREADY_EXISTS",
    Code.CONFLICT: "ABORTED",
    Code.FAILED_PRECONDITION: "FAILED_PRECONDITION",
    Code.UNAUTHENTICATED: "UNAUTHENTICATED",
    Code.PERMISSION_DENIED: "PERMISSION_DENIED",
    Code.NO_CAPACITY: "RESOURCE_EXHAUSTED",
    Code.BUSY: "RESOURCE_EXHAUSTED",
    Code.DRAINING: "UNAVAILABLE",
    Code.STALE_TERM: "FAILED_PRECONDITION",
    Code.NOT_LEADER: "UNAVAILABLE",
    Code.VERSION_MISMATCH: "FAILED_PRECONDITION",
    Code.CORRUPT: "DATA_LOSS",
    Code.STORE_FAILED: "INTERNAL",
    Code.STORE_UNKNOWN: "UNKNOWN",
    Code.UNAVAILABLE: "UNAVAILABLE",
    Code.TIMEOUT: "DEADLINE_EXCEEDED",
    Code.CANCELLED: "CANCELLED",
    Code.DRIVER_FAILED: "INTERNAL",
    Code.RUNNER_FAILED: "INTERNAL",
    Code.OUT_OF_MEMORY: "RESOURCE_EXHAUSTED",
    Code.INVARIANT: "INTERNAL",
    Code.INTERNAL: "INTERNAL",
}


class FalError(Exception):
    """An expected failure.

    `what` says what failed, `remedy` what the reader can do, `field` which input was at fault (a dotted path,
    empty when none was). `str(error)` is `WHAT. REMEDY`, the form that falctl prints behind `error: `.
    `leader`: with NOT_LEADER, where the leader listens (host:port), as far as who raises it knows.
    """

    def __init__(self, code: Code, what: str, *, remedy: str, field: str = "", leader: tuple[str, ...] = ()) -> None:
        what = what.rstrip(".")
        super().__init__(f"{what}. {remedy}" if remedy else f"{what}.")
        self.code = code
        self.what = what
        self.remedy = remedy
        self.field = field
        self.leader = leader

    @property
    def retryable(self) -> bool:
        """True when the same call may succeed later without a change by the caller."""
        return self.code in RETRYABLE


def invalid(field: str, value: object, why: str, *, remedy: str) -> FalError:
    """The one form of a bad-input error: names the field, the value and the remedy."""
    return FalError(Code.INVALID, f"{field} = {value!r} {why}", remedy=remedy, field=field)


def not_found(kind: str, name: str, *, remedy: str) -> FalError:
    """`kind` (app, runner, node …) named `name` does not exist."""
    return FalError(Code.NOT_FOUND, f"{kind} {name!r} does not exist", remedy=remedy)
