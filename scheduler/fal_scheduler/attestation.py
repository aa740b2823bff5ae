"""Whether what nodes say of a model's content hangs together. Pure.

Before a model is attested, whoever reads a piece from the origin claims its BLAKE3 digest; a node that holds all of it
then tells SHA-256 of every file and BLAKE3 of every piece. `examine` compares this with the listing, with what the
origin published and with every claim, and names who read what does not fit. Claims come over the signer's own
authenticated stream, so their signatures are evidence for later and not checked again here.
May take a second for half a million pieces: call `examine` in a thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.errors import invalid
from fal_contract.pieces import BLAKE3_BYTES
from fal_contract.v1 import state_pb2, weights_pb2

SIGNERS_MAX = 65_534
DISPUTES_MAX = 64  # kept an artifact; one is enough to refuse it
SIGNERS_NAMED_MAX = 5
FAILURE_CHARS_MAX = 500


@dataclass(frozen=True, slots=True)
class Dispute:
    """Two nodes read different bytes for one piece."""

    piece: int
    first: str
    second: str


class ClaimBook:
    """Claims about the pieces of one artifact: 34 bytes a piece."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self._digests = bytearray(BLAKE3_BYTES * pieces)
        self._signers = array("H", bytes(2 * pieces))  # 0: nobody; else index + 1
        self._names: list[str] = []
        self._index: dict[str, int] = {}
        self.disputes: list[Dispute] = []

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, nearly."""
        return len(self._digests) + 2 * len(self._signers)

    def add(self, piece: int, digest: bytes, signer: str) -> Dispute | None:
        """Keep a claim; the first about a piece stays. Raises INVALID for what can be none."""
        if not 0 <= piece < self.pieces:
            raise invalid("piece", piece, f"is none of {self.pieces}", remedy="Drop the claim.")
        if len(digest) != BLAKE3_BYTES:
            raise invalid("blake3", digest.hex(), "is not 32 bytes", remedy="Drop the claim.")
        known = self.signer_of(piece)
        if not known:
            self._digests[BLAKE3_BYTES * piece : BLAKE3_BYTES * (piece + 1)] = digest
            self._signers[piece] = self._number(signer)
            return None
        if self.digest_of(piece) == digest or len(self.disputes) >= DISPUTES_MAX:
            return None
        self.disputes.append(Dispute(piece, known, signer))
        return self.disputes[-1]

    def _number(self, signer: str) -> int:
        if signer not in self._index:
            if len(self._names) >= SIGNERS_MAX:
                raise invalid("signer", signer, "is one too many", remedy="Drop the claim.")
            self._names.append(signer)
            self._index[signer] = len(self._names)
        return self._index[signer]

    def signer_of(self, piece: int) -> str:
        """Who claimed it; empty: nobody."""
        number = self._signers[piece]
        return self._names[number - 1] if number else ""

    def digest_of(self, piece: int) -> bytes:
        """What was claimed; zeros where nobody did."""
        return bytes(self._digests[BLAKE3_BYTES * piece : BLAKE3_BYTES * (piece + 1)])

    def copy(self) -> ClaimBook:
        """For a thread to read while claims go on coming."""
        twin = ClaimBook(0)
        twin.pieces, twin._digests, twin._signers = self.pieces, bytearray(self._digests), self._signers[:]
        twin._names, twin.disputes = list(self._names), list(self.disputes)
        return twin


@dataclass(frozen=True, slots=True)
class Mismatch:
    """It does not hang together: the reason for operators, and who read it from the origin, by node id."""

    reason: str
    signers: tuple[str, ...]


def examine(
    listing: Artifact,
    told: weights_pb2.Attestation,
    book: ClaimBook,
    *,
    told_by: str,
    name_of: Callable[[str], str] = str,
) -> Artifact | Mismatch:
    """The artifact with every digest (unsigned), or what is wrong with it.

    `listing.files` have SHA-256 where the origin published it. Raises INVALID where the message itself makes no sense:
    that is the sender's fault, not the model's.
    """
    if told.failure:
        return _failure(listing, told, book, told_by, name_of)
    files = _files(listing, told.files)
    hashes = _hashes(listing, told.files)
    for index, (listed, found) in enumerate(zip(listing.files, files, strict=True)):
        if listed.sha256 and listed.sha256 != found.sha256:
            why = f"its SHA-256 is {found.sha256.hex()}, the origin says {listed.sha256.hex()}"
            return _mismatch(listed.path, why, _signers(listing, told, book, index), told_by, name_of)
    for dispute in book.disputes:
        path = listing.files[listing.layout.span(dispute.piece).file].path
        why = f"piece {dispute.piece} was read differently by two nodes"
        return _mismatch(path, why, (dispute.first, dispute.second), told_by, name_of)
    for piece, digest in enumerate(hashes):
        signer = book.signer_of(piece)
        if signer and book.digest_of(piece) != digest:
            path = listing.files[listing.layout.span(piece).file].path
            return _mismatch(path, f"piece {piece} is not what was claimed", (signer,), told_by, name_of)
    return replace(listing, files=files, hashes=hashes)


def _files(listing: Artifact, told: Sequence[state_pb2.ModelFile]) -> tuple[ArtifactFile, ...]:
    if [(x.path, x.bytes) for x in told] != [(x.path, x.size_bytes) for x in listing.files]:
        raise invalid("files", len(told), "are not those of the listing", remedy="Look at that node's log.")
    for file in told:
        if len(file.sha256) != BLAKE3_BYTES:
            raise invalid("sha256", file.sha256.hex(), f"of {file.path!r} is not 32 bytes", remedy="Look at its log.")
    return tuple(replace(x, sha256=file.sha256) for x, file in zip(listing.files, told, strict=True))


def _hashes(listing: Artifact, told: Sequence[state_pb2.ModelFile]) -> tuple[bytes, ...]:
    for index, file in enumerate(told):
        if len(file.blake3) != BLAKE3_BYTES * len(listing.layout.of_file(index)):
            raise invalid("blake3", file.path, "does not have one digest a piece", remedy="Look at that node's log.")
    raw = b"".join(file.blake3 for file in told)
    return tuple(raw[at : at + BLAKE3_BYTES] for at in range(0, len(raw), BLAKE3_BYTES))


def _failure(
    listing: Artifact, told: weights_pb2.Attestation, book: ClaimBook, told_by: str, name_of: Callable[[str], str]
) -> Mismatch:
    """A node says that the content is not what the origin said."""
    why = "".join(x for x in told.failure[:FAILURE_CHARS_MAX] if x.isprintable())
    named = told.files[0].path if told.files else ""
    paths = [file.path for file in listing.files]
    if named not in paths:
        return _mismatch("its content", why, _all_signers(book, told), told_by, name_of)
    return _mismatch(named, why, _signers(listing, told, book, paths.index(named)), told_by, name_of)


def _signers(listing: Artifact, told: weights_pb2.Attestation, book: ClaimBook, file: int) -> tuple[str, ...]:
    """Who read a file's pieces from the origin, by the claims or by what the attesting node knows."""
    found: dict[str, None] = {}
    for piece in listing.layout.of_file(file):
        signer = book.signer_of(piece)
        if not signer and piece < len(told.piece_signers) and told.piece_signers[piece] < len(told.signers):
            signer = told.signers[told.piece_signers[piece]]
        if signer:
            found[signer] = None
    return tuple(found)


def _all_signers(book: ClaimBook, told: weights_pb2.Attestation) -> tuple[str, ...]:
    found = dict.fromkeys([*(book.signer_of(piece) for piece in range(book.pieces)), *told.signers])
    return tuple(signer for signer in found if signer)


def _mismatch(path: str, why: str, signers: Sequence[str], told_by: str, name_of: Callable[[str], str]) -> Mismatch:
    named = [name_of(signer) for signer in signers[:SIGNERS_NAMED_MAX]]
    more = f" and {len(signers) - SIGNERS_NAMED_MAX} more" if len(signers) > SIGNERS_NAMED_MAX else ""
    by = f"; read from the origin by {', '.join(named)}{more}" if named else ""
    return Mismatch(f"{path}: {why} (told by {name_of(told_by)}{by})", tuple(signers))


__all__ = ["ClaimBook", "Dispute", "Mismatch", "examine"]
