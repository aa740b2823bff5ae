"""fal_contract.pieces, artifact, ticket: layouts, bitmaps, what is signed."""

from __future__ import annotations

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.artifact import (
    Artifact,
    ArtifactFile,
    attestation_text,
    claim_text,
    from_manifest,
    listing_id,
    signed_by,
    to_manifest,
)
from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap, PieceLayout, piece_bytes_of
from fal_contract.ticket import check_ticket, make_ticket, node_key

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(sizes, st.integers(1, 9))
def test_pieces_tile_every_file(of_files: list[int], piece_bytes: int) -> None:
    layout = PieceLayout(of_files, piece_bytes)
    covered = [(span.file, at) for span in layout.spans() for at in range(span.offset, span.offset + span.length)]
    assert covered == [(file, at) for file, size in enumerate(of_files) for at in range(size)]
    assert sum(layout.length(piece) for piece in range(layout.count)) == layout.bytes_total


@given(sizes, st.integers(1, 9), st.integers(0, 50), st.integers(1, 50), st.data())
def test_covering_is_what_a_read_needs(
    of_files: list[int], piece_bytes: int, offset: int, length: int, data: st.DataObject
) -> None:
    layout = PieceLayout(of_files, piece_bytes)
    file = data.draw(st.integers(0, len(of_files) - 1))
    wanted = {
        piece
        for piece in layout.of_file(file)
        if (span := layout.span(piece)).offset < offset + length and span.offset + span.length > offset
    }
    assert set(layout.covering(file, offset, length)) == wanted


def test_piece_length_grows_with_the_model_and_follows_the_kind() -> None:
    assert piece_bytes_of("model", 1) == 4 << 20
    assert piece_bytes_of("model", 24 << 30) == 16 << 20
    assert piece_bytes_of("model", 10**12) == 32 << 20
    assert piece_bytes_of("image", 16 << 30) == 256 << 10
    assert piece_bytes_of("image", (16 << 30) + 1) == 512 << 10
    assert piece_bytes_of("image", 256 << 30) == 4 << 20
    assert piece_bytes_of("cache", 10) == 1 << 20
    with pytest.raises(FalError, match="kind = 'tape'"):
        piece_bytes_of("tape", 1)


@given(st.integers(0, 70), st.data())
def test_a_bitmap_is_a_set(size: int, data: st.DataObject) -> None:
    numbers = st.integers(0, size - 1) if size else st.nothing()
    added = data.draw(st.lists(numbers)) if size else []
    removed = data.draw(st.lists(numbers)) if size else []
    bitmap, model = Bitmap(size), set[int]()
    for piece in added:
        assert bitmap.add(piece) == (piece not in model)
        model.add(piece)
    for piece in removed:
        assert bitmap.discard(piece) == (piece in model)
        model.discard(piece)
    assert set(bitmap) == model
    assert list(bitmap) == sorted(model)
    assert len(bitmap) == len(model)
    assert bitmap.complete == (len(model) == size)
    assert set(bitmap.missing()) == set(range(size)) - model
    assert bytes(Bitmap.of_bytes(size, bytes(bitmap))) == bytes(bitmap)
    assert set(Bitmap.full(size)) == set(range(size))


def test_a_bitmap_of_another_size_is_refused() -> None:
    with pytest.raises(FalError, match="no bitmap of 9 pieces"):
        Bitmap.of_bytes(9, b"\xff")
    with pytest.raises(FalError, match="no bitmap of 9 pieces"):
        Bitmap.of_bytes(9, b"\xff\x02")


def attested(contents: dict[str, bytes], key: ec.EllipticCurvePrivateKey | None = None) -> Artifact:
    """A small artifact with pieces of 4 bytes."""
    import hashlib
    from dataclasses import replace

    files = tuple(
        ArtifactFile(path, len(raw), "v1", hashlib.sha256(raw).digest()) for path, raw in sorted(contents.items())
    )
    digests = tuple(
        blake3(raw[at : at + 4]).digest() for _, raw in sorted(contents.items()) for at in range(0, len(raw), 4)
    )
    made = Artifact(listing_id("s3://b/m", files), "model", "s3://b/m", 4, files, digests)
    if key is None:
        return made
    return replace(made, signature=key.sign(attestation_text(made), ec.ECDSA(hashes.SHA256())))


def test_a_manifest_is_the_artifact_and_must_be_signed_by_the_cluster() -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    artifact = attested({"a": b"123456789", "b/c": b"", "d": b"xy"}, key)
    message = to_manifest(artifact)
    assert from_manifest(message, ca_key=key.public_key()) == artifact
    with pytest.raises(FalError) as caught:
        from_manifest(message, ca_key=other.public_key())
    assert caught.value.code is Code.CORRUPT
    message.files[0].blake3 = bytes(len(message.files[0].blake3))
    with pytest.raises(FalError, match="not signed"):
        from_manifest(message, ca_key=key.public_key())


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "", "a//b"])
def test_a_manifest_cannot_leave_its_folder(path: str) -> None:
    message = to_manifest(attested({"a": b"1"}))
    message.files[0].path = path
    with pytest.raises(FalError, match="path"):
        from_manifest(message)


def test_a_registered_manifest_knows_no_digests() -> None:
    files = (ArtifactFile("a", 9, '"etag"'),)
    artifact = Artifact(listing_id("https://x/y", files), "lora", "https://x/y", 4, files)
    again = from_manifest(to_manifest(artifact))
    assert not again.attested
    assert again == artifact
    assert again.manifest_digest == ""


def test_another_version_at_the_origin_is_another_artifact() -> None:
    assert listing_id("s3://b/m", [ArtifactFile("a", 1, "v1")]) != listing_id("s3://b/m", [ArtifactFile("a", 1, "v2")])


def test_a_claim_is_for_one_piece_of_one_artifact() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signature = key.sign(claim_text("aa", 7, b"1" * 32), ec.ECDSA(hashes.SHA256()))
    assert signed_by(key.public_key(), signature, claim_text("aa", 7, b"1" * 32))
    assert not signed_by(key.public_key(), signature, claim_text("aa", 8, b"1" * 32))
    assert not signed_by(key.public_key(), signature, claim_text("ab", 7, b"1" * 32))


def test_a_ticket_is_for_one_caller_artifact_node_and_time() -> None:
    mine, theirs = node_key(b"s" * 32, "n-1", 1), node_key(b"s" * 32, "n-2", 1)
    ticket = make_ticket(mine, caller="n-9", artifact_id="aa", expires_s=1000.0)
    assert check_ticket([theirs, mine], ticket, caller="n-9", artifact_id="aa", now_s=999.0) == ""
    for keys, caller, artifact_id, now_s in (
        ([theirs], "n-9", "aa", 999.0),
        ([mine], "n-8", "aa", 999.0),
        ([mine], "n-9", "ab", 999.0),
        ([mine], "n-9", "aa", 1001.0),
    ):
        assert check_ticket(keys, ticket, caller=caller, artifact_id=artifact_id, now_s=now_s)
    assert check_ticket([mine], ticket[:-1], caller="n-9", artifact_id="aa", now_s=0.0)
