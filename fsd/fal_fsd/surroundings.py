"""Where a node is and who it is: identity, place, peers, mount, tiers; and what of it the scheduler and agent see.

Invariants: the identity file is the agent's, which renews it: it is read again when it changes; the last place that the
scheduler told survives a restart, so that a swarm begins with it. Used by fal_fsd.node.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, write_durably
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2, fsd_pb2, state_pb2, weights_pb2
from fal_fsd.attest import Signer, ca_key_of
from fal_fsd.core.messages import Place
from fal_fsd.disk.memory import MemoryTier
from fal_fsd.peers.address import PeerAddress
from fal_fsd.ports import InFlight, Peers

_ALONE: Final = "alone"
_log = get_logger("fsd.surroundings")


class PeerSide(Peers, Protocol):
    """What peers.net.PeerNet offers besides ports.Peers."""

    def set_ticket_keys(self, keys: Sequence[bytes]) -> None: ...

    def set_members(self, artifact_id: str, members: Sequence[PeerAddress]) -> None: ...

    def set_scheduled(self, scheduled: bool) -> None: ...

    def set_trusted_network(self, trusted: bool) -> None: ...

    def set_place(self, place: Place) -> None: ...

    async def quiet(self, artifact_id: str) -> None: ...

    async def fetch_manifest(self, node_id: str, id: str) -> bytes: ...


class IdentityFile:
    """The node's certificate and key, read again when the file changes. `file` None: this node has none."""

    def __init__(self, file: Path | None, on_change: Callable[[Identity], None] = lambda identity: None) -> None:
        self._file = file
        self._stamp: tuple[int, int] = (0, 0)
        self._identity: Identity | None = None
        self._signer: Signer | None = None
        self.on_change = on_change
        self.look()

    def look(self) -> None:
        """Load it if it is another than last time; a torn or missing one leaves the last good one in use."""
        if self._file is None:
            return
        try:
            info = self._file.stat()
            stamp = (info.st_mtime_ns, info.st_ino)
            if stamp == self._stamp:
                return
            identity = Identity.load(self._file)
            self._signer, self._stamp = Signer(identity), stamp
            before, self._identity = self._identity, identity
        except (OSError, FalError) as exc:
            _log.warning("identity_not_read", error=str(exc))
            return
        if before is not None:
            self.on_change(identity)

    @property
    def current(self) -> Identity | None:
        return self._identity

    @property
    def signer(self) -> Signer | None:
        return self._signer


class Surroundings:
    """See the module's docstring. `peers`, `mount`, `fetch`, `lock` … are set by fal_fsd.build once they exist."""

    def __init__(self, state_dir: Path, identity: IdentityFile, memory: MemoryTier) -> None:
        self._place_file = state_dir / "place.json"
        self.identity = identity
        self.boot_id = _boot_id()
        self.cache_id = str(uuid.uuid4())
        self.node_id = identity.current.peer.name if identity.current is not None else _ALONE
        self.place = self._load_place()
        self.stop = threading.Event()  # of long reads of the disk
        self.peers: PeerSide
        self.mount: InFlight
        self.capabilities: Callable[[], dict[str, str]] = dict
        self.endpoints: Callable[[], Sequence[agent_pb2.Endpoint]] = tuple
        self.unreachable: Callable[[], Iterable[str]] = tuple
        self.connected: Callable[[], Iterable[str]] = tuple
        self.link_rates: Callable[[], Iterable[weights_pb2.LinkRate]] = tuple
        self.peers_up: Callable[[], int] = lambda: 0
        self.manifest: Callable[[str], Awaitable[state_pb2.ModelManifest]] = _no_scheduler
        self.memory = memory

    # ---- identity

    def ca_key(self) -> ec.EllipticCurvePublicKey | None:
        """The key that signs manifests; None without an identity."""
        return ca_key_of(self.identity.current)

    # ---- the scheduler's word

    def welcome(self, message: weights_pb2.CacheWelcome) -> None:
        """Keys of tickets, and where this node is."""
        self.peers.set_ticket_keys(list(message.ticket_keys))
        self.peers.set_scheduled(True)
        self.peers.set_trusted_network(message.trusted_network)
        place = Place(self.node_id, message.pool, message.region, message.zone)
        if place != self.place:
            self.place = place
            self.peers.set_place(place)
            with contextlib.suppress(OSError):
                write_durably(self._place_file, json.dumps(asdict(place)).encode())

    # ---- views

    def status(self, *, disk_bytes_max: int, disk_bytes_used: int, scheduler: bool) -> fsd_pb2.CacheStatus:
        return fsd_pb2.CacheStatus(
            node_id=self.node_id if self.node_id != _ALONE else "",
            capabilities=self.capabilities(),
            disk_bytes_max=disk_bytes_max,
            disk_bytes_used=disk_bytes_used,
            memory_bytes_max=self.memory.bytes_max,
            memory_bytes_used=self.memory.bytes_locked,
            peers=self.peers_up(),
            scheduler=scheduler,
        )

    def _load_place(self) -> Place:
        try:
            known = Place(**json.loads(self._place_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return Place(self.node_id)
        return known if known.node_id == self.node_id else Place(self.node_id)


async def _no_scheduler(id_: str) -> state_pb2.ModelManifest:
    raise FalError(Code.UNAVAILABLE, "no scheduler is set", remedy="Send the manifest along, or name a scheduler.")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.uuid4())  # no Linux: every start of fsd is a boot


__all__ = ["IdentityFile", "PeerSide", "Surroundings"]
