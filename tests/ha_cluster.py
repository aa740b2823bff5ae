"""A cluster of real processes with several schedulers on one etcd, for tests and benchmarks of takeovers.

with ha_cluster(tmp_path) as c:
    c.add_node("n1", driver="process")
    c.apply("app", driver="process")
    c.leader().process.end(signal.SIGKILL)

As `e2e_cluster`, of which it is one; each scheduler has a data folder of its own, with a copy of the first identity.
Given a `Network`, etcd and gateways are in its core and scheduler N in the namespace `sN`.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from e2e_cluster import GATEWAY, PNG, POOLS, SCHEDULER, Cluster, Node, Process, processes, run, until
from e2e_network import CORE, CORE_ADDRESS, Network
from etcd_server import free_ports
from fal_contract import rpc
from fal_contract.identity import Identity, Role, dns_name_of
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import cluster_pb2_grpc, schedulers_pb2, schedulers_pb2_grpc, state_pb2

ETCD_PORT = 2379
RPC_PORT = 7420
TAKEOVER_S = 40.0


@dataclass
class Scheduler:
    """One of the schedulers. `door`: a port of our loopback that leads to its gRPC listener."""

    name: str
    data: Path
    process: Process
    ip: str
    ports: dict[str, int] = field(default_factory=dict)
    door: int = 0

    @property
    def address(self) -> str:
        """Where nodes and gateways dial."""
        return f"{self.ip}:{self.ports['rpc']}"


class HaCluster(Cluster):
    """See the module. Made by `ha_cluster`."""

    def __init__(self, root: Path, network: Network | None, *, schedulers: int, gateways: int) -> None:
        super().__init__(root, network)
        self.schedulers: list[Scheduler] = []
        for number in range(schedulers):
            name = f"s{number}"
            ip = network.attach(name, f"10.78.{number}") if network is not None else "127.0.0.1"
            argv = [*SCHEDULER, "run", "--config", str(root / f"{name}.toml")]
            self.schedulers.append(Scheduler(name, root / name, self._process(name, name, *argv), ip))
        self.data = self.schedulers[0].data
        self.etcd_port = ETCD_PORT if network is not None else free_ports(1)[0]
        self.etcd = self._process("etcd", CORE, *self._etcd_argv())
        self.gateways = [
            self._process(f"gateway{n}", CORE, *GATEWAY, "run", "--config", str(root / f"gateway{n}.toml"))
            for n in range(gateways)
        ]
        self.http_ports: list[int] = []
        self._channels: dict[str, grpc.Channel] = {}

    def _etcd_argv(self) -> list[str]:
        host, ip = ("0.0.0.0", CORE_ADDRESS) if self.network is not None else ("127.0.0.1", "127.0.0.1")
        peer = f"http://127.0.0.1:{2380 if self.network is not None else free_ports(1)[0]}"
        return [
            "etcd", f"--data-dir={self.root / 'etcd'}", f"--listen-client-urls=http://{host}:{self.etcd_port}",
            f"--advertise-client-urls=http://{ip}:{self.etcd_port}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        ]  # fmt: skip

    # ---- up and down

    def up(self) -> None:
        """etcd, the schedulers, the gateways."""
        self.etcd.start()
        until(
            lambda: b"ready to serve client requests" in self.etcd.log.read_bytes(), "etcd is up",
            also=lambda: self._lives(self.etcd),
        )  # fmt: skip
        run(*SCHEDULER, "init", "--data-dir", str(self.data), "--host", "localhost", "--ip", "127.0.0.1")
        for number, one in enumerate(self.schedulers):
            if number:
                one.data.mkdir(mode=0o700)
                shutil.copytree(self.data / "identity", one.data / "identity")
            self._configure(one, number)
            self.start_one(one)
        self.leader()
        self._write_profiles()
        for number, gateway in enumerate(self.gateways):
            self._start_gateway(number, gateway)
        self.http_port = self.http_ports[0] if self.http_ports else 0
        for pool in POOLS.values():
            self.call("ApplyPool", pb.ApplyPoolRequest(pool=state_pb2.Pool(name=pool, cloud="metal")))

    def _configure(self, one: Scheduler, number: int) -> None:
        inside = self.network is not None
        host, etcd = ("0.0.0.0", CORE_ADDRESS) if inside else ("127.0.0.1", "127.0.0.1")
        port = RPC_PORT + 10 * number if inside else 0
        lines = [f'data_dir = "{one.data}"', f'hosts = ["{one.ip}"]', 'store = "etcd"']
        lines += ["[etcd]", f'endpoints = ["{etcd}:{self.etcd_port}"]', "[rpc]", f'host = "{host}"', f"port = {port}"]
        lines += ["[join]", f'host = "{host}"', f"port = {port + 1 if port else 0}", "[metrics]", "port = 0"]
        (self.root / f"{one.name}.toml").write_text("\n".join(lines))

    def start_one(self, one: Scheduler) -> None:
        """Start it (again) and wait until it listens, as leader or standby."""
        one.process.start()

        def listens() -> bool:
            self._lives(one.process)
            file = one.data / "ports.json"
            return file.exists() and json.loads(file.read_text())["pid"] in self._pids(one)

        until(listens, f"scheduler {one.name} listens")
        one.ports = json.loads((one.data / "ports.json").read_text())
        if not one.door:
            one.door = self.network.door(one.name, one.ports["rpc"]) if self.network is not None else one.ports["rpc"]

    def _pids(self, one: Scheduler) -> set[int]:
        return {one.process.pid}

    def _write_profiles(self) -> None:
        folder = self.root / "config" / "falctl" / "profiles"
        folder.mkdir(parents=True)
        servers = ", ".join(f'"127.0.0.1:{one.door}"' for one in self.schedulers)
        text = f'servers = [{servers}]\nidentity = "{self.data / "operator"}"\n'
        (folder / "default.toml").write_text(text)

    def _start_gateway(self, number: int, gateway: Process) -> None:
        identity, ports = self.root / f"gateway{number}.pem", self.root / f"gateway{number}.json"
        issue = ["issue", "--data-dir", str(self.data), "--role", "serving", "--name", f"g-{number}"]
        run(*SCHEDULER, *issue, "--out", str(identity))
        schedulers = json.dumps([one.address for one in self.schedulers])
        lines = [f"schedulers = {schedulers}", f'identity = "{identity}"', "port = 0", f'ports_file = "{ports}"']
        (self.root / f"gateway{number}.toml").write_text("\n".join(lines))
        gateway.start()
        until(ports.exists, f"gateway {number} is up", also=lambda: self._lives(gateway))
        self.http_ports.append(self._door(json.loads(ports.read_text())["http"]))

    def make_node(
        self, name: str, token: str, *, driver: str = "oci", gpus: str = "4xH100-80GB", namespace: str = "",
        cgroup: str = "",
    ) -> Node:  # fmt: skip
        """As a cluster's, with all schedulers' addresses."""
        leader = self.leader()
        self.ports = leader.ports
        node = super().make_node(name, token, driver=driver, gpus=gpus, namespace=namespace, cgroup=cgroup)
        argv = list(node.process.argv)
        at = argv.index("--schedulers")
        argv[at : at + 2] = [word for one in self.schedulers for word in ("--schedulers", one.address)]
        argv[argv.index("--join-url") + 1] = f"https://{leader.ip}:{leader.ports['join']}"
        node.process.argv = argv
        return node

    def down(self) -> None:
        """End everything."""
        for channel in self._channels.values():
            channel.close()
        try:
            for one in self.schedulers:  # one that a test has stopped does not end
                if one.process.popen is not None and one.process.popen.poll() is None:
                    one.process.popen.send_signal(signal.SIGCONT)
            super().down()
        finally:
            for process in (*self.gateways, *(one.process for one in self.schedulers), self.etcd):
                process.end(signal.SIGKILL)

    def worker_pids(self) -> set[int]:
        """Of this cluster's workers."""
        ours, found = str(self.root).encode(), set()
        for pid, argv in processes():
            with suppress(OSError):
                if "fal_runtime.worker.fake" in argv and ours in Path(f"/proc/{pid}/environ").read_bytes():
                    found.add(pid)
        return found

    # ---- who leads

    def view(self, one: Scheduler, *, timeout_s: float = 3.0) -> schedulers_pb2.LeaderView:
        """What this scheduler says. Raises grpc.RpcError."""
        stub = schedulers_pb2_grpc.SchedulersStub(self._to(one))
        reply: schedulers_pb2.LeaderView = stub.GetLeader(schedulers_pb2.GetLeaderRequest(), timeout=timeout_s)
        return reply

    def leads(self, one: Scheduler) -> bool:
        """Whether it says so itself."""
        if one.process.popen is None or one.process.popen.poll() is not None:
            return False
        with suppress(grpc.RpcError):
            return any(each.leads and each.answers for each in self.view(one).schedulers)
        return False

    def leader(self, *, other_than: Scheduler | None = None, within_s: float = TAKEOVER_S) -> Scheduler:
        """Wait until one of them leads."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            for one in self.schedulers:
                if one is not other_than and self.leads(one):
                    return one
            time.sleep(0.05)
        raise AssertionError(f"after {within_s:g} s nobody leads")

    def _to(self, one: Scheduler) -> grpc.Channel:
        channel = self._channels.get(one.name)
        if channel is None:
            identity = Identity.load(self.data / "operator")
            name = dns_name_of(identity.peer.cluster_id, Role.SCHEDULER)
            options = [*rpc.CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)]
            credentials = rpc.channel_credentials(identity)
            channel = self._channels[one.name] = grpc.secure_channel(f"127.0.0.1:{one.door}", credentials, options)
        return channel

    def ask_one(self, one: Scheduler, method: str, request: Any, *, timeout_s: float) -> Any:
        """To this scheduler, once. Raises grpc.RpcError."""
        return getattr(cluster_pb2_grpc.ClusterStub(self._to(one)), method)(request, timeout=timeout_s)

    def call(self, method: str, request: Any, *, timeout_s: float = 20.0) -> Any:
        """To whoever leads; NOT_LEADER and refused connections go on to the next. Raises grpc.RpcError."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for one in self.schedulers:
                try:
                    return self.ask_one(one, method, request, timeout_s=5.0)
                except grpc.RpcError as error:
                    code = error.code()  # type: ignore[attr-defined]  # the stubs lack it
                    if code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline_s:
                        raise
            time.sleep(0.05)


class Load:
    """Requests through every gateway, one after the other each; whatever is not a picture counts as failed."""

    def __init__(self, world: HaCluster, app: str) -> None:
        self.failed: list[str] = []
        self.served = 0
        self._world, self._app = world, app
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(port,)) for port in world.http_ports]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    def _ask(self, port: int) -> None:
        while not self._stop.wait(0.05):
            try:
                answer = self._world.post_to(port, self._app)
            except OSError as error:
                self.failed.append(repr(error))
                continue
            if answer.status == 200 and answer.body.startswith(PNG):
                self.served += 1
            else:
                self.failed.append(f"{answer.status} {answer.body[:200]!r}")


@contextmanager
def ha_cluster(
    root: Path, network: Network | None = None, *, schedulers: int = 3, gateways: int = 1
) -> Iterator[HaCluster]:
    """All up; everything ended and cleared afterwards. The logs stay below `root`."""
    made = HaCluster(root, network, schedulers=schedulers, gateways=gateways)
    try:
        made.up()
        yield made
    finally:
        made.down()
