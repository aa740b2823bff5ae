"""The scheduler as a process: its listeners, its leader, and an orderly end.

Listeners serve whether this process leads or not; a standby answers NOT_LEADER. All gRPC is mutual TLS behind one
guard (roles, revocation, errors). The ports in use are written to `ports.json` as a whole once a first term began or,
on a standby, a few seconds after the start; a port 0 keeps its number over restarts, so that agents find us again.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import SystemRandom
from typing import Any, Final

import grpc.aio
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.identity import write_durably
from fal_contract.ids import node_id, random_suffix
from fal_contract.rpc import SERVER_OPTIONS, add_standard_services, bind, renewing_server_credentials
from fal_contract.rpc_guard import Guard, Refusal
from fal_contract.telemetry import Health, LoopLag, TelemetryServer, get_logger
from fal_contract.v1.agent_pb2_grpc import add_AgentServiceServicer_to_server
from fal_contract.v1.cluster_pb2_grpc import add_ClusterServicer_to_server
from fal_contract.v1.schedulers_pb2_grpc import add_SchedulersServicer_to_server
from fal_contract.v1.serving_pb2_grpc import add_ServingServicer_to_server
from fal_contract.v1.weights_pb2_grpc import add_CacheServiceServicer_to_server
from fal_contract.versions import software
from fal_scheduler.api.roles import ROLES
from fal_scheduler.api.schedulers import SchedulersService
from fal_scheduler.api.service import AgentService, CacheService, ClusterService, ServingService, services
from fal_scheduler.app_metrics import AppMetrics
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.ca import CertificateAuthority, OwnIdentity
from fal_scheduler.core.events import Logged, RedeemToken
from fal_scheduler.directory import Directory
from fal_scheduler.join import JoinRefusal, JoinServer, NodeGrant
from fal_scheduler.leader import Leader
from fal_scheduler.leadership import CurrentLeadership
from fal_scheduler.options import Listen, Options
from fal_scheduler.prediction_metrics import PredictionMetrics
from fal_scheduler.revocations import RevocationIndex
from fal_scheduler.standby_manifests import ManifestMirror
from fal_scheduler.store.interface import Member, Store

STANDBY_AFTER_S: Final = 5.0
STOP_GRACE_S: Final = 2.0
SAMPLE_INTERVAL_S: Final = 2.0
REFUSAL_QUIET_S: Final = 60.0  # one event for the same refusal in this time
REFUSALS_KEPT_MAX: Final = 1024
_ANYWHERE: Final = frozenset({"", "0.0.0.0", "::"})  # binds to every address, names none
_log = get_logger("scheduler")


class EngineJoiner:
    """Redeems join tokens through the engine of the term."""

    def __init__(self, current: CurrentLeadership) -> None:
        self._current = current
        self._rng = SystemRandom()

    async def redeem(self, token_id: str, secret: str, node_name: str, now_s: float) -> NodeGrant:
        """Durable when it returns. Raises UNAUTHENTICATED, NOT_LEADER, a store error."""
        engine = self._current.get().engine
        reply = await engine.submit(RedeemToken(token_id, secret, node_id(self._rng), node_name))
        return NodeGrant(reply.subject, engine.view.nodes[reply.subject].pool)


class Statistics(Collector):
    """Gauges from a snapshot that the loop takes; a scrape, on its thread, never touches live state."""

    def __init__(self) -> None:
        self._snapshot: Mapping[str, float] = {}

    def sample(self, values: Mapping[str, float]) -> None:
        """Keep a snapshot."""
        self._snapshot = dict(values)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge a value."""
        for name, value in sorted(self._snapshot.items()):
            yield GaugeMetricFamily(f"fal_scheduler_{name}", f"{name.replace('_', ' ')} of the scheduler", value=value)


class Scheduler:
    """`async with` starts and stops it; `wait` returns when it can go on no longer."""

    def __init__(self, options: Options, store: Store, ca: CertificateAuthority, clock: Clock) -> None:
        self._options = options
        self._store = store
        self._clock = clock
        self._current = CurrentLeadership()
        self._refusals: dict[tuple[str, str], float] = {}
        revocations = RevocationIndex()
        hosts = [*dict.fromkeys([*options.hosts, "localhost", "127.0.0.1", socket.gethostname()])]
        self._identity = OwnIdentity(ca, name="scheduler", hosts=hosts, clock=clock)
        self._guard = Guard(
            cluster_id=ca.cluster_id,
            roles=ROLES,
            clock=clock,
            is_revoked=revocations.is_revoked,
            on_refused=self._call_refused,
        )
        self._cluster_id = ca.cluster_id
        self._holder = f"{socket.gethostname()}-{random_suffix(SystemRandom())}"
        self._started_at_s = clock.wall_s()
        self._directory = Directory(store, self._current, clock, self._member)
        self._mirror = ManifestMirror(
            ManifestBlobs(options.data_dir / "blobs", ca.public_key),
            self._current,
            leader=lambda: self._directory.leader_addresses,
            identity=self._identity.current,
        )
        self._directory.manifests = self._mirror.state
        self._leader = Leader(
            store=store,
            ca=ca,
            clock=clock,
            data_dir=options.data_dir,
            model_roots=tuple(options.model_roots),
            credentials_file=options.credentials_file,
            holder=self._holder,
            current=self._current,
            revocations=revocations,
            cut_revoked=self._guard.cut_revoked,
        )
        self._join = JoinServer(
            ca=ca,
            identity=self._identity.current,
            joiner=EngineJoiner(self._current),
            clock=clock,
            on_refused=self._join_refused,
        )
        registry = CollectorRegistry()
        self._statistics = Statistics()
        registry.register(self._statistics)
        self._apps = AppMetrics()
        registry.register(self._apps)
        self._predictions = PredictionMetrics(registry)
        self._lag = LoopLag(registry)
        self._telemetry = TelemetryServer(registry, self._health)
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.ports: dict[str, int] = {}

    # --- life -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Scheduler:
        try:
            await self._store.open()
            await self._listen()
            self._tasks = [
                asyncio.create_task(self._leader.run(), name="leader"),
                asyncio.create_task(self._directory.run(), name="directory"),
                asyncio.create_task(self._mirror.run(), name="manifest-mirror"),
                asyncio.create_task(self._guard.run(), name="revocation-sweep"),
                asyncio.create_task(self._lag.run(), name="loop-lag"),
                asyncio.create_task(self._sample(), name="statistics"),
            ]
            await asyncio.wait(
                [self._tasks[0], began := asyncio.create_task(self._began())],
                timeout=STANDBY_AFTER_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            began.cancel()
            if self._tasks[0].done():
                self._tasks[0].result()
            self._write_ports()
        except BaseException:
            await self._close()
            raise
        _log.info("listens", role="leader" if self._current.leads else "standby", **self.ports)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def wait(self) -> None:
        """Until a task fails; raises what failed. Cancel it to stop."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _began(self) -> None:
        """Leading, or standing by while another leads."""
        while not self._leader.began.is_set():
            await self._directory.found.wait()
            if self._directory.leader_addresses:
                return
            await self._leader.began.wait()

    async def _listen(self) -> None:
        kept = _kept_ports(self._options.data_dir)
        self._server = await self._grpc_server()
        self.ports["rpc"] = self._bind_rpc(self._server, kept.get("rpc", 0))
        await self._server.start()
        self.ports["join"] = await self._bind_http("join", self._options.join, kept)
        self.ports["metrics"] = await self._bind_http("metrics", self._options.metrics, kept)

    def _member(self) -> Member:
        """What the other schedulers, and through them everybody, hear of this one."""
        hosts = self._options.hosts or [self._options.rpc.host]
        if self._options.advertise:
            addresses = tuple(self._options.advertise)
        else:
            own = [host for host in hosts if host not in _ANYWHERE] or [socket.gethostname()]
            addresses = tuple(
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                for port in [self.ports.get("rpc", 0)]
                for host in own
            )
        return Member(self._holder, addresses, self._started_at_s, software())

    async def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._guard], options=SERVER_OPTIONS)
        add_ClusterServicer_to_server(ClusterService(self._current), server)
        add_AgentServiceServicer_to_server(AgentService(self._current), server)
        add_ServingServicer_to_server(ServingService(self._current), server)
        add_CacheServiceServicer_to_server(CacheService(self._current), server)
        schedulers = SchedulersService(self._current, self._directory, self._cluster_id)
        add_SchedulersServicer_to_server(schedulers, server)
        await add_standard_services(server, [service.full_name for service in services()])
        return server

    def _bind_rpc(self, server: grpc.aio.Server, kept: int) -> int:
        listen = self._options.rpc
        credentials = renewing_server_credentials(self._identity.current)
        if listen.port == 0 and kept:
            try:
                return bind(server, f"{listen.host}:{kept}", credentials)
            except FalError:
                _log.warning("port_taken", listener="rpc", port=kept, remedy="Another one is chosen; restart agents.")
        return bind(server, f"{listen.host}:{listen.port}", credentials)

    async def _bind_http(self, name: str, listen: Listen, kept: Mapping[str, int]) -> int:
        start: Any = self._join.start if name == "join" else self._telemetry.start
        port = kept.get(name, 0)
        if listen.port == 0 and port:
            try:
                return int(await start(listen.host, port))
            except FalError:
                _log.warning("port_taken", listener=name, port=port, remedy="Another one is chosen.")
        return int(await start(listen.host, listen.port))

    def _write_ports(self) -> None:
        content = json.dumps({**self.ports, "pid": os.getpid()}).encode() + b"\n"
        write_durably(self._options.data_dir / "ports.json", content, mode=0o644)

    async def _close(self) -> None:
        """Streams end with NOT_LEADER, so that agents and gateways turn to another scheduler at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self._join.close()
        await self._telemetry.close()
        await self._store.close()

    # --- what operators see -------------------------------------------------------------------------------------------

    def _health(self) -> Health:
        return Health(True, {"role": "leader" if self._current.leads else "standby", "store": self._store.name})

    async def _sample(self) -> None:
        while True:
            calls = {f"rpc_{name}": float(value) for name, value in self._guard.statistics().items()}
            view = self._current.get().view if self._current.leads else None
            predicted = self._predictions.sample(view)
            self._apps.sample(view, self._clock.monotonic_s())
            self._statistics.sample({**self._leader.statistics(), **calls, **predicted})
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def _call_refused(self, refusal: Refusal) -> None:
        self._note_refusal("CALL_REFUSED", refusal.peer, f"{refusal.method}: {refusal.message}")

    def _join_refused(self, refusal: JoinRefusal) -> None:
        subject = refusal.token_id or refusal.address
        message = f"{refusal.node_name or 'a machine'} at {refusal.address}: {refusal.message}"
        self._note_refusal("TOKEN_REFUSED", subject, message)

    def _note_refusal(self, kind: str, subject: str, message: str) -> None:
        """One event a minute for each kind and subject, so that nobody can flood the log."""
        now_s = self._clock.monotonic_s()
        last_s = self._refusals.pop((kind, subject), float("-inf"))
        quiet = now_s - last_s < REFUSAL_QUIET_S
        self._refusals[kind, subject] = last_s if quiet else now_s
        if len(self._refusals) > REFUSALS_KEPT_MAX:
            del self._refusals[next(iter(self._refusals))]
        if not quiet and self._current.leads:
            self._current.get().feed.note(Logged(kind, subject, message, self._clock.wall_s()))


def _kept_ports(data_dir: Path) -> dict[str, int]:
    """Ports of the last run. ports.json itself goes away until this run has its own."""
    now, last = data_dir / "ports.json", data_dir / "ports.last.json"
    try:
        if now.exists():
            now.replace(last)
        ports = json.loads(last.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FalError(
            Code.CORRUPT, f"{last} cannot be read: {error}", remedy="Remove it; it holds ports only."
        ) from None
    return {name: int(port) for name, port in ports.items() if name in ("rpc", "join", "metrics")}


__all__ = ["Scheduler"]
