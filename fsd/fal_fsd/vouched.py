"""A part whose pieces from peers are checked even before anybody attested them: against the claim of who read them.

Invariant: a peer's bytes are written only where an attested digest or a signed claim says what they must be. It is the
claim that this peer passed on: what another one said of the piece is not its fault.
"""

from __future__ import annotations

from pathlib import Path

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap
from fal_fsd.claims import ClaimBook
from fal_fsd.core.messages import ORIGIN
from fal_fsd.ports import Part, PieceWriter


class VouchedPart:
    """`ports.Part` around another one."""

    def __init__(self, part: Part, claims: ClaimBook) -> None:
        self._part = part
        self._claims = claims

    @property
    def artifact(self) -> Artifact:
        return self._part.artifact

    @property
    def have(self) -> Bitmap:
        return self._part.have

    def has(self, piece: int) -> bool:
        return self._part.has(piece)

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        if source == ORIGIN or self._part.artifact.attested:
            return self._part.writer(piece, source=source)
        if expect is None and (claim := self._claims.get(piece)) is not None:
            expect = claim.digest
        return self._part.writer(piece, source=source, expect=expect) if expect is not None else None

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        return self._part.locate(piece)

    def digest_of(self, piece: int) -> bytes | None:
        return self._part.digest_of(piece)

    def file_path(self, file: int) -> Path:
        return self._part.file_path(file)


__all__ = ["VouchedPart"]
