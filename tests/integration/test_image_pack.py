"""Images packed by the real programs: every kind of source, hostile ones, every kind of packer, every kind of end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_runtime.images import tree
from fal_runtime.images.commands import run
from fal_runtime.images.layout import read_layout
from fal_runtime.images.pack import PackRequest, PackResult, pack
from fal_runtime.images.tree import Growth, inspect, measure
from falctl.image_push import PushOptions, pack_here
from image_rig import SlowRelay, entry, layer, why_no_packing, write_layout

pytestmark = pytest.mark.skipif(bool(why_no_packing()), reason=why_no_packing() or "-")

BASE = layer([entry("bin/sh", b"shell", mode=0o755), entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")])
LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
MIB = 1 << 20


def packed(source: str, output: Path, **more: Any) -> PackResult:
    return asyncio.run(pack(PackRequest(source, output, **more)))


def refused(source: str, output: Path, code: Code, says: str, **more: Any) -> FalError:
    """It is refused, and nothing is left."""
    with pytest.raises(FalError, match=says) as caught:
        packed(source, output, **more)
    assert caught.value.code is code
    assert not output.exists() or not list(output.iterdir())
    return caught.value


def packer(*argv: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fal_runtime.images", "pack", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def unpacked(folder: Path, to: Path) -> dict[str, tuple[str, int, int]]:
    """Path → (kind and mode, uid, gid) of all that is in a packed image; its files are written to `to`."""
    file = read_layout(folder).file
    if file.suffix == ".squashfs":
        subprocess.run(["unsquashfs", "-q", "-n", "-d", to, file], check=True, capture_output=True, timeout=60)
    else:
        subprocess.run(["fsck.erofs", f"--extract={to}", file], check=True, capture_output=True, timeout=60)
    found = {}
    for path in sorted(to.rglob("*")):
        facts = path.lstat()
        found[str(path.relative_to(to))] = (stat.filemode(facts.st_mode), facts.st_uid, facts.st_gid)
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that no image may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert (folder / "mine").read_text() == "mine"


# --- sources ----------------------------------------------------------------------------------------------------------


def test_layers_whiteouts_and_owners(tmp_path: Path) -> None:
    upper = layer(
        [
            entry("etc/.wh.passwd"),
            entry("opt/.wh..wh..opq"),
            entry("opt/new", b"new", mode=0o644, uid=7, gid=8),
            entry("bin/ash", type=HARD, linkname="bin/sh"),
            entry("bin/link", type=LINK, linkname="/bin/sh"),
        ]
    )
    layout = write_layout(tmp_path / "oci", [BASE, layer({"opt/old": b"old"}), upper], config={"Cmd": ["sh"]})
    result = packed(f"oci:{layout}", tmp_path / "out")
    found = read_layout(tmp_path / "out")
    assert (found.format, found.digest, found.config.cmd) == ("erofs", result.digest, ("sh",))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "image.erofs"]
    files = unpacked(tmp_path / "out", tmp_path / "root")
    assert sorted(files) == ["bin", "bin/ash", "bin/link", "bin/sh", "etc", "opt", "opt/new"]
    assert os.readlink(tmp_path / "root/bin/link") == "/bin/sh"
    assert result.bytes == (tmp_path / "out/image.erofs").stat().st_size
    if os.geteuid() == 0:
        assert files["opt/new"][1:] == (7, 8)


@pytest.mark.parametrize("format_", ["erofs", "squashfs"])
def test_the_same_content_gives_the_same_bytes(tmp_path: Path, format_: str) -> None:
    """Whatever the folder, the moment, and folders that no layer names."""
    layout = write_layout(tmp_path / "oci", [layer({"a/b/c": b"1" * 5000, "a/d": b"2"}), layer([entry("a/.wh.d")])])
    results = [packed(f"oci:{layout}", tmp_path / name, format=format_) for name in ("one", "a-longer-name")]
    first, second = ((tmp_path / name / f"image.{format_}").read_bytes() for name in ("one", "a-longer-name"))
    assert first == second
    assert results[0].digest == results[1].digest
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "a-longer-name/config.json").read_bytes()


def test_times_of_files_are_kept(tmp_path: Path) -> None:
    """Python holds compiled files against the times of their sources."""
    layout = write_layout(tmp_path / "oci", [layer([entry("a.py", b"x", mtime=1_234_567_890)])])
    packed(f"oci:{layout}", tmp_path / "out", format="squashfs")
    unpacked(tmp_path / "out", tmp_path / "root")
    assert (tmp_path / "root/a.py").stat().st_mtime == 1_234_567_890


def test_an_archive_as_docker_saves_it(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", [BASE, layer({"x": b"y"})], config={"Entrypoint": ["/bin/sh"]})
    archive = tmp_path / "saved.tar"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:t", f"docker-archive:{archive}:app:1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    packed(f"docker-archive:{archive}", tmp_path / "out")
    assert read_layout(tmp_path / "out").config.entrypoint == ("/bin/sh",)
    assert "x" in unpacked(tmp_path / "out", tmp_path / "root")
    archive.write_bytes(archive.read_bytes()[:3000])
    refused(f"docker-archive:{archive}", tmp_path / "cut", Code.CORRUPT, "archive")
    refused(f"docker-archive:{tmp_path}/none.tar", tmp_path / "none", Code.NOT_FOUND, "is no file")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
def test_layers_in_zstd(tmp_path: Path) -> None:
    """The same bytes as of gzip layers; bombs and lies are seen in these, too."""
    layers = [BASE, layer({"x": b"y" * 5000}), layer([entry("etc/.wh.passwd")])]
    for kind in ("gzip", "zstd"):
        packed(f"oci:{write_layout(tmp_path / kind, layers, compression=kind)}", tmp_path / f"{kind}-out")
    one, other = ((tmp_path / f"{kind}-out/image.erofs").read_bytes() for kind in ("gzip", "zstd"))
    assert one == other
    bomb = write_layout(tmp_path / "bomb", [layer({"zero": bytes(24 * MIB)})], compression="zstd")
    refused(f"oci:{bomb}", tmp_path / "out", Code.FAILED_PRECONDITION, "bound", bytes_max=8 * MIB)
    faults = {"diff_id": f"sha256:{'0' * 64}"}
    lying = write_layout(tmp_path / "lying", [BASE], compression="zstd", faults=faults)
    refused(f"oci:{lying}", tmp_path / "out", Code.CORRUPT, "cannot be unpacked")
    broken = write_layout(tmp_path / "broken", [BASE], compression="zstd")
    for blob in (broken / "blobs/sha256").iterdir():
        if blob.read_bytes()[:4] == b"\x28\xb5\x2f\xfd":
            blob.write_bytes(blob.read_bytes()[:40])
    refused(f"oci:{broken}", tmp_path / "out", Code.CORRUPT, "cannot be inflated")


def test_a_folder_is_packed_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/app").write_bytes(b"app")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s"))
        result = packed(f"rootfs:{root}", tmp_path / "out")
    assert result.notes[0] == "1 device nodes or sockets were left out"
    assert (root / "s").exists(), "what is the operator's stays"
    assert sorted(unpacked(tmp_path / "out", tmp_path / "seen")) == ["bin", "bin/app", "pipe"]
    refused(f"rootfs:{tmp_path}/none", tmp_path / "no", Code.NOT_FOUND, "is no folder")
    refused(f"rootfs:{root}", root / "out", Code.INVALID, "lies in the folder")
    (tmp_path / "empty").mkdir()
    refused(f"rootfs:{tmp_path}/empty", tmp_path / "no", Code.FAILED_PRECONDITION, "is empty")


def test_files_lie_in_the_order_of_their_first_use(tmp_path: Path) -> None:
    names = [f"f{number:02}" for number in range(20)]
    layout = write_layout(tmp_path / "oci", [layer({name: name.encode() * 100_000 for name in names})])
    (tmp_path / "order").write_text("f17\n/f03\nmissing\n")
    result = packed(f"oci:{layout}", tmp_path / "out", order=tmp_path / "order")
    assert result.format == "squashfs"
    data = (tmp_path / "out/image.squashfs").read_bytes()
    starts = sorted(names, key=lambda name: data.index(name.encode() * 1000))
    assert starts[:2] == ["f17", "f03"]


def test_falctl_packs_here(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", [BASE])
    said: list[str] = []
    facts = pack_here(f"oci:{layout}", tmp_path / "out", PushOptions(), say=said.append)
    assert facts["digest"] == read_layout(tmp_path / "out").digest
    assert "packing as erofs" in said
    with pytest.raises(FalError, match="has no tag 'none', only: t") as caught:
        pack_here(f"oci:{layout}:none", tmp_path / "other", PushOptions())
    assert (caught.value.code, caught.value.remedy) == (Code.FAILED_PRECONDITION, "Name one of them.")


# --- hostile ----------------------------------------------------------------------------------------------------------


def up(path: Path) -> str:
    return "../" * 30 + str(path).lstrip("/")


@pytest.mark.parametrize("how", ["dots", "absolute", "link", "link-dots", "whiteout", "whiteout-link", "opaque-link"])
def test_what_points_out_of_the_image_stays_in_it(tmp_path: Path, outside: Path, how: str) -> None:
    members: dict[str, Sequence[Any]] = {
        "dots": [entry(up(outside / "evil"), b"evil")],
        "absolute": [entry(str(outside / "evil"), b"evil")],
        "link": [entry("out", type=LINK, linkname=str(outside)), entry("out/mine", b"evil")],
        "link-dots": [entry("out", type=LINK, linkname=up(outside)), entry("out/mine", b"evil")],
        "whiteout": [entry(up(outside / ".wh.mine"))],
        "whiteout-link": [entry("out", type=LINK, linkname=str(outside)), entry("out/.wh.mine")],
        "opaque-link": [entry("out", type=LINK, linkname=str(outside)), entry("out/.wh..wh..opq")],
    }
    layout = write_layout(tmp_path / "oci", [BASE, layer(members[how])])
    packed(f"oci:{layout}", tmp_path / "out")
    assert "bin/sh" in unpacked(tmp_path / "out", tmp_path / "root")


@pytest.mark.parametrize(
    "members",
    [
        lambda to: [entry("x", type=HARD, linkname=str(to / "mine")), entry("x", b"evil")],
        lambda to: [entry("x", type=HARD, linkname=up(to / "mine"))],
        lambda _: [entry(".wh...")],
        lambda _: [entry("etc/.wh...")],
        lambda _: [entry(".wh..")],
        lambda _: [entry(".wh.")],
        lambda to: [entry("./", type=LINK, linkname=str(to)), entry("evil", b"evil")],
        lambda _: [entry(".", b"evil")],
    ],
    ids=["hard-link", "hard-link-dots", "whiteout-dots", "inner-whiteout-dots", "whiteout-dot", "whiteout-of-nothing",
         "root-is-a-link", "root-is-a-file"],
)  # fmt: skip
def test_tars_that_make_no_sense_are_refused(tmp_path: Path, outside: Path, members: Any) -> None:
    layout = write_layout(tmp_path / "oci", [BASE, layer(members(outside))])
    error = refused(f"oci:{layout}", tmp_path / "out", Code.CORRUPT, "cannot be unpacked")
    assert str(tmp_path / "out" / ".work") not in str(error)


def test_layers_that_are_not_what_their_digests_say(tmp_path: Path) -> None:
    other = layer({"evil": b"evil"})
    changed = write_layout(tmp_path / "changed", [BASE])
    blob = max((tmp_path / "changed/blobs/sha256").iterdir(), key=lambda path: path.read_bytes()[:2] == b"\x1f\x8b")
    data = bytearray(blob.read_bytes())
    data[4] ^= 1  # gzip's time: the content is the same, the digest is not
    blob.write_bytes(data)
    refused(f"oci:{changed}", tmp_path / "out", Code.CORRUPT, "cannot be unpacked")
    for name, faults in (
        ("gone", {"layer_digest": f"sha256:{'0' * 64}"}),
        ("inner", {"diff_id": f"sha256:{'0' * 64}"}),
    ):
        layout = write_layout(tmp_path / name, [other], faults=faults)
        refused(f"oci:{layout}", tmp_path / "out", Code.CORRUPT, "cannot be unpacked")
    broken = write_layout(tmp_path / "broken", [b"no tar" * 1000])
    refused(f"oci:{broken}", tmp_path / "out", Code.CORRUPT, "cannot be unpacked")
    index = tmp_path / "changed/index.json"
    table = json.loads(index.read_text())
    blob = tmp_path / "changed/blobs/sha256" / table["manifests"][0]["digest"].removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes() + b" ")
    refused(f"oci:{changed}", tmp_path / "out", Code.CORRUPT, "not what its digest says")


@pytest.mark.parametrize("how", ["one", "many", "sparse"])
def test_bombs_are_stopped_at_the_bound(tmp_path: Path, how: str) -> None:
    if how == "one":
        bomb = layer({"zero": bytes(24 * MIB)})
    elif how == "many":
        bomb = layer({f"zero{number}": bytes(MIB) for number in range(24)})
    else:
        bomb = layer([entry("zero", bytes(24 * MIB)), *[entry(f"l{n}", type=HARD, linkname="zero") for n in range(9)]])
    layout = write_layout(tmp_path / "oci", [BASE, bomb])
    refused(f"oci:{layout}", tmp_path / "out", Code.FAILED_PRECONDITION, "bound|bytes-max", bytes_max=8 * MIB)


def test_hard_links_count_once(tmp_path: Path) -> None:
    links = [entry(f"l{number}", type=HARD, linkname="one") for number in range(50)]
    layout = write_layout(tmp_path / "oci", [layer([entry("one", os.urandom(MIB)), *links])])
    assert packed(f"oci:{layout}", tmp_path / "out", bytes_max=3 * MIB).bytes < 2 * MIB


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_layout(tmp_path / "oci", [layer({f"d{number}/f": b"" for number in range(60)})])
    monkeypatch.setattr(tree, "FILES_MAX", 100)
    refused(f"oci:{layout}", tmp_path / "out", Code.FAILED_PRECONDITION, "more than 100 files")


def test_configurations_out_of_bounds(tmp_path: Path) -> None:
    for number, (config, code, says) in enumerate(
        (
            ({"Env": ["A=" + "x" * 100_000] * 3}, Code.FAILED_PRECONDITION, "256 KiB"),
            ({"WorkingDir": "../x"}, Code.CORRUPT, "WorkingDir"),
            ({"Cmd": ["a\0b"]}, Code.CORRUPT, "NUL"),
        )
    ):
        layout = write_layout(tmp_path / f"oci{number}", [BASE], config=config)
        refused(f"oci:{layout}", tmp_path / "out", code, says)
    layout = write_layout(tmp_path / "large", [BASE], faults={"config_blob": b'{"a":"' + b"x" * (5 * MIB) + b'"}'})
    refused(f"oci:{layout}", tmp_path / "out", Code.FAILED_PRECONDITION, "bytes, at most")
    layout = write_layout(tmp_path / "labels", [BASE], config={"Cmd": ["x"], "Labels": {"a": "b" * 300_000}})
    packed(f"oci:{layout}", tmp_path / "out")
    assert read_layout(tmp_path / "out").config.cmd == ("x",)


def test_special_files(tmp_path: Path) -> None:
    members = [
        entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        entry("dev/sda", type=tarfile.BLKTYPE, devmajor=8),
        entry("pipe", type=tarfile.FIFOTYPE),
        entry("su", b"x", mode=0o4755),
        entry("line\nend", b"x"),
    ]
    layout = write_layout(tmp_path / "oci", [BASE, layer(members)])
    result = packed(f"oci:{layout}", tmp_path / "out", format="squashfs")  # its reader gives set-uid bits back
    assert "2 device nodes or sockets were left out" in result.notes
    files = unpacked(tmp_path / "out", tmp_path / "root")
    assert (files["pipe"][0][0], files["su"][0], "line\nend" in files) == ("p", "-rwsr-xr-x", True)
    assert [name for name in files if name.startswith("dev/")] == []


@pytest.mark.root
def test_attributes_are_dropped(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "ping").write_bytes(b"x")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(root / "ping", "security.capability", capability)
    packed(f"rootfs:{root}", tmp_path / "out")
    assert b"capability" not in (tmp_path / "out/image.erofs").read_bytes()
    unpacked(tmp_path / "out", tmp_path / "seen")
    assert os.listxattr(tmp_path / "seen/ping") == []


def test_other_platforms_and_empty_images(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", [BASE], platform="linux/arm64")
    refused(f"oci:{layout}", tmp_path / "out", Code.FAILED_PRECONDITION, "is for linux/arm64, not for linux/amd64")
    packed(f"oci:{layout}", tmp_path / "arm", platform="linux/arm64")
    write_layout(layout, [BASE], platform="linux/s390x")  # two under one name: as an index of platforms
    refused(f"oci:{layout}", tmp_path / "out", Code.FAILED_PRECONDITION, "only: linux/arm64, linux/s390x")
    write_layout(layout, [BASE, layer({"amd": b""})], platform="linux/amd64")
    packed(f"oci:{layout}:t", tmp_path / "amd")
    assert "amd" in unpacked(tmp_path / "amd", tmp_path / "root")
    for name, layers in (("none", []), ("bare", [layer([])])):
        empty = write_layout(tmp_path / name, layers)
        refused(f"oci:{empty}", tmp_path / "out", Code.FAILED_PRECONDITION, "is empty")


def test_a_layout_that_would_hang_a_reader(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", [BASE])
    (layout / "index.json").unlink()
    os.mkfifo(layout / "index.json")
    refused(f"oci:{layout}", tmp_path / "out", Code.CORRUPT, "no plain file")
    refused(f"oci:{tmp_path}/none", tmp_path / "out", Code.NOT_FOUND, "cannot be read")


# --- packers ----------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_an_ordinary_user_packs_what_is_roots(tmp_path: Path) -> None:
    """Files become root's, and what their owner may not read is readable in the image."""
    members = [
        entry("etc/shadow", b"x", mode=0, uid=0, gid=42),
        entry("var/box", type=tarfile.DIRTYPE, mode=0o000, uid=33),
        entry("var/box/inner", b"y", mode=0o600, uid=33),
        entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    layout = write_layout(tmp_path / "oci", [BASE, layer(members)])
    subprocess.run(["chmod", "-R", "a+rX", layout], check=True, timeout=30)
    program = (
        "import asyncio, concurrent.futures.thread, os, sys; from pathlib import Path\n"
        "from fal_runtime.images.pack import *\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "got = asyncio.run(pack(PackRequest(sys.argv[1], Path(sys.argv[2]))))\n"
        "print(*got.notes, sep='|')"
    )
    output = tmp_path / "out"
    output.mkdir()
    os.chown(output, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", program, f"oci:{layout}", output],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "all files belong to root" in done.stdout
    assert "1 device nodes or sockets were left out" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "image.erofs"]
    files = unpacked(output, tmp_path / "root")
    assert {ids[1:] for ids in files.values()} == {(0, 0)}
    assert {"etc/shadow", "var/box/inner"} <= set(files)
    assert "dev/null" not in files


@pytest.mark.root
def test_root_of_a_user_namespace_packs_the_same_bytes(tmp_path: Path) -> None:
    """As a node's pack task runs: no mknod, few capabilities, ids 0 to 65535 only."""
    members = [
        entry("etc/shadow", b"x", mode=0, uid=0, gid=42),
        entry("home/ann", type=tarfile.DIRTYPE, mode=0o700, uid=1000, gid=1000),
        entry("home/ann/su", b"y", mode=0o6755, uid=1000, gid=1000),
        entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    layout = write_layout(tmp_path / "oci", [BASE, layer(members)])
    expected = packed(f"oci:{layout}", tmp_path / "as-root")
    program = (
        "import asyncio, concurrent.futures.thread, os, subprocess, sys; from pathlib import Path\n"
        "from fal_runtime.images.pack import *\n"
        "child = subprocess.Popen(['unshare', '--user', 'cat'], stdin=-1, stdout=-1)\n"
        "child.stdin.write(b'x'); child.stdin.flush(); child.stdout.read(1)\n"
        "for name in ('uid_map', 'gid_map'): Path(f'/proc/{child.pid}/{name}').write_text('0 300000 65536')\n"
        "import ctypes; fd = os.open(f'/proc/{child.pid}/ns/user', os.O_RDONLY)\n"
        "assert ctypes.CDLL(None, use_errno=True).setns(fd, 0) == 0\n"
        "os.setgroups([]); os.setgid(0); os.setuid(0); child.kill(); child.wait()\n"
        "child.stdin.close(); child.stdout.close()\n"
        "for cap in set(range(41)) - {0, 1, 3, 4, 31}: ctypes.CDLL(None).prctl(24, cap, 0, 0, 0)\n"
        "got = asyncio.run(pack(PackRequest(sys.argv[1], Path(sys.argv[2]))))\n"
        "print(got.digest, *got.notes, sep='|')"
    )
    output = tmp_path / "out"
    output.mkdir()
    subprocess.run(["chown", "-R", "300000:300000", output, layout], check=True, timeout=30)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", program, f"oci:{layout}", output],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "|".join([expected.digest, "1 device nodes or sockets were left out"])
    assert (output / "image.erofs").read_bytes() == (tmp_path / "as-root/image.erofs").read_bytes()


def test_programs_keep_nothing_outside_of_their_folder(tmp_path: Path) -> None:
    """skopeo's own database is made in the folder, and goes with it."""
    layout, folder = write_layout(tmp_path / "oci", [BASE]), tmp_path / "folder"
    folder.mkdir()
    argv = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:t", f"oci:{folder}/copy:t"]
    assert asyncio.run(run(argv, timeout_s=60, folder=folder)).code == 0
    assert list(folder.glob(".local/share/containers/cache/*"))


def test_programs_are_bounded(tmp_path: Path) -> None:
    """Time, output, the size of files; and what they start ends with them."""

    async def body() -> None:
        with pytest.raises(FalError) as caught:
            await run(["sh", "-c", "sleep 600 & wait"], timeout_s=0.3, folder=tmp_path)
        assert caught.value.code is Code.TIMEOUT
        with pytest.raises(FalError, match="no end"):
            await run(["sh", "-c", "yes"], timeout_s=60, folder=tmp_path)
        flood = await run(["sh", "-c", "yes complaint | head -c 50000000 >&2"], timeout_s=60, folder=tmp_path)
        assert (flood.code, flood.last_line) == (0, "complaint")
        argv = ["sh", "-c", "exec head -c 100000 /dev/zero > f"]
        large = await run(argv, timeout_s=60, folder=tmp_path, file_bytes_max=5000)
        assert large.code != 0
        assert (tmp_path / "f").stat().st_size <= 5000

        def never() -> None:
            raise FalError(Code.CORRUPT, "it was seen", remedy="")

        with pytest.raises(FalError, match="it was seen"):
            await run(["sleep", "600"], timeout_s=60, folder=tmp_path, watch=never)

    asyncio.run(body())


# --- ends -------------------------------------------------------------------------------------------------------------


def test_the_command_prints_facts_or_one_error(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", [BASE])
    with packer(f"oci:{layout}", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["format"], facts["digest"]) == ("erofs", read_layout(tmp_path / "out").digest)
    assert not (tmp_path / "work").exists()
    with packer(f"oci:{layout}", "--output", str(tmp_path / "out")) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: --output = ")
    assert "holds config.json already" in err
    with packer(f"oci:{layout}") as process:
        process.communicate(timeout=60)
    assert process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pack_that_is_stopped_leaves_nothing(tmp_path: Path, number: int) -> None:
    """Stopped while a registry is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent, SlowRelay(silent.getsockname()[1], 1.0) as relay:
        argv = [f"docker://{relay.host}/a:1", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        with packer(*argv) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("asking ")
            assert list((tmp_path / "work").iterdir())
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "error: packing was stopped. Run it again.\n"
    assert not (tmp_path / "work").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = f"docker://127.0.0.1:{silent.getsockname()[1]}/a:1"
        error = refused(source, tmp_path / "out", Code.TIMEOUT, "took longer than 1 s", timeout_s=1.0)
    assert error.retryable


def test_wrong_options_are_named(tmp_path: Path) -> None:
    source = f"oci:{write_layout(tmp_path / 'oci', [BASE])}"
    for more, field in (
        ({"platform": "amd64"}, "platform"),
        ({"bytes_max": 0}, "--bytes-max"),
        ({"bytes_max": 1 << 60}, "--bytes-max"),
        ({"format": "ext4"}, "--format"),
        ({"order": tmp_path / "none"}, "--order"),
    ):
        error = refused(source, tmp_path / "out", Code.INVALID, field, **more)
        assert error.field == field
    (tmp_path / "file").write_text("")
    with pytest.raises(FalError, match="cannot be made"):
        packed(source, tmp_path / "file")


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_a_deep_tree_is_measured(tmp_path: Path) -> None:
    """Deeper than a recursive walk could go."""
    root = tmp_path / "deep"
    root.mkdir()
    depth = 1010
    folder = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    with open(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=folder), "wb") as file:
        file.write(b"x" * 1000)
    os.close(folder)
    size = measure(root)
    assert size.files == depth + 1
    assert inspect(root, bytes_max=MIB, ids_max=1 << 32).size.bytes == 1000
    subprocess.run(["rm", "-rf", root], check=True, timeout=30)


def test_growth_is_seen_by_walking_only_where_the_disk_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    monkeypatch.setattr(tree, "measure", lambda *args, **more: walks.append(1) or measure(*args, **more))
    growth = Growth(tmp_path, 1 << 50)
    growth.check()
    assert walks == []
    growth = Growth(tmp_path, 4 * MIB)
    with (tmp_path / "f").open("wb") as file:
        file.write(os.urandom(12 * MIB))
        file.flush()
        os.fsync(file.fileno())
    if shutil.disk_usage(tmp_path).free:
        with pytest.raises(FalError, match="bound is"):
            growth.check()
        assert walks == [1]


def test_growth_is_seen_while_others_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's numbers say that nothing has grown; the folder is walked now and then all the same."""
    monkeypatch.setattr(tree, "_ANYWAY_S", 0.0)
    before = os.statvfs(tmp_path)
    monkeypatch.setattr(tree.os, "statvfs", lambda _: before)
    growth = Growth(tmp_path, 4 * MIB)
    growth.check()
    (tmp_path / "f").write_bytes(bytes(5 * MIB))
    monkeypatch.setattr(growth, "_anyway_s", 0.0)
    with pytest.raises(FalError, match="bound is"):
        growth.check()
