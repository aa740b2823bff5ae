"""Seconds until an artifact is ready on a node, from measured rates. Pure; integers only, so that a replay is exact.

    missing = bytes_total - bytes_here
    supply  = what is measured of this very fetch while it runs; else origin + the fastest PEERS_AT_ONCE_MAX holders,
              at most the fastest that this node was ever fed
    ready   = (ahead + missing) / supply, then bytes to be locked in memory / disk rate, and a second where nobody has
              attested the content yet

`ahead` are bytes that the node fetches before these, or beside them at the same time: either way they share the line.
A rate that nobody has measured is never invented: the answer says so, unless the caller gives one to assume.
Form of the bound: weights reference, section 5 (max of what the origin and the node's line can do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PEERS_AT_ONCE_MAX: Final = 8  # beyond that many senders a node's own line is the bound
UNKNOWN_MS: Final = -1
NO_ROUTE: Final = "no route to any holder and the origin does not answer"
NOT_MEASURED: Final = "no rate towards this node has been measured yet"
ATTEST_MS: Final = 1000  # from the last byte to the word of the scheduler; small beside any fetch
_MS: Final = 1000
_MB: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class PeerSupply:
    """A node that holds some of it and can be reached. `rate_bytes_s` 0: never measured."""

    node_id: str
    rate_bytes_s: int
    bytes_held: int


@dataclass(frozen=True, slots=True)
class Question:
    """One artifact, one node. Bytes, and bytes per second towards the node; 0 means not measured.

    `origin_answers`: False where the node said that it does not, or the artifact has none. `arriving_bytes_s`: the
    measured rate of this fetch while it runs. `ahead_bytes`: what else the node fetches now or before. `fed_bytes_s`:
    most that the node ever took in, from all sources. `disk_bytes_s`: at which finished files are read into memory.
    `memory`: whether it must be locked in memory too. `waits_for`: what the node says that holds it up.
    """

    bytes_total: int
    bytes_here: int = 0
    bytes_memory: int = 0
    ready: bool = False
    attested: bool = True
    memory: bool = False
    origin_answers: bool = True
    origin_bytes_s: int = 0
    origin_measured: str = ""  # whose measurement: "", "its pool", "its region", "others"
    peers: Sequence[PeerSupply] = ()
    arriving_bytes_s: int = 0
    ahead_bytes: int = 0
    fed_bytes_s: int = 0
    disk_bytes_s: int = 0
    waits_for: str = ""
    assumed_bytes_s: int = 0  # where nothing is measured; 0: say that nothing is


@dataclass(frozen=True, slots=True)
class Eta:
    """`ready_in_ms`: 0 when ready, -1 when it cannot be said. `because`: what it rests on, for people."""

    ready_in_ms: int
    because: str


def predict(question: Question) -> Eta:
    """When it will be ready. Never negative but for -1; more missing bytes never give a smaller answer."""
    missing = max(0, question.bytes_total - question.bytes_here)
    lock = max(0, question.bytes_total - question.bytes_memory) if question.memory else 0
    if question.ready or not missing:
        return _from_disk(question, lock)
    if not question.origin_answers and not _held_somewhere(question, missing):
        return Eta(UNKNOWN_MS, _told(NO_ROUTE, question))
    rate, why = _supply(question)
    if not rate:
        return Eta(UNKNOWN_MS, _told(NOT_MEASURED, question))
    if question.ahead_bytes:
        why += f", with {_gb(question.ahead_bytes)} beside it"
    total_ms = _ceil_ms(missing + question.ahead_bytes, rate) + (0 if question.attested else ATTEST_MS)
    if lock and question.disk_bytes_s:
        total_ms += _ceil_ms(lock, question.disk_bytes_s)
    return Eta(total_ms, _told(why, question))


def _from_disk(question: Question, lock: int) -> Eta:
    if not question.ready:
        if question.attested:
            return Eta(1, _told("all bytes are here and are being checked", question))
        return Eta(ATTEST_MS, _told("all bytes are here, their attestation is awaited", question))
    if not lock:
        return Eta(0, "ready")
    if not question.disk_bytes_s:
        return Eta(UNKNOWN_MS, "ready on disk; how fast it is read into memory has not been measured yet")
    return Eta(_ceil_ms(lock, question.disk_bytes_s), f"ready on disk, read at {_rate(question.disk_bytes_s)}")


def _held_somewhere(question: Question, missing: int) -> bool:
    """Whether reachable peers can have all that is missing: together at least, which pieces they hold is not known."""
    return sum(peer.bytes_held for peer in question.peers) >= missing


def _supply(question: Question) -> tuple[int, str]:
    """Bytes per second towards this fetch and the node's line as a whole, and why."""
    if question.arriving_bytes_s:
        # Measured beside everything else that the node fetches, so what is beside it is in this rate already;
        # counting it again errs to the late side, by no more than what is beside it.
        return question.arriving_bytes_s, f"arrives at {_rate(question.arriving_bytes_s)}"
    measured = sorted((peer.rate_bytes_s for peer in question.peers if peer.rate_bytes_s), reverse=True)
    from_peers = sum(measured[:PEERS_AT_ONCE_MAX])
    from_origin = question.origin_bytes_s if question.origin_answers else 0
    parts = []
    if from_origin:
        whose = f" (measured by {question.origin_measured})" if question.origin_measured else ""
        parts.append(f"origin {_rate(from_origin)}{whose}")
    if from_peers:
        count = min(len(measured), PEERS_AT_ONCE_MAX)
        parts.append(f"{count} peer{'' if count == 1 else 's'} {_rate(from_peers)}")
    rate = from_origin + from_peers
    if not rate and question.assumed_bytes_s:
        return question.assumed_bytes_s, f"assumed {_rate(question.assumed_bytes_s)}, {NOT_MEASURED}"
    if rate > question.fed_bytes_s > 0 and len(parts) + len(measured) > 1:
        rate = max(question.fed_bytes_s, from_origin, measured[0] if measured else 0)
        parts.append(f"at most {_rate(rate)} here")
    return rate, ", ".join(parts)


def _told(why: str, question: Question) -> str:
    return f"{why}; {question.waits_for}" if question.waits_for else why


def _ceil_ms(size: int, rate: int) -> int:
    return -(-size * _MS // rate)


def _rate(rate: int) -> str:
    return f"{rate / _MB:.0f} MB/s" if rate >= 10 * _MB else f"{rate / _MB:.1f} MB/s"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


__all__ = ["NOT_MEASURED", "NO_ROUTE", "PEERS_AT_ONCE_MAX", "UNKNOWN_MS", "Eta", "PeerSupply", "Question", "predict"]
