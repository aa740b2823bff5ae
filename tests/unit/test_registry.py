"""What may be registered as a model, and what is refused before anything changes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fal_contract.artifact import Artifact, attestation_text, entries_of
from fal_contract.errors import Code, FalError
from fal_contract.model_manifest import manifest_digest
from fal_contract.v1 import state_pb2
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.registry import folder_listing, folder_of, hash_files, list_files


def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(b"w" * 5000)
    return folder


def test_files_are_listed_and_hashed_in_order(tmp_path: Path) -> None:
    folder = model(tmp_path)
    listed = list_files(folder_of(f"file://{folder}"))
    assert [(x.path, x.size_bytes) for x in listed] == [("model_index.json", 2), ("unet/weights.safetensors", 5000)]
    listing = folder_listing(f"file://{folder}", "model", listed)
    assert (listing.attested, listing.manifest_digest) == (False, "")
    found = hash_files(listing, listed, Event())
    assert found.files[1].sha256 == hashlib.sha256(b"w" * 5000).digest()
    assert found.hashes == (blake3(b"{}").digest(), blake3(b"w" * 5000).digest())
    assert found.manifest_digest == manifest_digest(entries_of(found))


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (8 << 20) + 5])
def test_every_piece_is_hashed_by_itself(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a.safetensors").write_bytes(content)
    listed = list_files(tmp_path)
    found = hash_files(folder_listing("file:///x", "model", listed), listed, Event())
    assert found.hashes == tuple(blake3(content[at : at + (4 << 20)]).digest() for at in range(0, size, 4 << 20))
    assert len(found.hashes) == len(found.layout)


def test_an_untouched_folder_has_the_same_id_again_and_a_touched_one_another(tmp_path: Path) -> None:
    folder = model(tmp_path)
    first = folder_listing("file:///x", "model", list_files(folder))
    assert folder_listing("file:///x", "model", list_files(folder)).id == first.id
    os.utime(folder / "model_index.json", ns=(1, 1))
    assert folder_listing("file:///x", "model", list_files(folder)).id != first.id


def test_a_link_inside_the_folder_is_a_file(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "again.safetensors").symlink_to("unet/weights.safetensors")
    assert ("again.safetensors", 5000) in [(x.path, x.size_bytes) for x in list_files(folder)]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("hf://org/model", "is not a file:// URI"),
        ("/plain/path", "is not a file:// URI"),
        ("file://otherhost/model", "names a host"),
        ("file:///nowhere/at/all", "cannot be read"),
        ("file:///tmp/../etc", "'..'"),
        ("file://", "not an absolute path"),
    ],
)
def test_what_names_no_folder_is_refused(uri: str, why: str) -> None:
    with pytest.raises(FalError, match="uri") as caught:
        folder_of(uri)
    assert caught.value.code is Code.INVALID
    assert why in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "v1.ckpt", "weights.PT", "x.pth", "x.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path)
    (folder / "unet" / name).write_bytes(b"x")
    with pytest.raises(FalError, match="pickle") as caught:
        list_files(folder)
    assert f"unet/{name}" in caught.value.what
    assert "--allow-pickle" in caught.value.remedy
    assert f"unet/{name}" in [x.path for x in list_files(folder, allow_pickle=True)]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (tmp_path / "secret.safetensors").write_text("s")
    (folder / "unet" / "x.safetensors").symlink_to("../../secret.safetensors")
    with pytest.raises(FalError, match="leaves the folder"):
        list_files(folder)


@pytest.mark.parametrize("target", ["unet", ".", "missing"])
def test_links_to_folders_and_to_nothing_are_refused(tmp_path: Path, target: str) -> None:
    folder = model(tmp_path)
    (folder / "link").symlink_to(target)
    with pytest.raises(FalError, match=r"not a regular file|cannot be read"):
        list_files(folder)


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path)
    os.mkfifo(folder / "pipe")
    with pytest.raises(FalError, match="not a regular file"):
        list_files(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(FalError, match="holds no file"):
        list_files(tmp_path)


def test_a_file_that_grows_while_it_is_registered_ends_it(tmp_path: Path) -> None:
    folder = model(tmp_path)
    listed = list_files(folder)
    with (folder / "unet" / "weights.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(FalError, match="changed while") as caught:
        hash_files(folder_listing("file:///x", "model", listed), listed, Event())
    assert caught.value.code is Code.CONFLICT


def test_a_file_swapped_for_a_link_ends_it(tmp_path: Path) -> None:
    folder = model(tmp_path)
    listed = list_files(folder)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("/etc/hostname")
    with pytest.raises(FalError, match="changed while"):
        hash_files(folder_listing("file:///x", "model", listed), listed, Event())


def test_hashing_can_be_cancelled(tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    listed = list_files(model(tmp_path))
    with pytest.raises(FalError) as caught:
        hash_files(folder_listing("file:///x", "model", listed), listed, stop)
    assert caught.value.code is Code.CANCELLED


def test_model_roots_bound_what_can_be_registered(tmp_path: Path) -> None:
    folder = model(tmp_path)
    assert folder_of(f"file://{folder}", [tmp_path]) == folder.resolve()
    with pytest.raises(FalError, match="model_roots"):
        folder_of(f"file://{folder}", [tmp_path / "elsewhere"])


KEY = ec.generate_private_key(ec.SECP256R1())


def signed(artifact: Artifact, key: ec.EllipticCurvePrivateKey = KEY) -> Artifact:
    return replace(artifact, signature=key.sign(attestation_text(artifact), ec.ECDSA(hashes.SHA256())))


def kept(tmp_path: Path) -> tuple[ManifestBlobs, Artifact]:
    """A folder of manifests with the listing of a model, and its artifact with every digest, unsigned."""
    listed = list_files(model(tmp_path))
    listing = folder_listing("file:///x", "model", listed)
    blobs = ManifestBlobs(tmp_path / "blobs", KEY.public_key())
    blobs.put(listing)
    return blobs, hash_files(listing, listed, Event())


def test_a_listing_is_replaced_by_the_signed_manifest(tmp_path: Path) -> None:
    blobs, artifact = kept(tmp_path)
    assert not blobs.artifact(artifact.id).attested
    blobs.put(signed(artifact))
    again = ManifestBlobs(tmp_path / "blobs", KEY.public_key())
    for one in (blobs, again):
        assert one.artifact(artifact.id) == signed_as(one, artifact)
        assert one.names() == {artifact.id}
    assert again.names(older_than_s=0.0) == set()
    again.drop(artifact.id)
    again.drop(artifact.id)
    assert not again.has(artifact.id)


def signed_as(blobs: ManifestBlobs, artifact: Artifact) -> Artifact:
    """With the signature that is kept: each one differs."""
    return replace(artifact, signature=blobs.get(artifact.id).signature)


def test_a_damaged_listing_is_refused(tmp_path: Path) -> None:
    blobs, artifact = kept(tmp_path)
    path = tmp_path / "blobs" / artifact.id
    path.write_bytes(path.read_bytes().replace(b"unet", b"vnet"))
    with pytest.raises(FalError, match="damaged") as caught:
        ManifestBlobs(tmp_path / "blobs", KEY.public_key()).get(artifact.id)
    assert caught.value.code is Code.CORRUPT
    path.unlink()
    with pytest.raises(FalError, match="does not exist"):
        blobs.get(artifact.id)


@pytest.mark.parametrize("how", ["unsigned", "of another CA", "another artifact's"])
def test_a_manifest_that_the_ca_did_not_sign_is_refused(tmp_path: Path, how: str) -> None:
    blobs, artifact = kept(tmp_path)
    if how == "unsigned":
        forged = artifact
    elif how == "of another CA":
        forged = signed(artifact, ec.generate_private_key(ec.SECP256R1()))
    else:
        forged = replace(signed(replace(artifact, id="ab" * 32)), id=artifact.id)
    blobs.put(forged)
    with pytest.raises(FalError, match="damaged") as caught:
        blobs.get(artifact.id)
    assert caught.value.code is Code.CORRUPT


def test_manifests_of_the_first_release_are_read_by_digest(tmp_path: Path) -> None:
    blobs, artifact = kept(tmp_path)
    entries = entries_of(artifact)
    files = [state_pb2.ModelFile(path=x.path, bytes=x.size_bytes, sha256=x.sha256) for x in entries]
    path = tmp_path / "blobs" / artifact.manifest_digest
    path.write_bytes(state_pb2.ModelManifest(files=files).SerializeToString())
    assert blobs.legacy(artifact.manifest_digest) == entries
    path.write_bytes(state_pb2.ModelManifest(files=files[:1]).SerializeToString())
    with pytest.raises(FalError, match="damaged"):
        blobs.legacy(artifact.manifest_digest)
