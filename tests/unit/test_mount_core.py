"""The pure parts of the mount: the kernel's protocol, the tree of nodes, the windows of readers."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.pieces import Bitmap
from fal_fsd.mount import holder, wire
from fal_fsd.mount.sources import FolderPart, Kept, segments
from fal_fsd.mount.tree import Tree
from fal_fsd.mount.window import AHEAD_BYTES_MAX, IMAGE_AHEAD_BYTES_MAX, Readers
from fsd_fakes import FakePart, make_artifact

MOUNT = Path(wire.__file__).parent


def request(opcode: int, body: bytes = b"", *, unique: int = 8, nodeid: int = 1) -> memoryview:
    head = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, nodeid, 0, 0, 7, 0, 0)
    return memoryview(head + body)


def artifact(*paths: str, size_bytes: int = 10) -> Artifact:
    files = tuple(ArtifactFile(path, size_bytes) for path in sorted(paths))
    return Artifact("0" * 64, "model", "file:///x", 4, files)


def test_sizes_are_the_kernels() -> None:
    """struct sizes of include/uapi/linux/fuse.h, protocol 7.38 and later."""
    attr = wire.Attr(5, 4097, False)
    assert len(attr.pack()) == 88
    assert len(wire.init_reply(1, wire.Offer(40, 0, 0))) == 16 + 64
    assert len(wire.entry_reply(1, attr)) == 16 + 128
    assert len(wire.attr_reply(1, attr)) == 16 + 104
    assert len(wire.open_reply(1, 0, 0)) == 16 + 16
    assert len(wire.statfs_reply(1, bytes_total=1, files=1)) == 16 + 80
    assert wire.resend_notice() == holder._RESEND == struct.pack("=IiQ", 16, 7, 0)


def test_a_request_is_read() -> None:
    found = wire.parse(request(15, struct.pack("=QQIIQII", 77, 4096, 1 << 20, 0, 0, 0, 0), unique=6, nodeid=3))
    assert (found.opcode, found.unique, found.nodeid, found.pid) == (wire.Op.READ, 6, 3, 7)
    assert wire.read_of(found.body) == (77, 4096, 1 << 20)
    assert wire.name_of(wire.parse(request(1, "größe.bin\0".encode())).body) == "größe.bin"
    assert wire.name_of(wire.parse(request(1, b"\xff\0")).body) == "\udcff"


def test_init_is_agreed_on() -> None:
    offered = wire.INIT_MAX_PAGES | wire.INIT_DIRECT_IO_ALLOW_MMAP | wire.INIT_HAS_RESEND | wire.INIT_EXT | 1 << 16
    body = struct.pack("=IIIIII", 7, 45, 131072, offered & 0xFFFFFFFF, offered >> 32, 0)
    offer = wire.offer_of(memoryview(body))
    assert (offer.minor, offer.resend, offer.allow_mmap) == (45, True, True)
    for allow_mmap in (True, False):
        answer = wire.init_reply(3, offer, allow_mmap=allow_mmap)
        major, minor, _, low, _, _, _, _, pages, _, high, _ = struct.unpack("=IIIIHHIIHHII24x", answer[16:])
        agreed = high << 32 | low
        assert (major, minor, pages) == (7, wire.MINOR, 256)
        assert not agreed & 1 << 16  # writeback cache: offered, not wanted
        assert bool(agreed & wire.INIT_DIRECT_IO_ALLOW_MMAP) is allow_mmap
        assert agreed & wire.INIT_HAS_RESEND
    with pytest.raises(wire.WireError, match=r"FUSE 7\.20"):
        wire.offer_of(memoryview(struct.pack("=IIII", 7, 20, 0, 0)))
    old = wire.offer_of(memoryview(struct.pack("=IIII", 7, 31, 0, offered & 0xFFFFFFFF)))
    assert not old.resend


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_one_way(raw: bytes) -> None:
    try:
        found = wire.parse(memoryview(raw))
    except wire.WireError:
        return
    for decode in (wire.read_of, wire.name_of, wire.number_of, wire.offer_of):
        with contextlib.suppress(wire.WireError):
            decode(found.body)


@given(st.integers(0, 64), st.binary(max_size=100))
def test_any_body_is_decoded_or_refused(opcode: int, body: bytes) -> None:
    found = wire.parse(request(opcode, body))
    assert bytes(found.body) == body
    for decode, length in ((wire.read_of, 40), (wire.number_of, 8)):
        if len(body) < length:
            with pytest.raises(wire.WireError):
                decode(found.body)
        else:
            decode(found.body)


def test_what_would_change_something_is_refused() -> None:
    assert wire.refusal(16) == errno.EROFS  # WRITE
    assert wire.refusal(22) == errno.ENOSYS  # GETXATTR


@given(st.lists(st.text("abcé", min_size=1, max_size=200), unique=True, max_size=40), st.integers(200, 2000))
def test_a_listing_is_complete_whatever_fits_at_once(names: list[str], size: int) -> None:
    entries = [(number + 2, number % 2 == 0, name) for number, name in enumerate(names)]
    size = max(size, 24 + 8 + max((len(name.encode()) for name in names), default=0))
    found, offset = [], 0
    while page := wire.listing(entries, offset=offset, size=size):
        assert len(page) <= size
        assert len(page) % 8 == 0
        at = 0
        while at < len(page):
            nodeid, offset, length, kind = struct.unpack_from("=QQII", page, at)
            found.append((nodeid, kind == 4, page[at + 24 : at + 24 + length].decode()))
            at += (24 + length + 7) & ~7
    assert found == entries


def test_the_tree_of_an_artifact() -> None:
    tree = Tree(artifact("b", "a/x", "a/y/z", "c"))
    root = tree.node(1)
    assert root is not None
    assert [name for _, _, name in tree.listing(root)] == [".", "..", "a", "b", "c"]
    folder = tree.child(1, "a")
    assert folder is not None
    assert folder.folder
    file = tree.child(folder.number, "x")
    assert file is not None
    assert (file.file, file.size_bytes, file.folder) == (0, 10, False)
    assert tree.child(file.number, "x") is None
    assert tree.child(999, "x") is None
    assert tree.node(0) is None
    assert tree.node(len(tree) + 1) is None


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), unique=True, max_size=12))
def test_equal_artifacts_have_equal_numbers(paths: list[str]) -> None:
    files = [path for path in paths if not any(other.startswith(f"{path}/") for other in paths)]
    one, two = Tree(artifact(*files)), Tree(artifact(*reversed(files)))
    for path in files:
        numbers = []
        for tree in (one, two):
            node = tree.node(1)
            for name in path.split("/"):
                assert node is not None
                node = tree.child(node.number, name)
            assert node is not None
            numbers.append((node.number, node.file))
        assert numbers[0] == numbers[1]


def test_a_window_grows_while_a_reader_goes_on_and_moves_when_it_jumps() -> None:
    readers = Readers(4 << 20)
    file = range(10, 110)
    assert readers.read(1, range(10, 11), file) == ([10, 11], [])
    assert readers.read(1, range(10, 11), file) == ([], [])
    assert readers.read(1, range(11, 12), file) == ([12, 13], [10])
    assert readers.read(1, range(12, 13), file) == ([14, 15, 16], [11])
    for piece in range(13, 40):
        readers.read(1, range(piece, piece + 1), file)
    assert len(readers.wanted) == AHEAD_BYTES_MAX // (4 << 20) + 1
    added, gone = readers.read(1, range(90, 91), file)
    assert added == [90]
    assert gone == list(range(39, 56))
    assert readers.read(1, range(91, 92), file)[0] == [91, 92]
    assert readers.release(1) == [91, 92]
    assert readers.release(1) == []


def test_a_window_stays_within_its_bound() -> None:
    readers = Readers(256 << 10, IMAGE_AHEAD_BYTES_MAX)
    for piece in range(50):
        readers.read(1, range(piece, piece + 1), range(100))
    assert readers.wanted == frozenset(range(49, 50 + IMAGE_AHEAD_BYTES_MAX // (256 << 10)))


def test_a_window_ends_with_its_file() -> None:
    readers = Readers(1 << 20)
    assert readers.read(1, range(3, 5), range(3, 5)) == ([3, 4], [])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "wait", "release"]), st.integers(0, 3), st.integers(0, 19), st.integers(1, 3)
        )
    )
)
def test_wanted_is_what_windows_and_waits_hold(steps: list[tuple[str, int, int, int]]) -> None:
    readers = Readers(32 << 20)
    told: Counter[int] = Counter()
    waits: list[range] = []
    for what, handle, start, length in steps:
        pieces = range(start, min(start + length, 20))
        if what == "read":
            added, gone = readers.read(handle, pieces, range(20))
            assert set(pieces) <= readers.wanted
        elif what == "wait":
            waits.append(pieces)
            added, gone = readers.take(pieces), []
        else:
            added, gone = [], readers.release(handle)
            if waits:
                gone += readers.give_back(waits.pop())
        told.update(added)
        told.subtract(gone)
        assert set(told.values()) <= {0, 1}  # said once, taken back once
        assert {piece for piece, count in told.items() if count} == readers.wanted
        assert all(piece in readers.wanted for wait in waits for piece in wait)


def test_segments_are_the_bytes(tmp_path: Path) -> None:
    made, contents = make_artifact([100, 0, 37], piece_bytes=16)
    for path, data in contents.items():
        (tmp_path / path).write_bytes(data)
    part = FakePart(made, contents, pieces=[0, 1, 2, 4, 8, 9])
    kept = Kept(part)
    part.close()  # what was kept stays
    whole = FolderPart(made, tmp_path)
    try:
        for source in (kept, whole):
            found = segments(source, made.layout.covering(0, 5, 40), 5, 40)
            assert found is not None
            assert len(found) == 1
            fd, offset, size = found[0]
            assert os.pread(fd, size, offset) == contents["file-0"][5:45]
        assert segments(kept, made.layout.covering(0, 40, 20), 40, 20) is None
        assert kept.has(4)
        assert not kept.has(3)
        assert segments(kept, made.layout.covering(2, 0, 10), 0, 10) is None
        assert whole.have.complete
        assert whole.writer(0, source="x") is None
        assert whole.digest_of(0) == (made.hashes or ())[0]
    finally:
        kept.close()
        whole.close()


def test_kept_pieces_may_lie_anywhere() -> None:
    class Scattered(FakePart):
        def locate(self, piece: int) -> tuple[int, int, int] | None:
            found = super().locate(piece)
            return (found[0], 64 - found[1], found[2]) if found is not None else None

    made, contents = make_artifact([80], piece_bytes=16)
    part = Scattered(made, contents)
    kept = Kept(part)
    for piece in range(5):
        mine, theirs = kept.locate(piece), part.locate(piece)
        assert mine is not None
        assert theirs is not None
        assert mine[1:] == theirs[1:]
    nothing = Kept(part, nothing=True)
    assert not any(nothing.has(piece) for piece in range(5))
    assert Bitmap(5).count == 0
    for one in (kept, nothing, part):
        one.close()


def test_only_these_calls_name_a_path() -> None:
    """Modules that run while a mount is served name no path, but for mounting, /proc, /sys and the holder's folder."""
    path_calls = {"open", "stat", "lstat", "exists", "is_dir", "is_file", "iterdir", "glob", "rglob", "listdir",
                  "scandir", "resolve", "read_text", "read_bytes", "write_text", "readlink", "access", "samefile",
                  "ismount",
                  "mkdir", "rmdir", "unlink", "touch", "walk", "statvfs"}  # fmt: skip
    allowed = {
        "connection.py": set[str](), "server.py": set[str](), "wire.py": set[str](), "tree.py": set[str](),
        "window.py": set[str](), "access.py": set[str](), "sources.py": {"open"}, "holder.py": {"unlink"},
        "probe.py": {"mkdir"},
        "mounts.py": {"mkdir", "exists"}, "__init__.py": set[str](),
        "kernel.py": {"open", "read_text", "write_text", "exists", "is_dir", "iterdir", "rmdir"},
        "keeper.py": {"open", "exists", "stat", "mkdir", "read_text", "write_text", "rmdir"},
    }  # fmt: skip
    for path in MOUNT.glob("*.py"):
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert called & path_calls <= allowed[path.name], path.name


def test_the_holder_needs_nothing_of_ours() -> None:
    """It is started without our packages, so that it stays small."""
    tree = ast.parse((MOUNT / "holder.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= {"__future__", "contextlib", "dataclasses", "errno", "json", "os", "select", "signal", "socket",
                     "struct", "sys", "time"}  # fmt: skip
