"""The agent put together: ports, node, session and the tasks beside them. The only module that knows all parts.

Invariant: its end stops no container, no proxy and no fsd. Called by fal_agent.main.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from fal_agent import packing
from fal_agent.cache_daemon import command
from fal_agent.gpu_care import GpuCare
from fal_agent.gpu_file import FILE as GPU_FILE
from fal_agent.gpu_file import GpuFile
from fal_agent.inventory.cdi import GpuNames
from fal_agent.inventory.machine import InventoryMachine, open_inventory
from fal_agent.inventory.model import Devices
from fal_agent.join import Renewer, join
from fal_agent.journal import FileJournal
from fal_agent.layout import Layout
from fal_agent.link import GrpcDialer
from fal_agent.node import Facts, Node
from fal_agent.notices import Notices
from fal_agent.options import AgentOptions
from fal_agent.probe import UnixProber
from fal_agent.proxy_link import ProxyLink, proxy_answers
from fal_agent.reboot import FEATURE as REBOOT_FEATURE
from fal_agent.reboot import Rebooter, check_command
from fal_agent.session import Session
from fal_agent.spares import Spares
from fal_agent.supervise import START_TIMEOUT_S, Daemon
from fal_agent.tools import Tools
from fal_contract.artifact import key_of_pem
from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.own_addresses import address_towards, parse_address
from fal_contract.telemetry import Health, LoopLag, TelemetryServer, get_logger
from fal_contract.v1 import agent_pb2
from fal_contract.versions import software
from fal_fsd.client import CacheClient
from fal_runtime.driver import Capabilities, Driver
from fal_runtime.host_image import worker_command

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fal_agent.proxy.messages import ProxyStats

_LOOK_S: Final = 5.0
PROXY_CGROUP: Final = "/falctl-proxy"
FSD_CGROUP: Final = "/falctl-fsd"
_log = get_logger("fal.agent")


class Agent:
    """One agent process. `run` returns after `stop`; make it after the state directory is locked."""

    def __init__(self, options: AgentOptions, layout: Layout) -> None:
        self._options = options
        self._layout = layout
        self._clock: Clock = SystemClock()
        self._rng = Random(os.urandom(16))
        self._stop = asyncio.Event()
        self._connected = False

    def stop(self) -> None:
        """End in order; containers go on."""
        self._stop.set()

    async def run(self) -> None:
        """Start everything, then wait for `stop`. Raises FalError when it cannot start."""
        self._events: list[tuple[str, str, str]] = []
        journal = FileJournal(self._layout.journal, on_event=lambda *event: self._events.append(event))
        driver, capabilities = await self._layout.open_driver(
            self._options.driver, cdi_dirs=self._options.cdi_folders(), egress=self._options.egress()
        )
        self._identity = await self._load_or_join()
        devices = open_inventory(
            sim_gpus=self._options.sim_gpus, node_name=self._options.node_name, state_dir=self._layout.state_dir
        )
        machine = InventoryMachine(
            devices, names=GpuNames(self._layout.cdi, self._options.cdi_folders()) if driver.isolates else None
        )
        self._care = self._gpu_care(machine, devices, driver)
        fsd_socket = self._options.fsd_socket or self._layout.fsd_socket
        cache = CacheClient(fsd_socket)
        fsd = self._fsd_daemon(fsd_socket, cache)
        from fal_agent.proxy_metrics import ProxyMetrics

        self._proxy_metrics = ProxyMetrics()
        self._proxy = self._proxy_link()
        self._reboot = Rebooter(check_command(self._options.reboot_command))
        tools = Tools(
            driver=driver, cache=cache, proxy=self._proxy, prober=UnixProber(), machine=self._care,
            places=self._layout.places(isolates=driver.isolates), clock=self._clock, rng=self._rng,
            on_event=_log_event, save=_no_save, ca_key=lambda: key_of_pem(self._identity.ca_pem),
            secrets=GrpcDialer(self._options.schedulers, lambda: self._identity, self._clock).secrets,
            packer=self._packer(driver), on_created=lambda spec: self._spares.used(spec),
            gpu_order=self._care.order, reboot=self._reboot,
        )  # fmt: skip
        self._node = Node(self._facts(driver, capabilities), tools, journal)
        self._spares = Spares(
            driver, self._clock, prepared=self._options.prepared_containers, warm=self._options.warm(),
            in_setup=self._node.in_setup,
        )  # fmt: skip
        for event in self._events:
            self._node.event(*event)
        try:
            async with asyncio.TaskGroup() as group:
                await self._serve(group, fsd, machine)
        finally:
            await self._reboot.close()
            await self._node.close()
            await cache.close()
            await self._care.close()
            await machine.close()
            journal.close()

    async def _serve(self, group: asyncio.TaskGroup, fsd: Daemon, machine: InventoryMachine) -> None:
        registry, lag = _metrics()
        registry.register(self._proxy_metrics)
        telemetry = TelemetryServer(registry, self._health)
        port = await telemetry.start(self._options.metrics_host, self._options.metrics_port)
        self._care.start(self._node.tasks)
        await self._node.start()
        jobs = [
            group.create_task(self._proxy.run(), name="proxy"),
            group.create_task(self._watch_fsd(fsd), name="fsd"),
            group.create_task(self._look(), name="inventory"),
            group.create_task(lag.run(), name="lag"),
            group.create_task(self._spares.run(), name="spares"),
            group.create_task(self._notices().run(self._node.announce), name="notices"),
        ]
        waiting = asyncio.create_task(self._stop.wait())
        connected = asyncio.create_task(self._proxy.connected.wait())
        await asyncio.wait({waiting, connected}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        self._node.endpoints = self._endpoints()
        dialer = GrpcDialer(self._options.schedulers, lambda: self._identity, self._clock)
        renewer = Renewer(
            file=self._layout.identity, identity=self._identity, renew=dialer.renew, on_renewed=self._renewed,
            clock=self._clock, rng=self._rng,
        )  # fmt: skip
        session = Session(self._node, dialer, self._rng, on_state=self._session_state)
        jobs += [
            group.create_task(session.run(), name="session"),
            group.create_task(renewer.run(), name="renewal"),
            group.create_task(self._follow_proxy(session), name="endpoints"),
        ]
        _log.info("running", node=self._identity.peer.name, metrics_port=port, driver=self._layout.driver.read_text())
        await waiting
        for job in (*jobs, connected):
            job.cancel()
        await telemetry.close()

    # ---- parts

    async def _load_or_join(self) -> Identity:
        if self._layout.identity.exists():
            return Identity.load(self._layout.identity)
        options = self._options
        token = options.join_token or (_read_token(options.join_token_file) if options.join_token_file else "")
        if not token or not options.join_url:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"this node has no identity in {self._layout.identity} and nothing to join with",
                remedy="Give --join-url and --join-token-file (falctl node token create makes a token).",
            )
        joined = await join(options.join_url, token, node_name=options.node_name, boot_id=_boot_id(), clock=self._clock)
        joined.identity.save(self._layout.identity)
        _log.info("joined", node=joined.node_id, pool=joined.pool, cluster=joined.cluster_id)
        return joined.identity

    def _gpu_care(self, machine: InventoryMachine, devices: Devices, driver: Driver) -> GpuCare:
        file = GpuFile(self._layout.state_dir / GPU_FILE, boot_id=_boot_id(), on_event=self._tell_event)
        return GpuCare(
            machine, devices, clock=self._clock, on_event=self._tell_event, file=file, driver=driver,
            may_reset=self._options.gpu_reset,
        )  # fmt: skip

    def _notices(self) -> Notices:
        options = self._options
        return Notices(options.notices, clock=self._clock, on_event=self._tell_event, subject=options.node_name)

    def _tell_event(self, kind: str, subject: str, message: str) -> None:
        _log_event(kind, subject, message)
        self._node.event(kind, subject, message)

    def _packer(self, driver: Driver) -> packing.Packer:
        options, python = self._options, worker_command(isolates=driver.isolates).argv
        proxies = packing.proxies_of(os.environ)
        return packing.Packer(python, options.registry_auth_file, options.registry_ca_file, proxies)

    def _facts(self, driver: Driver, found: Capabilities) -> Facts:
        lacks = packing.missing(found, host_network=self._options.allow_host_network)
        features = found.features if lacks else (*found.features, packing.FEATURE)
        if self._options.reboot_command:
            features = (*features, REBOOT_FEATURE)
        capabilities = agent_pb2.Capabilities(
            driver=driver.name,
            isolates=driver.isolates,
            runtime=found.runtime,
            user_namespaces=found.user_namespaces and found.idmapped_mounts,
            cgroup=found.cgroup,
            details={
                **found.details,
                "seccomp": str(found.seccomp).lower(),
                "nosymfollow": str(found.nosymfollow).lower(),
                "pack": lacks or "works",
            },
            features=features,
        )
        # What admission may accept. The process driver keeps nothing apart: every container has the node's network.
        egress = {"egress"} if not driver.isolates or "egress" in found.features else set()
        host = {"host"} if self._options.allow_host_network else set()
        networks = frozenset({"none"} | egress | host)
        return Facts(self._identity.peer.name, _boot_id(), str(uuid.uuid4()), capabilities, networks, software())

    def _fsd_daemon(self, socket_path: Path, cache: CacheClient) -> Daemon:
        argv = command(self._options, self._layout, socket_path)
        return Daemon("fal-fsd", argv, cache.answers, self._layout.log("fal-fsd"), FSD_CGROUP, socket_path)

    def _proxy_link(self) -> ProxyLink:
        control = self._layout.proxy_control
        argv = _python(
            "fal_agent.proxy.main", "run", "--state-dir", control.parent, "--control", control,
            "--host", self._options.proxy_host, "--port", self._options.proxy_port, "--identity", self._layout.identity,
        )  # fmt: skip
        daemon = Daemon("fal-proxy", argv, lambda: proxy_answers(control), self._layout.log("fal-proxy"), PROXY_CGROUP)
        from fal_agent.proxy.server import software_version

        return ProxyLink(
            control, daemon, software=software_version(), rng=self._rng, entries=lambda: self._node.entries(),
            kept=lambda: self._node.kept(),
            on_stats=self._proxy_told, on_trouble=self._trouble("PROXY_DOWN", "fal-proxy"),
        )  # fmt: skip

    def _proxy_told(self, stats: ProxyStats) -> None:
        self._proxy_metrics.see(stats)
        self._node.count(stats)

    async def _watch_fsd(self, fsd: Daemon) -> None:
        trouble = self._trouble("FSD_DOWN", "fal-fsd")
        try:
            await fsd.ensure()
        except FalError as exc:
            trouble(exc)
        await fsd.watch(self._rng, on_trouble=trouble)

    async def _follow_proxy(self, session: Session) -> None:
        """A proxy that came late, or on another port: only Hello carries endpoints, so the session starts over."""
        while True:
            await self._proxy.connected.wait()
            if (endpoints := self._endpoints()) != self._node.endpoints:
                self._node.endpoints = endpoints
                session.start_over()
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._care.changed.wait()
            self._care.changed.clear()
            try:
                await self._node.look()
            except FalError as exc:
                self._node.event("INVENTORY_FAILED", self._options.node_name, str(exc))

    def _endpoints(self) -> tuple[agent_pb2.Endpoint, ...]:
        info = self._proxy.info
        port = info.listen[0][1] if info and info.listen else 0
        if not port:
            return ()  # no proxy: nothing to be reached
        given = [parse_address(text) for text in self._options.addresses]
        if not given:
            given = [("default", address_towards(self._options.schedulers), 0)]
        return tuple(agent_pb2.Endpoint(network=n, host=host, port=own or port) for n, host, own in given)

    # ---- what happens

    def _trouble(self, kind: str, subject: str) -> Callable[[FalError], None]:
        def tell(exc: FalError) -> None:
            _log.warning(kind.lower(), message=str(exc))
            self._node.event(kind, subject, str(exc))

        return tell

    def _session_state(self, state: str, why: FalError | None) -> None:
        self._connected = state == "connected"
        if why is None:
            _log.info("connected")
        elif why.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED):
            _log.error("refused_by_scheduler", message=str(why), note="containers go on; it is tried slowly")
        else:
            _log.warning("disconnected", code=str(why.code), message=str(why))

    def _renewed(self, identity: Identity) -> None:
        self._identity = identity
        _log.info("certificate_renewed", not_after=identity.peer.not_after_s)
        self._reloading = asyncio.ensure_future(self._proxy.reload_identity())

    def _health(self) -> Health:
        checks = {
            "scheduler": "ok" if self._connected else "not connected",
            "proxy": "ok" if self._proxy.connected.is_set() else "not connected",
        }
        return Health(ok=checks["proxy"] == "ok", checks=checks)  # without a scheduler a node still serves


def _metrics() -> tuple[CollectorRegistry, LoopLag]:
    from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry, LoopLag(registry)


def _python(module: str, *arguments: object) -> Sequence[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _read_token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as exc:
        raise FalError(
            Code.NOT_FOUND, f"the join token in {file} cannot be read: {exc.strerror}", remedy="Name another file."
        ) from None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.uuid4())  # no Linux: every start of the agent is a boot


def _log_event(kind: str, subject: str, message: str) -> None:
    _log.info("event", kind=kind, subject=subject, message=message)


async def _no_save(task: object) -> None:
    raise AssertionError("the node sets its own")
