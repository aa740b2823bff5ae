"""Puts a weight cache together from its options and takes it apart again: disk, peers, mount, origins, link, metrics.

Order of start: disk, mounts of the process before (readers wait for them), peers, what goes on by itself, the
scheduler's stream. `Cache.close` goes the other way. Used by fal_fsd.main, and by tests with parts of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

from fal_contract.artifact import to_manifest
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, write_durably
from fal_contract.own_addresses import address_towards, parse_address
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2, weights_pb2
from fal_fsd.alone import NoMount, NoPeers
from fal_fsd.core.rates import BandwidthLimits
from fal_fsd.disk.memory import MemoryTier
from fal_fsd.disk.part import DiskPart
from fal_fsd.disk.store import DiskStore
from fal_fsd.lanes import Lanes
from fal_fsd.link import Link
from fal_fsd.mount import InFlightMounts
from fal_fsd.news import News
from fal_fsd.node import CacheNode
from fal_fsd.options import FsdOptions
from fal_fsd.origins import CredentialsFile, Origins
from fal_fsd.peers.net import PeerNet
from fal_fsd.peers.pacer import Pacer
from fal_fsd.surroundings import IdentityFile, Surroundings
from fal_fsd.tools import Tools
from fal_fsd.transfers import Transfers

TEND_S: Final = 5.0
_IDENTITY_LOOK_S: Final = 10.0
_log = get_logger("fsd.assembly")


class Cache:
    """One weight cache. Call `start`, use `node`, call `close`. `rng`: jitter of reconnects."""

    def __init__(self, options: FsdOptions, *, clock: Clock, rng: Random) -> None:
        self.options = options
        self._clock = clock
        self._rng = rng
        self._tasks: list[asyncio.Task[None]] = []
        self.link: Link | None = None
        self.net: PeerNet | None = None
        self.mounts: InFlightMounts | None = None
        self.bulk_port = 0

    async def start(self) -> None:
        """Everything up. Raises FalError and OSError (the state folder)."""
        options, loop = self.options, asyncio.get_running_loop()
        self.identity = IdentityFile(options.identity)
        credentials = await asyncio.to_thread(CredentialsFile, options.credentials_file, os.environ)
        self.origins = Origins(credentials, Pacer(self._limits(), self._clock))
        self.store = await asyncio.to_thread(
            lambda: DiskStore(
                options.state_dir,
                bytes_max=options.disk_bytes_max or None,
                clock=self._clock,
                on_lost=lambda id_, pieces: _on_loop(loop, lambda: self.node.lost(id_, list(pieces))),
                on_gone=lambda ids: _on_loop(loop, lambda: self.node.gone(list(ids))),
            )
        )
        self.news = News(self._clock, configured=bool(options.schedulers))
        memory = MemoryTier(options.memory_bytes_max, clock=self._clock)
        self.around = Surroundings(options.state_dir, self.identity, memory)
        self.transfers = Transfers(self.store, on_ready=lambda transfer: self.node.ready(transfer))
        self.node = CacheNode(self.store, self.news, self.transfers, self.around)
        await self._start_mounts()
        await self._start_peers()
        self._bind()
        await self._sort_old_mounts()
        await self.node.start()
        self._spawn(self.node.tend(TEND_S), "tend")
        if options.identity is not None:
            self._spawn(self._watch_identity(), "identity")
        self._start_link()

    async def close(self) -> None:
        """End in order; what is durable is taken up by the next process, mounts wait for it."""
        self.around.stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.node.close()
        if self.net is not None:
            await self.net.close()
        if self.mounts is not None:
            await self.mounts.stop(keep=True)
        await asyncio.to_thread(self.around.memory.close)
        await asyncio.to_thread(self.store.close)

    # ---- parts

    async def _start_mounts(self) -> None:
        """First of all: readers of the process before wait. They are served from parts that are opened here."""
        options = self.options
        self._taken_over: list[str] = []
        if options.mount == "off":
            self.around.mount = NoMount("mounts are switched off (option mount)")
            return
        folder = options.mount_dir or options.state_dir / "mounts"
        parts = await asyncio.to_thread(self._open_parts)
        self.mounts = InFlightMounts(
            folder,
            on_wanted=lambda id_, pieces, waits: self.transfers.wanted(id_, pieces, waits),
            read_timeout_s=options.read_timeout_s,
            clock=self._clock,
        )
        self._taken_over = await self.mounts.start(parts.get)
        self.around.mount = mounts = self.mounts
        self.around.capabilities = lambda: dict(mounts.modes)

    def _open_parts(self) -> dict[str, DiskPart]:
        """Everything that is on its way or may still be read through an old mount. Blocks."""
        parts: dict[str, DiskPart] = {}
        for record in self.store.artifacts():
            artifact = self.store.artifact(record.id)
            if artifact is not None and not record.revoked and (record.ready or record.pinned_by):
                with contextlib.suppress(FalError, OSError):
                    parts[record.id] = self.store.open_part(artifact, model="")
        return parts

    async def _sort_old_mounts(self) -> None:
        """Of the process before: those of what is finished meanwhile go; the others wait for their transfers."""
        for artifact_id in self._taken_over:
            part = self.store.part(artifact_id)
            if self.mounts is not None and (part is None or part.finished):
                await self.mounts.close(artifact_id)
            else:
                self.transfers.taken_over.add(artifact_id)

    async def _start_peers(self) -> None:
        identity, options = self.identity.current, self.options
        if identity is None:
            self.around.peers = NoPeers()
            return
        port = options.bulk_port or _last_port(options.state_dir)
        net = self._peer_net(identity, port)
        try:
            listening = await net.start()
        except FalError:
            if options.bulk_port or not port:
                raise
            await net.close()
            net = self._peer_net(identity, 0)  # somebody else took it while we were away
            listening = await net.start()
        self.net = net
        self.bulk_port = listening[0].port
        await asyncio.to_thread(_keep_port, options.state_dir, self.bulk_port)
        self.around.peers = self.net
        self.around.endpoints = self._endpoints
        self.around.unreachable = lambda: net.status().unreachable
        self.around.connected = lambda: (line.node_id for line in net.status().peers)
        self.around.peers_up = lambda: len(net.status().peers)
        self.around.link_rates = lambda: (
            [
                weights_pb2.LinkRate(
                    source=f"peer:{line.node_id}", rate_bytes_s=int(line.rate_bytes_s), bytes=line.bytes_received
                )
                for line in net.status().peers
                if line.bytes_received
            ]
            + [
                weights_pb2.LinkRate(source=source, rate_bytes_s=rate)
                for source, rate in self.transfers.totals.origin_rates().items()
            ]
        )

    def _peer_net(self, identity: Identity, port: int) -> PeerNet:
        options = self.options
        return PeerNet(
            node_id=identity.peer.name,
            events=self.transfers,
            identity=self._must_identity,
            clock=self._clock,
            rng=self._rng,
            limits=self._limits(),
            listen=(options.bulk_host, port),
            tls=options.tls,
            place=self.around.place,
            manifest_source=self._manifest,
        )  # fmt: skip

    def _limits(self) -> BandwidthLimits:
        told = self.options
        return BandwidthLimits(
            told.node_bytes_s, told.pool_bytes_s, told.region_bytes_s, told.cross_region_bytes_s, told.origin_bytes_s
        )

    def _manifest(self, id_: str) -> bytes | None:
        """For peers, in a thread: what the CA signed."""
        artifact = self.store.artifact(id_)
        return to_manifest(artifact).SerializeToString() if artifact is not None and artifact.signature else None

    def _bind(self) -> None:
        around = self.around
        claims = self.options.state_dir / "claims"
        claims.mkdir(exist_ok=True, mode=0o755)
        self.transfers.bind(
            Tools(
                place=lambda: around.place,
                clock=self._clock,
                store=self.store,
                peers=around.peers,
                mount=around.mount,
                open_origin=self.origins.open,
                signer=lambda: self.identity.signer,
                lanes=Lanes(),
                news=self.news,
                claims_folder=claims,
            )
        )

    def _start_link(self) -> None:
        if not self.options.schedulers:
            return
        self.link = Link(self.options.schedulers, self._must_identity, self.node, clock=self._clock, rng=self._rng)
        self.around.manifest = self.link.manifest
        self._spawn(self.link.run(), "link")

    def _must_identity(self) -> Identity:
        self.identity.look()
        if self.identity.current is None:
            raise FalError(Code.NOT_FOUND, "this node has no identity yet", remedy="Its agent joins first.")
        return self.identity.current

    async def _watch_identity(self) -> None:
        while True:
            await asyncio.sleep(_IDENTITY_LOOK_S)
            self.identity.look()

    def _endpoints(self) -> Sequence[agent_pb2.Endpoint]:
        given = [parse_address(text) for text in self.options.addresses]
        if not given:
            given = [("default", address_towards(self.options.schedulers), 0)]
        return [agent_pb2.Endpoint(network=n, host=host, port=own or self.bulk_port) for n, host, own in given]

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
        loop.call_soon_threadsafe(call)


def _last_port(state_dir: Path) -> int:
    try:
        return int((state_dir / "bulk_port").read_text())
    except (OSError, ValueError):
        return 0


def _keep_port(state_dir: Path, port: int) -> None:
    if _last_port(state_dir) != port:
        write_durably(state_dir / "bulk_port", str(port).encode())


__all__ = ["TEND_S", "Cache"]
