"""What nodes tell of a model's content: what hangs together is attested, what does not names file and signer."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2, weights_pb2
from fal_scheduler.attestation import ClaimBook, Mismatch, examine
from fal_scheduler.registry import listing_of

PIECE = 4 << 20
FILES = {"a.json": b"{}", "b.safetensors": b"b" * (PIECE + 7), "c.safetensors": b""}


def listing(*, published: tuple[str, ...] = ()) -> Artifact:
    files = [
        ArtifactFile(path, len(content), f"etag-{path}", sha256(content) if path in published else b"")
        for path, content in FILES.items()
    ]
    return listing_of("s3://b/m", "model", files)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def pieces(content: bytes) -> list[bytes]:
    return [blake3(content[at : at + PIECE]).digest() for at in range(0, len(content), PIECE)]


def told(artifact: Artifact, **other: bytes) -> weights_pb2.Attestation:
    """What an honest node tells; `other`: files (without suffix) with other content."""
    contents = {path: other.get(path.split(".")[0], content) for path, content in FILES.items()}
    return weights_pb2.Attestation(
        artifact_id=artifact.id,
        files=[
            state_pb2.ModelFile(path=path, bytes=len(c), sha256=sha256(c), blake3=b"".join(pieces(c)))
            for path, c in contents.items()
        ],
        signers=["n-1", "n-2"],
        piece_signers=[0, 1, 1],
    )


def honest_book() -> ClaimBook:
    book = ClaimBook(3)
    for piece, digest in enumerate(digest for content in FILES.values() for digest in pieces(content)):
        assert book.add(piece, digest, f"n-{piece}") is None
    return book


@pytest.mark.parametrize("published", [(), ("b.safetensors",), tuple(FILES)])
def test_what_hangs_together_is_the_artifact_with_every_digest(published: tuple[str, ...]) -> None:
    artifact = listing(published=published)
    for book in (ClaimBook(3), honest_book()):
        found = examine(artifact, told(artifact), book, told_by="n-9")
        assert isinstance(found, Artifact)
        assert found.attested
        assert found.id == artifact.id
        assert [x.version for x in found.files] == [x.version for x in artifact.files]
        assert found.hashes == tuple(digest for content in FILES.values() for digest in pieces(content))


def mismatch(artifact: Artifact, message: weights_pb2.Attestation, book: ClaimBook) -> Mismatch:
    found = examine(artifact, message, book, told_by="n-9", name_of=lambda node_id: f"name of {node_id}")
    assert isinstance(found, Mismatch)
    assert "name of n-9" in found.reason
    return found


def test_other_bytes_than_the_origin_published_name_file_and_signers() -> None:
    artifact = listing(published=tuple(FILES))
    found = mismatch(artifact, told(artifact, b=b"x" * (PIECE + 7)), ClaimBook(3))
    assert found.signers == ("n-2",), "without claims, whom the attesting node names"
    assert found.reason.startswith("b.safetensors: ")
    assert sha256(FILES["b.safetensors"]).hex() in found.reason
    assert "read from the origin by name of n-2" in found.reason
    assert mismatch(artifact, told(artifact, b=b"x" * (PIECE + 7)), honest_book()).signers == ("n-1", "n-2")


def test_a_claim_that_differs_names_its_signer() -> None:
    artifact, book = listing(), ClaimBook(3)
    book.add(2, blake3(b"flipped").digest(), "n-7")
    found = mismatch(artifact, told(artifact), book)
    assert (found.signers, found.reason.startswith("b.safetensors: piece 2 ")) == (("n-7",), True)


def test_two_nodes_that_read_differently_are_both_named() -> None:
    artifact, book = listing(), honest_book()
    dispute = book.add(1, blake3(b"flipped").digest(), "n-8")
    assert dispute is not None
    assert mismatch(artifact, told(artifact), book).signers == ("n-1", "n-8")
    assert book.add(0, pieces(FILES["a.json"])[0], "n-8") is None, "the same again is no dispute"


def test_a_failure_names_the_file_and_who_read_it() -> None:
    artifact = listing(published=tuple(FILES))
    message = weights_pb2.Attestation(
        artifact_id=artifact.id, failure="its SHA-256\nis another", files=[state_pb2.ModelFile(path="b.safetensors")]
    )
    found = mismatch(artifact, message, honest_book())
    assert found.reason.startswith("b.safetensors: its SHA-256is another")
    assert found.signers == ("n-1", "n-2")
    message.files[0].path = "../../x"
    assert "../../x" not in mismatch(artifact, message, honest_book()).reason


def _without_a_file(message: weights_pb2.Attestation) -> None:
    del message.files[0]


def _another_size(message: weights_pb2.Attestation) -> None:
    message.files[1].bytes += 1


def _short_sha256(message: weights_pb2.Attestation) -> None:
    message.files[1].sha256 = b"x"


def _one_digest_less(message: weights_pb2.Attestation) -> None:
    message.files[1].blake3 = message.files[1].blake3[32:]


def _another_path(message: weights_pb2.Attestation) -> None:
    message.files[0].path = "../a.json"


@pytest.mark.parametrize("spoil", [_without_a_file, _another_size, _short_sha256, _one_digest_less, _another_path])
def test_a_message_that_makes_no_sense_is_the_senders_fault(spoil) -> None:  # type: ignore[no-untyped-def]
    artifact = listing()
    message = told(artifact)
    spoil(message)
    with pytest.raises(FalError) as caught:
        examine(artifact, message, ClaimBook(3), told_by="n-9")
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize(("piece", "digest"), [(-1, bytes(32)), (3, bytes(32)), (0, b""), (0, bytes(33))])
def test_a_claim_that_can_be_none_is_refused(piece: int, digest: bytes) -> None:
    with pytest.raises(FalError):
        ClaimBook(3).add(piece, digest, "n-1")


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 2), st.integers(0, 4)), max_size=60))
def test_the_first_claim_stays_and_every_other_content_is_a_dispute(
    claims: list[tuple[int, int, int]],
) -> None:
    book, first = ClaimBook(20), dict[int, tuple[bytes, str]]()
    for piece, content, signer in claims:
        digest, name = bytes([content]) * 32, f"n-{signer}"
        dispute = book.add(piece, digest, name)
        known = first.setdefault(piece, (digest, name))
        assert (dispute is not None) == (known[0] != digest)
    twin = book.copy()
    for piece in range(20):
        digest, name = first.get(piece, (bytes(32), ""))
        assert (twin.digest_of(piece), twin.signer_of(piece)) == (digest, name)


def test_a_copy_does_not_see_later_claims() -> None:
    book = ClaimBook(3)
    twin = book.copy()
    book.add(0, bytes([1]) * 32, "n-1")
    assert (twin.signer_of(0), book.signer_of(0)) == ("", "n-1")


def test_a_large_artifact_costs_34_bytes_a_piece() -> None:
    assert ClaimBook(1 << 19).size_bytes == 34 << 19


def test_the_reason_stays_short_where_many_read_it() -> None:
    artifact = listing()
    message = told(artifact)
    book = ClaimBook(3)
    message.failure = "x" * 10_000
    message.signers.extend(f"n-{number}" for number in range(1000))
    del message.files[:]
    assert len(mismatch(artifact, message, book).reason) < 1000
