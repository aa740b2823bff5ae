"""The host image: which files of /etc are copied, and what a skeleton holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fal_runtime import host_image


def etc_of(tmp_path: Path) -> Path:
    etc = tmp_path / "etc"
    for name, text, mode in (
        ("ld.so.cache", "cache", 0o644),
        ("nsswitch.conf", "files", 0o644),
        ("shadow", "secret", 0o640),
        ("ssl/certs/ca.pem", "ca", 0o644),
        ("ssl/certs/leaked.key", "secret", 0o600),
        ("ssl/private/host.key", "secret", 0o600),
        ("falctl/node.key", "secret", 0o600),
        ("hostname", "node-7", 0o644),
    ):
        path = etc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
    (etc / "localtime").symlink_to("/usr/share/zoneinfo/Etc/UTC")
    return etc


def test_only_listed_and_readable_files_are_copied(tmp_path: Path) -> None:
    made = host_image.make_etc(tmp_path / "run", etc=etc_of(tmp_path))
    names = {str(path.relative_to(made)) for path in made.rglob("*") if not path.is_dir()}
    assert names == {
        *("ld.so.cache", "nsswitch.conf", "ssl/certs/ca.pem", "localtime"),
        *("passwd", "group", "hosts", "hostname", "resolv.conf"),
    }
    assert "secret" not in "".join(p.read_text() for p in made.rglob("*") if p.is_file() and p.name != "localtime")
    assert (made / "hostname").read_text() != "node-7"


def test_the_copy_is_made_again_only_when_etc_changed(tmp_path: Path) -> None:
    etc = etc_of(tmp_path)
    first = host_image.make_etc(tmp_path / "run", etc=etc)
    assert host_image.make_etc(tmp_path / "run", etc=etc) == first
    (etc / "nsswitch.conf").write_text("files dns, longer")
    second = host_image.make_etc(tmp_path / "run", etc=etc)
    assert second != first
    assert first.exists()  # a container may have it mounted
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([first.name, second.name])


def test_a_skeleton_has_every_mount_point_and_no_content(tmp_path: Path) -> None:
    layout = host_image.this_layout()
    root = host_image.make_skeleton(tmp_path, layout, (("/data/deep", True), ("/data/file", False)))
    for _source, inside in layout.binds:
        assert (root / inside.lstrip("/")).is_dir()
    for inside in ("proc", "dev", "sys", "tmp", "etc", "run/fal", "models", "data/deep"):
        assert (root / inside).is_dir()
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files == [root / "data/file"]
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    other = host_image.make_skeleton(tmp_path, layout)
    assert other != root
    assert not (other / "data").exists()  # one tenant's mount points are not another's


def test_the_layout_never_shows_more_than_packages() -> None:
    layout = host_image.this_layout()
    sources = [source for source, _inside in layout.binds]
    checkout = Path(host_image.__file__).parents[2]
    assert checkout not in sources
    assert Path("/") not in sources
    assert Path.home() not in sources
    inside = [target for _source, target in layout.binds]
    assert "/opt/falctl/src/fal_runtime" in inside
    assert "/opt/falctl/src/fal_contract" in inside


def test_worker_commands() -> None:
    isolated = host_image.worker_command(isolates=True)
    assert os.path.basename(isolated.argv[0]) == f"python3.{sys.version_info.minor}"
    plain = host_image.worker_command(isolates=False)
    assert plain.argv == (sys.executable,)
    assert all(Path(root).is_dir() for root in plain.env["PYTHONPATH"].split(":"))
