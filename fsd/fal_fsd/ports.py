"""What the parts of fsd ask of each other: disk, peers, mount. Protocols only; each has a fake in the tests.

The node (fal_fsd.node) ties them together on one event loop. Everything that touches bytes runs in threads: a `Part` is
called by the threads of peers, origin reads and the mount at once, so its methods are thread-safe and block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fal_contract.artifact import Artifact
from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Claim, Lease


class BadPiece(Exception):
    """The bytes of a piece are not what they must be. `source` sent them: a node id or "origin"."""

    def __init__(self, piece: int, source: str) -> None:
        super().__init__(f"piece {piece} from {source} has another BLAKE3 digest")
        self.piece = piece
        self.source = source


class PieceWriter(Protocol):
    """One piece on its way in: written and hashed as it comes, counted only by `finish`. Used by one thread."""

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises FalError (disk full …) and ValueError beyond the piece's end."""
        ...

    def finish(self) -> bytes:
        """Check and count; the BLAKE3 digest. Raises BadPiece: nothing counts."""
        ...

    def abort(self) -> None:
        """Give it up; idempotent, and fine after `finish`."""
        ...


class Part(Protocol):
    """An artifact on its way (or finished), on disk. Thread-safe."""

    @property
    def artifact(self) -> Artifact: ...

    @property
    def have(self) -> Bitmap:
        """A copy: pieces that were checked and written. After kill -9 those of the last sync are there again."""
        ...

    def has(self, piece: int) -> bool: ...

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        """Begin to write a piece; None when it is here already or somebody else writes it just now.

        Without `expect` the attested digest counts; where there is none, any content does (it is provisional).
        """
        ...

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        """(file descriptor, offset, length) to read or sendfile it from, or None when it is not here.

        The descriptor stays valid until the part is closed.
        """
        ...

    def digest_of(self, piece: int) -> bytes | None:
        """BLAKE3 of a piece that is here."""
        ...

    def file_path(self, file: int) -> Path:
        """Where the file's bytes are; sparse while it is on its way."""
        ...


class PeerEvents(Protocol):
    """What peers tell the node. Called on the event loop, in order for each peer."""

    def peer_up(self, node_id: str, artifact_id: str, have: Bitmap) -> None: ...

    def peer_down(self, node_id: str, artifact_id: str, reason: str) -> None: ...

    def peer_has(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None: ...

    def lease_told(self, node_id: str, artifact_id: str, lease: Lease, ended: bool) -> None: ...

    def claims_told(self, node_id: str, artifact_id: str, claims: Sequence[Claim]) -> None:
        """Their signatures are good, their signers are nodes of this cluster."""
        ...

    def piece_came(self, node_id: str, artifact_id: str, piece: int, seconds: float) -> None:
        """It was checked and stored. `seconds` since it was asked for."""
        ...

    def piece_bad(self, node_id: str, artifact_id: str, piece: int) -> None:
        """Its bytes were wrong; nothing was stored."""
        ...

    def piece_refused(self, node_id: str, artifact_id: str, pieces: Sequence[int], retry_s: float) -> None:
        """The peer is busy or has it not (retry_s 0)."""
        ...

    def disk_failed(self, artifact_id: str, error: Exception) -> None:
        """A checked piece could not be written."""
        ...


class Peers(Protocol):
    """Connections to other nodes' caches. All methods are called on the event loop and never block."""

    def join(self, part: Part) -> None:
        """Take part in this artifact's swarm: serve its pieces, tell which are here."""
        ...

    def leave(self, artifact_id: str) -> None: ...

    def ask(self, node_id: str, artifact_id: str, pieces: Sequence[int], *, urgent: bool) -> None: ...

    def withdraw(self, node_id: str, artifact_id: str, pieces: Sequence[int]) -> None: ...

    def tell_have(self, artifact_id: str, pieces: Sequence[int], claims: Sequence[Claim] = ()) -> None:
        """To all peers of this swarm; claims go first."""
        ...

    def tell_lease(self, artifact_id: str, lease: Lease, *, ended: bool) -> None: ...

    def drop(self, node_id: str, reason: str) -> None: ...


OnWanted = Callable[[str, Sequence[int], bool], None]  # artifact id, pieces, True: a reader waits; False: not any more


class InFlight(Protocol):
    """The mount of unfinished artifacts: one FUSE connection each."""

    @property
    def available(self) -> str:
        """Empty when it works here, else why not."""
        ...

    async def open(self, part: Part) -> Path:
        """The folder in which the artifact can be read as it arrives. Idempotent."""
        ...

    def arrived(self, artifact_id: str, piece: int) -> None:
        """Reads that wait for it go on. Called on the event loop."""
        ...

    def fail(self, artifact_id: str, reason: str) -> None:
        """All waiting and later reads of absent pieces end with EIO; the reason is logged."""
        ...

    def cancel_reads(self, pids: Sequence[int]) -> int:
        """End the waits of these processes with EINTR; how many there were."""
        ...

    def shows(self, artifact_id: str) -> bool:
        """Whether it is mounted. It may have been aborted since it was opened."""
        ...

    def take_access(self, artifact_id: str) -> list[int]:
        """Pieces that were read since the first mount of it or the last such question, in order of first use."""
        ...

    async def close(self, artifact_id: str) -> None:
        """Take the mount away; files that are open read on what is there. Bounded: a stuck one is aborted."""
        ...
