"""Taking a container away while somebody else does the same: a removal that was cancelled goes on in its thread."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fal_runtime.oci import leftovers
from fal_runtime.oci.record import ContainerFiles


def made_ahead(folder: Path) -> ContainerFiles:
    """The files of a container that is a link to where it was made."""
    (folder / "prepared" / "pool-1" / "log").mkdir(parents=True)
    (folder / "prepared" / "pool-1" / "log" / "log").touch()
    (folder / "containers").mkdir()
    (folder / "containers" / "one").symlink_to(Path("..") / "prepared" / "pool-1")
    return ContainerFiles(folder / "containers" / "one")


def place_where(on_release: Any) -> Any:
    return cast(Any, SimpleNamespace(ranges=SimpleNamespace(release=on_release)))


@pytest.mark.parametrize("when", ["before", "while"])
def test_files_that_another_removal_took_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    files = made_ahead(tmp_path)
    remove_all = shutil.rmtree

    def other(directory: Path) -> None:
        remove_all(directory)
        files.directory.unlink()

    def during(directory: Path, **more: Any) -> None:
        remove_all(directory / "log")
        error = FileNotFoundError(2, "gone", str(directory / "log"))
        more["onerror"](None, str(directory / "log"), (FileNotFoundError, error, None))
        remove_all(directory, **more)

    if when == "while":
        monkeypatch.setattr(shutil, "rmtree", during)
    leftovers.take_away(place_where(other if when == "before" else lambda directory: None), files, None)
    assert not files.directory.is_symlink()
    assert not (tmp_path / "prepared" / "pool-1").exists()


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(directory: Path, **more: Any) -> None:
        error = PermissionError(13, "no", str(directory))
        more["onerror"](None, str(directory), (PermissionError, error, None))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    with pytest.raises(PermissionError):
        leftovers.take_away(place_where(lambda directory: None), made_ahead(tmp_path), None)
