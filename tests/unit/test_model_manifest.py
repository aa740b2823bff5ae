"""The digest that names a model, and the paths that a model's files may have."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_contract.limits import MODEL_FILES_MAX
from fal_contract.model_manifest import FileEntry, check_digest, check_files, check_path, manifest_digest

ZERO = bytes(32)


def test_the_digest_is_frozen() -> None:
    files = [FileEntry("unet/b.safetensors", 2, hashlib.sha256(b"bb").digest()), FileEntry("a.json", 0, ZERO)]
    text = f"fal-manifest 1\n{'00' * 32} 0 a.json\n{hashlib.sha256(b'bb').hexdigest()} 2 unet/b.safetensors\n"
    assert manifest_digest(files) == hashlib.sha256(text.encode()).hexdigest()


@given(st.permutations([FileEntry(f"f{i}", i, ZERO) for i in range(6)]))
def test_order_does_not_matter(files: list[FileEntry]) -> None:
    assert manifest_digest(files) == manifest_digest(sorted(files, key=lambda e: e.path))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a//b",
        "./a",
        "a/",
        "a\nb",
        "a\0b",
        "a\\b",
        "x" * 256,
        "a/" * 600 + "b",
        "\ud800",
    ],
)
def test_a_bad_path_is_refused(path: str) -> None:
    with pytest.raises(FalError) as caught:
        check_path(path)
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "path"


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ([], "files"),
        ([FileEntry("a", 1, ZERO), FileEntry("a", 1, ZERO)], "path"),
        ([FileEntry("a", 1, ZERO), FileEntry("a/b", 1, ZERO)], "path"),
        ([FileEntry("a", -1, ZERO)], "bytes"),
        ([FileEntry("a", 1, b"short")], "sha256"),
        ([FileEntry(f"f{i}", 0, ZERO) for i in range(MODEL_FILES_MAX + 1)], "files"),
    ],
)
def test_bad_files_are_refused(files: list[FileEntry], field: str) -> None:
    with pytest.raises(FalError) as caught:
        check_files(files)
    assert caught.value.field == field


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "../" + "a" * 61])
def test_a_bad_digest_is_refused(digest: str) -> None:
    with pytest.raises(FalError):
        check_digest(digest)
