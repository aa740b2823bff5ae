"""What may be registered as a model, and what is refused before anything changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Event

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.model_manifest import manifest_digest
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.registry import folder_of, hash_files, list_files


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
    entries = hash_files(listed, Event())
    assert entries[1].sha256 == hashlib.sha256(b"w" * 5000).digest()
    blobs = ManifestBlobs(tmp_path / "blobs")
    digest = blobs.put(entries)
    assert digest == manifest_digest(entries)
    assert [x.path for x in ManifestBlobs(tmp_path / "blobs").get(digest).files] == [x.path for x in entries]


def test_a_link_inside_the_folder_is_a_file(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "again.safetensors").symlink_to("unet/weights.safetensors")
    assert ("again.safetensors", 5000) in [(x.path, x.size_bytes) for x in list_files(folder)]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("hf://org/model", "Only file:// in this release"),
        ("s3://bucket/model", "Only file:// in this release"),
        ("/plain/path", "Only file:// in this release"),
        ("file://otherhost/model", "names a host"),
        ("file:///nowhere/at/all", "cannot be read"),
        ("file:///tmp/../etc", "'..'"),
        ("file://", "not an absolute path"),
    ],
)
def test_other_uris_are_refused(uri: str, why: str) -> None:
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
        hash_files(listed, Event())
    assert caught.value.code is Code.CONFLICT


def test_a_file_swapped_for_a_link_ends_it(tmp_path: Path) -> None:
    folder = model(tmp_path)
    listed = list_files(folder)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("/etc/hostname")
    with pytest.raises(FalError, match="changed while"):
        hash_files(listed, Event())


def test_hashing_can_be_cancelled(tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    with pytest.raises(FalError) as caught:
        hash_files(list_files(model(tmp_path)), stop)
    assert caught.value.code is Code.CANCELLED


def test_model_roots_bound_what_can_be_registered(tmp_path: Path) -> None:
    folder = model(tmp_path)
    assert folder_of(f"file://{folder}", [tmp_path]) == folder.resolve()
    with pytest.raises(FalError, match="model_roots"):
        folder_of(f"file://{folder}", [tmp_path / "elsewhere"])


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    blobs = ManifestBlobs(tmp_path / "blobs")
    digest = blobs.put(hash_files(list_files(model(tmp_path)), Event()))
    path = tmp_path / "blobs" / digest
    path.write_bytes(path.read_bytes().replace(b"unet", b"vnet"))
    with pytest.raises(FalError, match="damaged") as caught:
        ManifestBlobs(tmp_path / "blobs").get(digest)
    assert caught.value.code is Code.CORRUPT
    path.unlink()
    with pytest.raises(FalError, match="does not exist"):
        ManifestBlobs(tmp_path / "blobs").get(digest)
