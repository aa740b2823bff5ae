"""A folder on an operator's machine: what may be pushed, and that nothing but what was hashed is ever sent."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from fal_contract.artifact import Artifact
from fal_contract.errors import Code, FalError
from fal_fsd import local_folder
from fal_fsd.local_folder import LocalPart, hash_folder, list_folder

PIECE = 4 << 20
URI = "push://t/m"


def hashed(folder: Path) -> tuple[Artifact, LocalPart]:
    files = list_folder(folder)
    artifact = hash_folder(files, URI, "model", stop=threading.Event())
    return artifact, LocalPart(artifact, files)


def read(part: LocalPart, piece: int) -> bytes:
    found = part.locate(piece)
    assert found is not None
    return os.pread(found[0], found[2], found[1])


def test_every_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    contents = {"b/w.safetensors": os.urandom(2 * PIECE + 5), "a.json": b"{}", "empty": b""}
    for path, data in contents.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "link.safetensors").symlink_to("b/w.safetensors")
    contents["link.safetensors"] = contents["b/w.safetensors"]
    artifact, part = hashed(tmp_path)
    assert [(x.path, x.sha256) for x in artifact.files] == [
        (path, hashlib.sha256(data).digest()) for path, data in sorted(contents.items())
    ]
    whole = b"".join(data for _, data in sorted(contents.items()))
    assert b"".join(read(part, piece) for piece in range(artifact.layout.count)) == whole
    assert artifact.hashes == tuple(blake3(read(part, piece)).digest() for piece in range(artifact.layout.count))
    assert part.have.complete
    assert part.look(range(artifact.layout.count)) == ""
    part.close()


def _big_nest(folder: Path) -> None:
    (folder / Path(*["d"] * 20)).mkdir(parents=True)
    (folder / Path(*["d"] * 20) / "f").write_bytes(b"x")


def _outside(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"x")
    (folder / "w.safetensors").symlink_to("../secret")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "holds no byte"),
        (lambda folder: (folder / "a").write_bytes(b""), "holds no byte"),
        (lambda folder: folder.rmdir(), "cannot be read"),
        (lambda folder: (folder / "w.ckpt").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "W.PT").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "a").symlink_to("nowhere"), "cannot be read"),
        (lambda folder: (folder / "a").symlink_to("a"), "cannot be read"),
        (lambda folder: os.mkfifo(folder / "a"), "regular file"),
        (lambda folder: (folder / "a\nb").write_bytes(b"x"), "control character"),
        (_outside, "leaves the folder"),
        (_big_nest, "nested deeper"),
    ],
)
def test_what_is_no_model(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    with pytest.raises(FalError) as caught:
        list_folder(folder)
    assert caught.value.code is Code.INVALID
    assert says in caught.value.what
    assert caught.value.remedy


def test_a_file_is_no_folder_and_pickles_may_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(FalError, match="is no folder"):
        list_folder(tmp_path / "w.ckpt")
    assert [file.path for file in list_folder(tmp_path, allow_pickle=True)] == ["w.ckpt"]


@pytest.mark.parametrize("change", [b"other", b"", b"longer than before"])
def test_a_file_that_changes_gives_no_byte(tmp_path: Path, change: bytes) -> None:
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"b")
    _, part = hashed(tmp_path)
    os.utime(tmp_path / "a", ns=(1, 1))  # whatever the clock's grain
    (tmp_path / "a").write_bytes(change)
    assert part.locate(0) is None
    assert part.changed == "a"
    part.close()
    with pytest.raises(FalError) as caught:
        hash_folder(part._files, URI, "model", stop=threading.Event())
    assert caught.value.code is Code.CONFLICT
    assert "a changed" in caught.value.what


def test_a_lying_change_time_is_found_by_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first")
    before = (tmp_path / "a").stat()
    _, part = hashed(tmp_path)
    (tmp_path / "a").write_bytes(b"other")
    os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert part.look() == ""
    assert part.look([0]) == "a"
    part.close()


def test_hashing_ends_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * PIECE)
    stop = threading.Event()
    stop.set()
    with pytest.raises(FalError) as caught:
        hash_folder(list_folder(tmp_path), URI, "model", stop=stop)
    assert caught.value.code is Code.CANCELLED


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "_FILES_OPEN_MAX", 3)
    for n in range(10):
        (tmp_path / f"f{n}").write_bytes(b"%d" % n)
    _, part = hashed(tmp_path)
    for _ in range(2):
        for n in range(10):
            assert read(part, n) == b"%d" % n
            assert len(part._open) <= 3
    part.close()
    assert not part._open
