"""Who vouches for the pieces of an artifact that nobody has attested: signed claims, kept over a restart.

Invariant: one claim a piece, the first that was told; it is in the file before anybody is told of it. The file is
appended to (4 bytes of length, then a `PieceClaim`) and not fsynced: after a power cut the pieces whose claims are
lost are claimed by this node, which vouches for what it cannot ask anybody about. Thread-safe. Used by
fal_fsd.transfer.
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

_CLAIM_BYTES_MAX: Final = 1024
_LENGTH_BYTES: Final = 4


class ClaimBook:
    """The claims about one artifact. `file`: where they are kept; its folder exists."""

    def __init__(self, file: Path, pieces_max: int) -> None:
        self._file = file
        self._pieces_max = pieces_max
        self._mutex = threading.Lock()
        self._claims: dict[int, Claim] = {claim.piece: claim for claim in self._read()}

    def get(self, piece: int) -> Claim | None:
        with self._mutex:
            return self._claims.get(piece)

    def all(self) -> list[Claim]:
        """By piece."""
        with self._mutex:
            return [self._claims[piece] for piece in sorted(self._claims)]

    def take(self, claims: Iterable[Claim]) -> list[Claim]:
        """Keep those about pieces that nobody vouched for yet; they are returned. Raises OSError."""
        with self._mutex:
            fresh: dict[int, Claim] = {}
            for claim in claims:
                if 0 <= claim.piece < self._pieces_max and claim.piece not in self._claims:
                    fresh.setdefault(claim.piece, claim)
            if fresh:
                with self._file.open("ab") as out:
                    out.write(b"".join(map(_record, fresh.values())))
                self._claims |= fresh
            return list(fresh.values())

    def drop(self, pieces: Iterable[int]) -> None:
        """Forget what was said about them: it was wrong. Raises OSError."""
        with self._mutex:
            for piece in pieces:
                self._claims.pop(piece, None)
            self._file.write_bytes(b"".join(map(_record, self._claims.values())))

    def clear(self) -> None:
        """The artifact is attested, or gone."""
        with self._mutex:
            self._claims.clear()
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
