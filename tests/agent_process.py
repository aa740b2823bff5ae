"""A real fal-agent as a process, against a scheduler in the test's hand over real mutual TLS.

async with scheduler(tmp_path) as s:
    agent = s.start_agent()
    hello = await s.hello()
    s.tell(complete=…)
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc.aio

from fal_contract import rpc
from fal_contract.clock import SystemClock
from fal_contract.identity import Role, new_cluster_id
from fal_contract.v1 import agent_pb2, agent_pb2_grpc, state_pb2
from fal_scheduler.ca import CertificateAuthority
from node_leftovers import left_of

NODE = "n-agenttest001"
WAIT_S = 60.0

# A worker without torch: ready after FAL_TEST_LOAD_S; a request with `hold` is answered after one with `release`.
WORKER = """
import http.server, json, os, socketserver, sys, threading, time
print("first line", flush=True)
time.sleep(float(os.environ.get("FAL_TEST_LOAD_S", "0")))
released = threading.Event()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return "unix"
    def log_message(self, *_): pass
    def answer(self):
        size = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(size) or b"{}")
        if asked.get("release"): released.set()
        if asked.get("hold"): released.wait(60)
        if asked.get("exit") is not None:
            print("told to exit", flush=True); os._exit(asked["exit"])
        listed = {d: os.listdir(asked["list"] + "/" + d) for d in os.listdir(asked["list"])} if "list" in asked else 0
        body = json.dumps({"pid": os.getpid(), "asked": asked, "listed": listed}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close"); self.end_headers(); self.wfile.write(body)
    do_GET = do_POST = answer
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
if "FAL_PORT" in os.environ:
    class Port(socketserver.ThreadingMixIn, socketserver.TCPServer): daemon_threads = True
    Port(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
path = os.environ["FAL_SOCKET"]
if os.path.exists(path): os.unlink(path)
Server(path, Handler).serve_forever()
"""


class Scheduler(agent_pb2_grpc.AgentServiceServicer):
    """The scheduler's side of the session, by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ca = CertificateAuthority.create(
            root / "ca", cluster_id=new_cluster_id(Random(1)), now_s=SystemClock().wall_s()
        )
        self.port = 0
        self.reports: list[agent_pb2.Report] = []
        self.statuses: dict[str, agent_pb2.RunnerStatus] = {}
        self.events: list[agent_pb2.NodeEvent] = []
        self.chunks: list[agent_pb2.LogChunk] = []
        self.sessions = 0
        self.heartbeat_s = 1.0
        self.agents: list[subprocess.Popen[bytes]] = []
        self._hellos: asyncio.Queue[agent_pb2.Hello] = asyncio.Queue()
        self._down: asyncio.Queue[agent_pb2.SchedulerMessage] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    # ---- the service

    async def Session(self, requests: AsyncIterator[agent_pb2.AgentMessage], context: Any) -> AsyncIterator[Any]:
        first = await anext(requests)
        self.sessions += 1
        self._down = asyncio.Queue()
        self.statuses |= {status.runner_id: status for status in first.hello.runners}
        reader = asyncio.create_task(self._read(requests))
        yield agent_pb2.SchedulerMessage(
            welcome=agent_pb2.Welcome(
                version=1,
                cluster_id=self.ca.cluster_id,
                epoch=1,
                incarnation="i-1",
                term=1,
                heartbeat_interval_s=self.heartbeat_s,
            )
        )
        self._hellos.put_nowait(first.hello)
        try:
            while True:
                yield await self._down.get()
        finally:
            reader.cancel()

    async def RenewCertificate(self, request: agent_pb2.RenewCertificateRequest, context: Any) -> Any:
        pem = self.ca.issue(request.csr_pem, role=Role.NODE, name=NODE, now_s=SystemClock().wall_s())
        return agent_pb2.RenewCertificateReply(certificate_pem=pem)

    async def _read(self, requests: AsyncIterator[agent_pb2.AgentMessage]) -> None:
        async for message in requests:
            if message.HasField("report"):
                self.reports.append(message.report)
                self.events.extend(message.report.events)
                self.statuses |= {status.runner_id: status for status in message.report.runners}
            elif message.HasField("log_chunk"):
                self.chunks.append(message.log_chunk)

    # ---- what a test does

    async def up(self) -> None:
        self._server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        identity = self.ca.new_identity(role=Role.SCHEDULER, name="s-1", now_s=SystemClock().wall_s())
        self.port = rpc.bind(self._server, f"127.0.0.1:{self.port}", rpc.server_credentials(identity))
        await self._server.start()

    async def down(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def tell(self, **kind: object) -> None:
        self._down.put_nowait(agent_pb2.SchedulerMessage(**kind))  # type: ignore[arg-type]

    def complete(self, *assignments: agent_pb2.Assignment, revision: int = 1, term: int = 1) -> None:
        self.tell(complete=agent_pb2.Complete(revision=revision, term=term, assignments=assignments))

    async def hello(self) -> agent_pb2.Hello:
        async with asyncio.timeout(WAIT_S):
            return await self._hellos.get()

    async def state(self, runner: str, *states: int) -> agent_pb2.RunnerStatus:
        """Wait until the node tells one of these states."""
        await until(lambda: runner in self.statuses and self.statuses[runner].state in states)
        return self.statuses[runner]

    @property
    def state_dir(self) -> Path:
        return self.root / "n"

    def start_agent(
        self, *flags: str, driver: str = "process", sim_gpus: str = "2xH100-80GB"
    ) -> subprocess.Popen[bytes]:
        identity = self.state_dir / "identity"
        if not identity.exists():
            self.state_dir.mkdir()
            now_s = SystemClock().wall_s()
            self.ca.new_identity(role=Role.NODE, name=NODE, now_s=now_s).save(identity)
        argv = [sys.executable, "-m", "fal_agent.main", "run", "--state-dir", str(self.state_dir)]
        argv += ["--schedulers", f"127.0.0.1:{self.port}", "--driver", driver, "--proxy-host", "127.0.0.1"]
        argv += ["--sim-gpus", "2xH100-80GB", "--node-name", "box", *flags]
        with (self.root / "agent.log").open("ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.agents.append(process)
        return process

    def end_agent(self, process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
        process.send_signal(number)
        return process.wait(30)

    def purge(self) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fal_agent.main", "purge", "--state-dir", str(self.state_dir)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self) -> str:
        return (self.root / "agent.log").read_text()


@asynccontextmanager
async def scheduler(root: Path) -> AsyncIterator[Scheduler]:
    """A scheduler that is up; at the end every agent is killed and its machine cleared."""
    made = Scheduler(root)
    await made.up()
    try:
        yield made
    finally:
        for process in made.agents:
            if process.poll() is None:
                process.kill()
                process.wait(10)
        if made.state_dir.exists():
            await asyncio.to_thread(made.purge)
        await made.down()
        left = left_of(made.state_dir)
        assert not left, f"still on this machine: {left}"


def assignment(runner: str, **changes: Any) -> agent_pb2.Assignment:
    """A runner of the worker above."""
    python = shutil.which("python3") or sys.executable
    spec = state_pb2.AppSpec(
        image="host", network="none", command=[changes.pop("python", python), "-c", WORKER],
        env=changes.pop("env", {}), termination_grace_s=2.0,
        scaling=state_pb2.Scaling(max_multiplexing=2, startup_timeout_s=30, request_timeout_s=60),
        resources=state_pb2.Resources(memory_bytes=256 << 20, pids_max=64),
        probe=state_pb2.Probe(interval_s=1.0, timeout_s=5.0, failures_max=3),
    )  # fmt: skip
    given: dict[str, Any] = {"goal": state_pb2.GOAL_RUN, "term": 1, "app": "default/digits", "revision": 1}
    return agent_pb2.Assignment(
        id=f"as-{runner[-8:]}", runner_id=runner, share_group="default/digits", spec=spec, **(given | changes)
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(what: Callable[[], object], *, within_s: float = WAIT_S) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110  (other processes)
            await asyncio.sleep(0.02)
