"""Who vouches for the pieces of an artifact that nobody has attested: signed claims, kept over a restart.

Invariants: one claim for each content that somebody vouched for, so that nobody who claims wrong bytes first takes the
place of who read the right ones; this node's own are always kept, others' contradictions up to OTHERS_MAX. A claim is
in the file before anybody is told of it. The file is appended to (4 bytes of length, then a `PieceClaim`) and not
fsynced: after a power cut the pieces whose claims are lost are claimed by this node, which vouches for what it cannot
ask anybody about. Thread-safe. Used by fal_fsd.transfer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fal_contract.pieces import BLAKE3_BYTES
from fal_contract.v1 import weights_pb2
from fal_fsd.core.messages import Claim

OTHERS_MAX: Final = 4096  # claims that contradict the first one about their piece
_CLAIM_BYTES_MAX: Final = 1024
_LENGTH_BYTES: Final = 4


class ClaimBook:
    """The claims about one artifact. `file`: where they are kept; its folder exists."""

    def __init__(self, file: Path, pieces_max: int) -> None:
        self._file = file
        self._pieces_max = pieces_max
        self._mutex = threading.Lock()
        self._claims: dict[int, Claim] = {}  # the first about each piece
        self._others: dict[tuple[int, bytes], Claim] = {}
        for claim in self._read():
            self._keep(claim)

    def get(self, piece: int, digest: bytes | None = None) -> Claim | None:
        """Who vouches that the piece has this digest; without one: what was said first."""
        with self._mutex:
            return self._find(piece, digest)

    def all(self) -> list[Claim]:
        """By piece."""
        with self._mutex:
            return sorted([*self._claims.values(), *self._others.values()], key=lambda claim: claim.piece)

    def take(self, claims: Iterable[Claim], *, own: bool = False) -> list[Claim]:
        """Keep those that nobody made yet; they are returned. `own`: they are this node's. Raises OSError."""
        with self._mutex:
            fresh: dict[tuple[int, bytes], Claim] = {}
            others = len(self._others)
            for claim in claims:
                if not 0 <= claim.piece < self._pieces_max or self._find(claim.piece, claim.digest) is not None:
                    continue
                first = claim.piece not in self._claims and all(claim.piece != piece for piece, _ in fresh)
                if not first and not own and others >= OTHERS_MAX:
                    continue
                others += not first
                fresh.setdefault((claim.piece, claim.digest), claim)
            if fresh:
                with self._file.open("ab") as out:
                    out.write(b"".join(map(_record, fresh.values())))
                for claim in fresh.values():
                    self._keep(claim)
            return list(fresh.values())

    def _find(self, piece: int, digest: bytes | None) -> Claim | None:
        first = self._claims.get(piece)
        if first is None or digest is None or first.digest == digest:
            return first
        return self._others.get((piece, digest))

    def _keep(self, claim: Claim) -> None:
        if self._claims.setdefault(claim.piece, claim) is not claim:
            self._others.setdefault((claim.piece, claim.digest), claim)

    def drop(self, pieces: Iterable[int]) -> None:
        """Forget what was said about them: it was wrong. Raises OSError."""
        with self._mutex:
            gone = set(pieces)
            self._claims = {piece: claim for piece, claim in self._claims.items() if piece not in gone}
            self._others = {key: claim for key, claim in self._others.items() if key[0] not in gone}
            self._file.write_bytes(b"".join(map(_record, [*self._claims.values(), *self._others.values()])))

    def clear(self) -> None:
        """The artifact is attested, or gone."""
        with self._mutex:
            self._claims.clear()
            self._others.clear()
            self._file.unlink(missing_ok=True)

    def _read(self) -> list[Claim]:
        try:
            raw = self._file.read_bytes()
        except FileNotFoundError:
            return []
        found: list[Claim] = []
        at = 0
        while at + _LENGTH_BYTES <= len(raw):
            length = int.from_bytes(raw[at : at + _LENGTH_BYTES], "little")
            body = raw[at + _LENGTH_BYTES : at + _LENGTH_BYTES + length]
            if length > _CLAIM_BYTES_MAX or len(body) < length:
                break  # torn by a kill: what follows was never told to anybody
            try:
                found.append(from_wire(weights_pb2.PieceClaim.FromString(body)))
            except (DecodeError, ValueError):
                break
            at += _LENGTH_BYTES + length
        if at != len(raw):
            self._file.write_bytes(raw[:at])
        return [claim for claim in found if claim.piece < self._pieces_max]


def to_wire(claim: Claim) -> weights_pb2.PieceClaim:
    """The message."""
    return weights_pb2.PieceClaim(
        piece=claim.piece, blake3=claim.digest, signer=claim.signer, signature=claim.signature
    )


def from_wire(message: weights_pb2.PieceClaim) -> Claim:
    """The claim; ValueError when the digest is none."""
    if len(message.blake3) != BLAKE3_BYTES:
        raise ValueError("digest")
    return Claim(message.piece, message.blake3, message.signer, message.signature)


def _record(claim: Claim) -> bytes:
    body = to_wire(claim).SerializeToString()
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


__all__ = ["ClaimBook", "from_wire", "to_wire"]
