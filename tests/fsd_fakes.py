"""Stand-ins for the parts of fsd (`fal_fsd.ports`): a part in memory, peers without sockets, events to wait for.

`FakePart` keeps its bytes in anonymous files (memfd), so `locate` and `file_path` work as on a disk; it checks BLAKE3
as the real one does. `FakeNet` joins `FakePeers` of several nodes in one event loop: what one asks, the other gives.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Claim, Lease, Place
from fal_fsd.peers.address import PeerAddress
from fal_fsd.ports import BadPiece, Part, PeerEvents, PieceWriter

Contents = dict[str, bytes]


def make_artifact(
    sizes: Sequence[int], *, seed: int = 0, kind: str = "model", piece_bytes: int = 1 << 16, attested: bool = True
) -> tuple[Artifact, Contents]:
    """An artifact of files `file-0…` of these sizes with random bytes, and these bytes by path."""
    rng = random.Random(seed)
    contents = {f"file-{n}": rng.randbytes(size) for n, size in enumerate(sizes)}
    return artifact_of(contents, kind=kind, piece_bytes=piece_bytes, attested=attested), contents


def artifact_of(
    contents: Contents,
    *,
    kind: str = "model",
    piece_bytes: int = 1 << 16,
    attested: bool = True,
    uri: str = "file:///x",
) -> Artifact:
    """The artifact of these files. `attested` ones carry digests but no signature."""
    files = tuple(
        ArtifactFile(path, len(data), version="v1", sha256=hashlib.sha256(data).digest() if attested else b"")
        for path, data in sorted(contents.items(), key=lambda item: item[0].encode())
    )
    bare = Artifact(listing_id(uri, files), kind, uri, piece_bytes, files)
    if not attested:
        return bare
    hashes = tuple(blake3(piece_of(bare, contents, piece)).digest() for piece in range(bare.layout.count))
    return Artifact(bare.id, kind, uri, piece_bytes, files, hashes)


def piece_of(artifact: Artifact, contents: Contents, piece: int) -> bytes:
    """The bytes of one piece."""
    span = artifact.layout.span(piece)
    return contents[artifact.files[span.file].path][span.offset : span.offset + span.length]


class FakePart:
    """`ports.Part` over anonymous files. `fail_with`: what every write raises from now on. Close it."""

    def __init__(
        self, artifact: Artifact, contents: Contents | None = None, pieces: Sequence[int] | None = None
    ) -> None:
        """Empty without `contents`; else with `pieces` of them (default: all)."""
        self.artifact = artifact
        self.fail_with: Exception | None = None
        self.sources: dict[int, str] = {}
        self._lock = threading.Lock()
        self._have = Bitmap(artifact.layout.count)
        self._digests: dict[int, bytes] = {}
        self._writing: set[int] = set()
        self._fds = [os.memfd_create(f"part-{n}", os.MFD_CLOEXEC) for n in range(len(artifact.files))]
        for fd, file in zip(self._fds, artifact.files, strict=True):
            os.ftruncate(fd, file.size_bytes)
        if contents is not None:
            for piece in range(artifact.layout.count) if pieces is None else pieces:
                self.put(piece, piece_of(artifact, contents, piece))

    @property
    def have(self) -> Bitmap:
        with self._lock:
            return Bitmap.of_bytes(self._have.size, bytes(self._have))

    def has(self, piece: int) -> bool:
        with self._lock:
            return piece in self._have

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        with self._lock:
            if piece in self._have or piece in self._writing:
                return None
            self._writing.add(piece)
        if expect is None and self.artifact.hashes is not None:
            expect = self.artifact.hashes[piece]
        return _FakeWriter(self, piece, source, expect)

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        if not self.has(piece):
            return None
        span = self.artifact.layout.span(piece)
        return self._fds[span.file], span.offset, span.length

    def digest_of(self, piece: int) -> bytes | None:
        with self._lock:
            return self._digests.get(piece)

    def file_path(self, file: int) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._fds[file]}")

    # What only tests call.

    def put(self, piece: int, data: bytes, *, source: str = "test") -> None:
        """Write and count a piece, whatever its bytes."""
        writer = self.writer(piece, source=source, expect=blake3(data).digest())
        assert writer is not None, piece
        writer.write(memoryview(data))
        writer.finish()

    def flip(self, piece: int) -> None:
        """Change one byte of a piece that is here; nobody is told."""
        span = self.artifact.layout.span(piece)
        fd = self._fds[span.file]
        (byte,) = os.pread(fd, 1, span.offset)
        os.pwrite(fd, bytes([byte ^ 1]), span.offset)

    def lose(self, piece: int) -> None:
        """It is missing again."""
        with self._lock:
            self._have.discard(piece)
            self._digests.pop(piece, None)

    def bytes_of(self, path: str) -> bytes:
        """A file's bytes as they are; absent pieces are zeros."""
        index = next(n for n, file in enumerate(self.artifact.files) if file.path == path)
        return os.pread(self._fds[index], self.artifact.files[index].size_bytes, 0)

    def contents(self) -> Contents:
        """All files."""
        return {file.path: self.bytes_of(file.path) for file in self.artifact.files}

    @property
    def writing(self) -> frozenset[int]:
        """Pieces with a writer that has not ended."""
        with self._lock:
            return frozenset(self._writing)

    def close(self) -> None:
        """Idempotent."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def _write(self, piece: int, at: int, data: memoryview) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        span = self.artifact.layout.span(piece)
        if at + len(data) > span.length:
            raise ValueError(f"beyond the end of piece {piece}")
        os.pwrite(self._fds[span.file], data, span.offset + at)

    def _end(self, piece: int, digest: bytes | None, source: str) -> None:
        with self._lock:
            self._writing.discard(piece)
            if digest is not None:
                self._have.add(piece)
                self._digests[piece] = digest
                self.sources[piece] = source


class _FakeWriter:
    def __init__(self, part: FakePart, piece: int, source: str, expect: bytes | None) -> None:
        self._part, self._piece, self._source, self._expect = part, piece, source, expect
        self._hash = blake3()
        self._at = 0
        self._open = True

    def write(self, data: memoryview) -> None:
        self._part._write(self._piece, self._at, data)
        self._hash.update(data)
        self._at += len(data)

    def finish(self) -> bytes:
        digest: bytes = self._hash.digest()
        length = self._part.artifact.layout.length(self._piece)
        good = self._at == length and (self._expect is None or digest == self._expect)
        self._open = False
        self._part._end(self._piece, digest if good else None, self._source)
        if not good:
            raise BadPiece(self._piece, self._source)
        return digest

    def abort(self) -> None:
        if self._open:
            self._open = False
            self._part._end(self._piece, None, self._source)


class RecordingEvents:
    """`ports.PeerEvents` that keeps what it is told as tuples (name, node id, artifact id, …) and can be awaited."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.hooks: dict[str, Callable[..., None]] = {}  # name → called too, with what the event carries
        self._changed = asyncio.Event()

    def named(self, name: str, node_id: str | None = None) -> list[tuple[Any, ...]]:
        """What came of this kind (from this node), without the name."""
        return [event[1:] for event in self.seen if event[0] == name and node_id in (None, event[1])]

    async def until(self, done: Callable[[RecordingEvents], object], *, timeout_s: float = 30.0) -> None:
        """Wait until `done(self)` is true; TimeoutError with what came."""
        try:
            async with asyncio.timeout(timeout_s):
                while not done(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"after {timeout_s} s there is: {self.seen[-20:]}") from None

    async def until_came(self, count: int, *, timeout_s: float = 30.0) -> None:
        """Wait until so many pieces came."""
        await self.until(lambda events: len(events.named("piece_came")) >= count, timeout_s=timeout_s)

    def _note(self, name: str, *told: Any) -> None:
        self.seen.append((name, *told))
        self._changed.set()
        if hook := self.hooks.get(name):
            hook(*told)

    def peer_up(self, node_id: str, artifact_id: str, have: Bitmap) -> None:
        self._note("peer_up", node_id, artifact_id, have)

    def peer_down(self, node_id: str, artifact_id: str, reason: str) -> None:
        self._note("peer_down", node_id, artifact_id, reason)

    def peer_has(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        self._note("peer_has", node_id, artifact_id, tuple(pieces))

    def lease_told(self, node_id: str, artifact_id: str, lease: Lease, ended: bool) -> None:
        self._note("lease_told", node_id, artifact_id, lease, ended)

    def claims_told(self, node_id: str, artifact_id: str, claims: Sequence[Claim]) -> None:
        self._note("claims_told", node_id, artifact_id, tuple(claims))

    def piece_came(self, node_id: str, artifact_id: str, piece: int, seconds: float) -> None:
        self._note("piece_came", node_id, artifact_id, piece, seconds)

    def piece_bad(self, node_id: str, artifact_id: str, piece: int) -> None:
        self._note("piece_bad", node_id, artifact_id, piece)

    def piece_refused(self, node_id: str, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        self._note("piece_refused", node_id, artifact_id, tuple(pieces), retry_s)

    def disk_failed(self, artifact_id: str, error: Exception) -> None:
        self._note("disk_failed", artifact_id, error)


class FakeNet:
    """Nodes that can reach each other at once. `cut(a, b)` takes two apart, `mend(a, b)` joins them again."""

    def __init__(self) -> None:
        self.nodes: dict[str, FakePeers] = {}
        self._cut: set[frozenset[str]] = set()

    def peers(self, node_id: str, events: PeerEvents) -> FakePeers:
        """The `ports.Peers` of a node."""
        made = self.nodes[node_id] = FakePeers(self, node_id, events)
        return made

    def reaches(self, a: str, b: str) -> bool:
        """Whether there is a way."""
        return a != b and frozenset((a, b)) not in self._cut

    def cut(self, a: str, b: str) -> None:
        """The connection breaks and cannot be made again."""
        for artifact_id in self._common(a, b):
            self.nodes[a]._events.peer_down(b, artifact_id, "cut")
            self.nodes[b]._events.peer_down(a, artifact_id, "cut")
        self._cut.add(frozenset((a, b)))

    def mend(self, a: str, b: str) -> None:
        """They reach each other again."""
        self._cut.discard(frozenset((a, b)))
        for artifact_id in self._common(a, b):
            self._up(self.nodes[a], self.nodes[b], artifact_id)

    def sharers(self, node: FakePeers, artifact_id: str) -> list[FakePeers]:
        """Other nodes in this swarm that `node` reaches."""
        return [x for x in self.nodes.values() if artifact_id in x.parts and self.reaches(node.node_id, x.node_id)]

    def _common(self, a: str, b: str) -> list[str]:
        both = a in self.nodes and b in self.nodes and self.reaches(a, b)
        return [x for x in self.nodes[a].parts if x in self.nodes[b].parts] if both else []

    @staticmethod
    def _up(one: FakePeers, other: FakePeers, artifact_id: str) -> None:
        for me, you in ((one, other), (other, one)):
            claims = tuple(you.claims[artifact_id].values())
            me._events.peer_up(you.node_id, artifact_id, you.parts[artifact_id].have)
            if claims:
                me._events.claims_told(you.node_id, artifact_id, claims)


class FakePeers:
    """`ports.Peers` and what `PeerNet` has besides, without sockets: events come through the loop, one turn later.

    `asked` is what is outstanding; `silent`: requests of us are never answered; `dropped`: node id → reason.
    """

    def __init__(self, net: FakeNet, node_id: str, events: PeerEvents) -> None:
        self.node_id = node_id
        self.parts: dict[str, Part] = {}
        self.claims: dict[str, dict[int, Claim]] = defaultdict(dict)
        self.members: dict[str, tuple[PeerAddress, ...]] = {}
        self.ticket_keys: tuple[bytes, ...] = ()
        self.asked: dict[tuple[str, str, int], bool] = {}
        self.withdrawn: list[tuple[str, str, int]] = []
        self.dropped: dict[str, str] = {}
        self.silent = False
        self.scheduled = True
        self.trusted_network = False
        self.place = Place(node_id)
        self.manifests: dict[str, bytes] = {}
        self._net = net
        self._events = events

    async def start(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", 1)]

    async def close(self) -> None:
        for artifact_id in list(self.parts):
            self.leave(artifact_id)

    def set_ticket_keys(self, keys: Sequence[bytes]) -> None:
        self.ticket_keys = tuple(keys)

    def set_members(self, artifact_id: str, members: Sequence[PeerAddress]) -> None:
        self.members[artifact_id] = tuple(members)

    def set_scheduled(self, scheduled: bool) -> None:
        self.scheduled = scheduled

    def set_trusted_network(self, trusted: bool) -> None:
        self.trusted_network = trusted

    def set_place(self, place: Place) -> None:
        self.place = place

    async def quiet(self, artifact_id: str) -> None:
        """No thread touches anything here."""

    async def fetch_manifest(self, node_id: str, id: str) -> bytes:
        manifest = self._net.nodes[node_id].manifests.get(id) if self._net.reaches(self.node_id, node_id) else None
        if manifest is None:
            raise FalError(Code.NOT_FOUND, f"{node_id} has no manifest {id[:12]}", remedy="Ask another node.")
        return manifest

    def join(self, part: Part) -> None:
        artifact_id = part.artifact.id
        self.parts[artifact_id] = part
        for other in self._net.sharers(self, artifact_id):
            self._soon(self._net._up, self, other, artifact_id)

    def leave(self, artifact_id: str) -> None:
        if self.parts.pop(artifact_id, None) is not None:
            for other in self._net.sharers(self, artifact_id):
                other._soon(other._events.peer_down, self.node_id, artifact_id, "left")

    def ask(self, node_id: str, artifact_id: str, pieces: Sequence[int], *, urgent: bool) -> None:
        for piece in pieces:
            self.asked[node_id, artifact_id, piece] = urgent
            self._soon(self._give, node_id, artifact_id, piece)

    def withdraw(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None:
        for piece in pieces:
            self.withdrawn.append((node_id, artifact_id, piece))
            self.asked.pop((node_id, artifact_id, piece), None)

    def tell_have(self, artifact_id: str, pieces: Sequence[int], claims: Sequence[Claim] = ()) -> None:
        self.claims[artifact_id].update((claim.piece, claim) for claim in claims)
        for other in self._net.sharers(self, artifact_id):
            if claims:
                other._soon(other._events.claims_told, self.node_id, artifact_id, tuple(claims))
            other._soon(other._events.peer_has, self.node_id, artifact_id, tuple(pieces))

    def tell_lease(self, artifact_id: str, lease: Lease, *, ended: bool) -> None:
        for other in self._net.sharers(self, artifact_id):
            other._soon(other._events.lease_told, self.node_id, artifact_id, lease, ended)

    def drop(self, node_id: str, reason: str) -> None:
        self.dropped[node_id] = reason
        self._net.cut(self.node_id, node_id)

    def answer(self, node_id: str, artifact_id: str, piece: int, data: bytes) -> None:
        """A test's word in place of a peer's: these bytes come for a piece that was asked."""
        self._take(node_id, artifact_id, piece, data, None)

    def _give(self, node_id: str, artifact_id: str, piece: int) -> None:
        other = self._net.nodes.get(node_id)
        if (node_id, artifact_id, piece) not in self.asked:
            return
        if other is None or not self._net.reaches(self.node_id, node_id) or other.silent:
            return
        part = other.parts.get(artifact_id)
        place = part.locate(piece) if part is not None else None
        if place is None:
            self.asked.pop((node_id, artifact_id, piece), None)
            self._events.piece_refused(node_id, artifact_id, (piece,), 0.0)
            return
        fd, offset, length = place
        claim = other.claims[artifact_id].get(piece)
        self._take(node_id, artifact_id, piece, os.pread(fd, length, offset), claim.digest if claim else None)

    def _take(self, node_id: str, artifact_id: str, piece: int, data: bytes, expect: bytes | None) -> None:
        self.asked.pop((node_id, artifact_id, piece), None)
        part = self.parts[artifact_id]
        writer = part.writer(piece, source=node_id, expect=None if part.artifact.attested else expect)
        if writer is None:
            self._events.piece_refused(node_id, artifact_id, (piece,), 0.0)
            return
        try:
            writer.write(memoryview(data))
            writer.finish()
        except BadPiece:
            self._events.piece_bad(node_id, artifact_id, piece)
        except FalError as error:
            writer.abort()
            self._events.disk_failed(artifact_id, error)
            self._events.piece_refused(node_id, artifact_id, (piece,), 1.0)
        else:
            self._events.piece_came(node_id, artifact_id, piece, 0.001)

    @staticmethod
    def _soon(call: Callable[..., None], *told: Any) -> None:
        asyncio.get_running_loop().call_soon(call, *told)
