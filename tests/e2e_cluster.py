"""A whole cluster of real processes for end-to-end tests: scheduler, agents, gateway, and the operator's command.

with cluster(tmp_path) as c:
    c.add_node("n1")
    c.apply("app")
    assert c.picture("app").startswith(PNG)

Everything lives below one folder, listens on ports of its own, and is ended by pid at the end; each agent's machine is
purged. Given a `Network`, scheduler and gateway are in its core and nodes where `add_node` says.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from e2e_network import CORE, CORE_ADDRESS, Network
from fal_contract import rpc
from fal_contract.identity import Identity, Role, dns_name_of
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import cluster_pb2_grpc, state_pb2
from fal_runtime.host_image import worker_command
from node_leftovers import left_of

WAIT_S = 60.0
START_S = 60.0
PNG = b"\x89PNG\r\n\x1a\n"
READY = frozenset({state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_RUNNING})
FALCTL = (sys.executable, "-m", "falctl.main")
SCHEDULER = (sys.executable, "-m", "fal_scheduler.main")
GATEWAY = (sys.executable, "-m", "fal_gateway.main")
AGENT = (sys.executable, "-m", "fal_agent.main")
POOLS = {"oci": "machines", "process": "laptops"}  # pool of the nodes with this driver
STRANGERS = "strangers"  # pool of nodes that a test makes and gives up again
_TUNNEL_PORT = 7443


@dataclass
class Process:
    """One of ours, by pid."""

    name: str
    argv: Sequence[str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment()
            )

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal and wait; killed when it does not end."""
        if self.popen is None:
            return
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(15)


@dataclass
class Node:
    """An agent and where it keeps its things."""

    name: str
    state_dir: Path
    process: Process
    ids: list[str] = field(default_factory=list)

    def daemon_pid(self, module: str) -> int:
        """The pid of this node's fal-proxy (fal_agent.proxy.main) or fal-fsd (fal_fsd.main)."""
        found = [pid for pid, argv in processes() if module in argv and any(str(self.state_dir) in a for a in argv)]
        assert len(found) == 1, f"{module} of {self.name}: {found}"
        return found[0]


@dataclass(frozen=True)
class Answer:
    """What the gateway answered."""

    status: int
    body: bytes


class Cluster:
    """See the module. Made by `cluster`."""

    def __init__(self, root: Path, network: Network | None) -> None:
        self.root = root
        self.network = network
        self.nodes: dict[str, Node] = {}
        self.data = root / "s"
        self.scheduler = self._process("scheduler", CORE, *SCHEDULER, "run", "--config", str(root / "scheduler.toml"))
        self.gateway = self._process("gateway", CORE, *GATEWAY, "run", "--config", str(root / "gateway.toml"))
        self.ports: dict[str, int] = {}
        self.rpc_port = self.http_port = 0
        self._channel: grpc.Channel | None = None

    # ---- up and down

    def up(self) -> None:
        """Scheduler and gateway."""
        inside = self.network is not None
        host, ip = ("0.0.0.0", CORE_ADDRESS) if inside else ("127.0.0.1", "127.0.0.1")
        run(*SCHEDULER, "init", "--data-dir", str(self.data), "--host", "localhost", "--ip", ip)
        lines = [f'data_dir = "{self.data}"', f'hosts = ["localhost", "{ip}"]', "[rpc]", f'host = "{host}"', "port = 0"]
        lines += ["[join]", f'host = "{host}"', "port = 0", "[metrics]", "port = 0"]
        (self.root / "scheduler.toml").write_text("\n".join(lines))
        self.start_scheduler()
        self.rpc_port = self._door(self.ports["rpc"])
        self._write_profile()
        identity = self.root / "gateway.pem"
        issue = ["issue", "--data-dir", str(self.data), "--role", "serving", "--name", "g-1", "--out", str(identity)]
        run(*SCHEDULER, *issue)
        tunnels = [f"tunnel_port = {_TUNNEL_PORT if inside else 0}", f'tunnel_host = "{host}"']
        if inside:
            tunnels.append(f'tunnel_addresses = ["{ip}:{_TUNNEL_PORT}"]')
        lines = [f'schedulers = ["{ip}:{self.ports["rpc"]}"]', f'identity = "{identity}"', "port = 0", *tunnels]
        lines.append(f'ports_file = "{self.root / "gateway.json"}"')
        (self.root / "gateway.toml").write_text("\n".join(lines))
        self.gateway.start()
        until((self.root / "gateway.json").exists, "the gateway is up", also=lambda: self._lives(self.gateway))
        self.http_port = self._door(json.loads((self.root / "gateway.json").read_text())["http"])
        for pool in (*POOLS.values(), STRANGERS):
            self.call("ApplyPool", pb.ApplyPoolRequest(pool=state_pb2.Pool(name=pool, cloud="metal")))

    def start_scheduler(self) -> None:
        """Start it (again) and wait until it listens; its ports stay the same."""
        self.scheduler.start()

        def up() -> bool:
            self._lives(self.scheduler)
            file = self.data / "ports.json"
            return file.exists() and json.loads(file.read_text())["pid"] == self.scheduler.pid

        until(up, "the scheduler is up", within_s=START_S)
        self.ports = json.loads((self.data / "ports.json").read_text())

    def add_node(
        self, name: str, *, driver: str = "oci", gpus: str = "4xH100-80GB", pool: str = "", namespace: str = "",
        cgroup: str = "",
    ) -> Node:  # fmt: skip
        """Join a machine and wait until it is ready. With `cgroup`, the agent enters it before anything else."""
        token = self.token(pool=pool or POOLS[driver])
        node = self.make_node(name, token, driver=driver, gpus=gpus, namespace=namespace, cgroup=cgroup)
        node.process.start()
        until(
            lambda: self.node(name).health == "ready", f"node {name} is ready", also=lambda: self._lives(node.process)
        )
        return node

    def make_node(
        self, name: str, token: str, *, driver: str = "oci", gpus: str = "4xH100-80GB", namespace: str = "",
        cgroup: str = "",
    ) -> Node:  # fmt: skip
        """A node whose agent is not started yet."""
        state = self.root / name
        state.mkdir(mode=0o700)
        (state / "token").touch(mode=0o600)
        (state / "token").write_text(token)
        ip = CORE_ADDRESS if self.network is not None else "127.0.0.1"
        argv = [*AGENT, "run", "--state-dir", str(state), "--node-name", name, "--driver", driver, "--sim-gpus", gpus]
        argv += ["--schedulers", f"{ip}:{self.ports['rpc']}", "--join-url", f"https://{ip}:{self.ports['join']}"]
        argv += ["--join-token-file", str(state / "token")]
        argv += ["--proxy-host", "0.0.0.0" if namespace else "127.0.0.1"]
        node = Node(name, state, self._process(f"agent-{name}", namespace, *argv, cgroup=cgroup))
        self.nodes[name] = node
        return node

    def wait_node(self, name: str, health: str, *, within_s: float = WAIT_S) -> None:
        """Wait until the scheduler judges it so; the agent must live meanwhile."""
        process = self.nodes[name].process
        until(
            lambda: self.node(name).health == health, f"node {name} is {health}", within_s=within_s,
            also=lambda: self._lives(process),
        )  # fmt: skip

    def down(self) -> None:
        """End everything, agents first, then clear their machines."""
        if self._channel is not None:
            self._channel.close()
        for node in self.nodes.values():
            node.process.end(signal.SIGKILL)
        for node in self.nodes.values():
            run(*AGENT, "purge", "--state-dir", str(node.state_dir))
        for process in (self.gateway, self.scheduler):
            process.end(signal.SIGKILL)
        left = [words for node in self.nodes.values() for words in left_of(node.state_dir)]
        assert not left, f"still on this machine: {left}"

    # ---- as an operator

    def falctl(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """The command as a person runs it, whatever its exit code."""
        return subprocess.run(
            [*FALCTL, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, env=self.falctl_env
        )

    def ask(self, noun: str, *arguments: str) -> Any:
        """A verb with --json; what is under the noun."""
        done = self.falctl(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[noun]

    @property
    def falctl_env(self) -> dict[str, str]:
        return environment() | {"XDG_CONFIG_HOME": str(self.root / "config")}

    def call(self, method: str, request: Any, *, timeout_s: float = 20.0) -> Any:
        """One unary call to the operators' API. Raises grpc.RpcError."""
        if self._channel is None:
            identity = Identity.load(self.data / "operator")
            name = dns_name_of(identity.peer.cluster_id, Role.SCHEDULER)
            options = [*rpc.CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)]
            address = f"127.0.0.1:{self.rpc_port}"
            self._channel = grpc.secure_channel(address, rpc.channel_credentials(identity), options)
        stub = cluster_pb2_grpc.ClusterStub(self._channel)
        return getattr(stub, method)(request, timeout=timeout_s, wait_for_ready=True)

    def token(self, *, pool: str = STRANGERS, uses: int = 1, ttl_s: float = 600.0) -> str:
        return str(self.call("CreateToken", pb.CreateTokenRequest(pool=pool, ttl_s=ttl_s, uses=uses)).token)

    def node(self, name: str) -> pb.NodeView:
        """What the scheduler thinks of it; an empty view when it does not know it."""
        views = self.call("ListNodes", pb.ListNodesRequest()).nodes
        return next((view for view in views if view.node.name == name), pb.NodeView())

    def apps(self) -> set[str]:
        return {view.app.id.partition("/")[2] for view in self.call("ListApps", pb.ListAppsRequest()).apps}

    def runners(self, app: str = "") -> list[pb.RunnerView]:
        request = pb.ListRunnersRequest(team="default", app=f"default/{app}" if app else "")
        return list(self.call("ListRunners", request).runners)

    def ready(self, app: str) -> dict[str, str]:
        """Ready runners of an app → node names."""
        return {view.runner.id: view.node_name for view in self.runners(app) if view.state in READY}

    def manifest(self, app: str, *, driver: str = "oci", **changes: Any) -> Path:
        """A manifest of the worker without torch; `changes` are keys of it, env among them."""
        keys: dict[str, Any] = {
            "name": app, "num_gpus": 1, "min_concurrency": 1, "max_concurrency": 4, "termination_grace_period": 2,
            "command": [*worker_command(isolates=driver == "oci").argv, "-m", "fal_runtime.worker.fake"],
            "resources": {"cpu": 0.2, "memory_gib": 0.25}, "pools": [POOLS[driver]],
        }  # fmt: skip
        file = self.root / f"{app}.yaml"
        file.write_text(json.dumps(keys | changes))  # JSON is YAML
        return file

    def apply(self, app: str, *, count: int = 1, driver: str = "oci", **changes: Any) -> list[str]:
        """Deploy and wait until `count` runners are ready; returns their ids."""
        file = self.manifest(app, driver=driver, min_concurrency=count, **changes)
        done = self.falctl("app", "apply", "-f", str(file), "--detach")
        assert done.returncode == 0, done.stderr
        return self.wait_ready(app, count)

    def wait_ready(self, app: str, count: int, *, within_s: float = WAIT_S) -> list[str]:
        try:
            until(lambda: len(self.ready(app)) == count, f"{count} runners of {app} are ready", within_s=within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._told(app)}") from None
        return sorted(self.ready(app))

    def _told(self, app: str) -> str:
        """What the scheduler knows, for the message of a failed test."""
        runners = [f"{v.runner.id} {state_pb2.RunnerState.Name(v.state)} {v.reason}" for v in self.runners(app)]
        nodes = self.call("ListNodes", pb.ListNodesRequest()).nodes
        return f"{runners}; nodes: {[f'{v.node.name} {v.health}' for v in nodes]}"

    def delete(self, app: str) -> None:
        """Delete an app and wait until its runners are gone."""
        self.call("DeleteApp", pb.DeleteAppRequest(id=f"default/{app}"))
        try:
            until(lambda: not self.runners(app), f"the runners of {app} are gone")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._told(app)}") from None

    # ---- as a client

    def post(self, app: str, *, timeout_s: float = 60.0, accept: str = "image/png", **body: Any) -> Answer:
        """One request through the gateway."""
        return self.post_to(self.http_port, app, timeout_s=timeout_s, accept=accept, **body)

    def post_to(
        self, port: int, app: str, *, timeout_s: float = 60.0, accept: str = "image/png", **body: Any
    ) -> Answer:
        """As `post`, through the gateway on that port."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            self._send(connection, app, accept, body)
            with connection.getresponse() as answer:
                return Answer(answer.status, answer.read())
        finally:
            connection.close()

    def picture(self, app: str, prompt: str = "seven", **more: Any) -> bytes:
        """A picture through the gateway; anything but 200 fails the test."""
        answer = self.post(app, prompt=prompt, **more)
        assert answer.status == 200, answer.body
        return answer.body

    def events(self, app: str, *, timeout_s: float = 90.0, **body: Any) -> Iterator[tuple[str, Any]]:
        """A streamed request through the gateway: server-sent events as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout_s)
        try:
            self._send(connection, app, "text/event-stream", body)
            with connection.getresponse() as answer:
                assert answer.status == 200, answer.read()
                name = ""
                while line := answer.readline():
                    key, _, value = line.decode().rstrip("\n").partition(": ")
                    if key == "event":
                        name = value
                    elif key == "data":
                        yield name, json.loads(value)
        finally:
            connection.close()

    def _send(self, connection: http.client.HTTPConnection, app: str, accept: str, body: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "Accept": accept}
        connection.request("POST", f"/v1/run/default/{app}", json.dumps({"prompt": "seven"} | body), headers)

    # ---- parts

    def _process(self, name: str, namespace: str, *argv: str, cgroup: str = "") -> Process:
        prefix = self.network.enter(namespace) if self.network is not None and namespace else []
        if cgroup:
            prefix = ["sh", "-c", _ENTER_CGROUP, "sh", cgroup, *prefix]
        if shutil.which("setpriv"):  # a test process that is killed takes the daemons with it
            prefix = ["setpriv", "--pdeathsig", "KILL", *prefix]
        return Process(name, [*prefix, *argv], self.root / f"{name}.log")

    def _door(self, port: int) -> int:
        return port if self.network is None else self.network.door(CORE, port)

    def _lives(self, process: Process) -> None:
        assert process.popen is not None
        assert process.popen.poll() is None, f"{process.name} ended: {process.log.read_text()[-2000:]}"

    def _write_profile(self) -> None:
        folder = self.root / "config" / "falctl" / "profiles"
        folder.mkdir(parents=True)
        servers = f'servers = ["127.0.0.1:{self.rpc_port}"]'
        (folder / "default.toml").write_text(f'{servers}\nidentity = "{self.data / "operator"}"\n')


# Every hierarchy, as systemd does.
_ENTER_CGROUP = (
    'name=$1; shift; for procs in /sys/fs/cgroup/*/"$name"/cgroup.procs /sys/fs/cgroup/"$name"/cgroup.procs; do '
    '[ -e "$procs" ] && echo $$ > "$procs"; done; exec "$@"'
)


@contextmanager
def cluster(root: Path, network: Network | None = None) -> Iterator[Cluster]:
    """Scheduler and gateway up; everything ended and cleared afterwards. The logs stay below `root`."""
    made = Cluster(root, network)
    try:
        made.up()
        yield made
    finally:
        made.down()


# ---- the machine


def environment() -> dict[str, str]:
    """Ours is found the way this test found it; nothing of the caller's configuration."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": paths, "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    """A command to its end. Raises AssertionError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def until(
    done: Callable[[], object], what: str, *, within_s: float = WAIT_S, also: Callable[[], object] = lambda: None
) -> None:
    """Poll until it is true; `also` may give up early. A scheduler that is away counts as not yet."""
    deadline = time.monotonic() + within_s
    while True:
        with suppress(grpc.RpcError):
            if done():
                return
        also()
        if time.monotonic() > deadline:
            raise AssertionError(f"after {within_s:g} s not yet so: {what}")
        time.sleep(0.1)


def processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, argv) of everything that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(folder.name), (folder / "cmdline").read_text(errors="replace").split("\0")


def worker_pid(runner: str) -> int:
    """The process of a runner's worker."""
    wanted = f"FAL_RUNNER_ID={runner}".encode()
    found = []
    for pid, argv in processes():
        with suppress(OSError):
            if any("fal_runtime.worker" in a for a in argv) and wanted in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    assert len(found) == 1, f"workers of {runner}: {found}"
    return found[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leftovers(runner: str) -> list[str]:
    """What of a runner is still on this machine: processes, mounts, cgroups."""
    name = runner.replace("/", ".")
    found = [f"process {pid}: {argv}" for pid, argv in processes() if any(name in word for word in argv)]
    wanted = f"FAL_RUNNER_ID={runner}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                found.append(f"process {folder.name}")
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        found += [str(path) for path in hierarchy.glob("falctl/*") if re.search(re.escape(name), path.name)]
    return found
