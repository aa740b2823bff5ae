"""Runners that listen on a port: reached inside their own network namespace, by no other process, from nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_process import Scheduler, alive, assignment, scheduler
from contract.driver_cases import oci_missing
from dataplane import RUNNER, address_of, once, serving
from fal_agent.probe import UnixProber
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.worker_socket import connect_worker
from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2
from fal_runtime.host_image import worker_command
from fal_runtime.network import namespaces, reach
from fal_runtime.network.reach import Port, connect
from fal_runtime.process_supervisor import start_ticks
from integration.test_agent_process import A, proxy_port, request

IDLE, DONE = state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_TERMINATED
TIMEOUT_S = 60.0
_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = self.path.encode()
        self.send_response(200 if self.path != "/no" else 503); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    do_GET = do_POST = answer
server = http.server.HTTPServer(("127.0.0.1", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    reach.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on port 80 of the loopback of a network namespace of its own."""
    netns = tmp_path / "ns"
    namespaces.create(netns, {})
    try:
        argv = [sys.executable, "-c", _SERVER]
        process = namespaces.inside(netns, lambda: subprocess.Popen(argv, stdout=subprocess.PIPE))
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    finally:
        namespaces.delete(netns)


def _of(process: subprocess.Popen[bytes]) -> Port:
    return Port(80, process.pid, start_ticks(process.pid))


def _run(main: object) -> object:
    async def bounded() -> object:
        async with asyncio.timeout(TIMEOUT_S):
            return await main  # type: ignore[misc]

    return asyncio.run(bounded())


@pytest.mark.root
@pytest.mark.netns
def test_a_port_is_reached_in_the_namespace_of_exactly_this_process(server: subprocess.Popen[bytes]) -> None:
    to = _of(server)

    async def main() -> None:
        home = os.readlink("/proc/self/ns/net")
        sockets = [await connect(to) for _ in range(3)]
        for sock in sockets:
            assert sock.getpeername() == ("127.0.0.1", 80)
            sock.close()
        namespaces_now = {os.readlink(path) for path in Path("/proc/self/task").glob("*/ns/net")}
        assert namespaces_now == {home}, "no thread stays in a runner's namespace and so keeps it"
        with pytest.raises(ProcessLookupError):
            await connect(Port(80, to.pid, to.ticks + 1))  # another process with its pid
        with pytest.raises(ConnectionRefusedError):
            await connect(Port(81, to.pid, to.ticks))
        with pytest.raises(ConnectionRefusedError):
            await connect(Port(1))  # on the node's own loopback
        server.kill()
        server.wait()
        with pytest.raises(ProcessLookupError):
            await connect(to)

    descriptors = len(os.listdir("/proc/self/fd"))
    _run(main())
    _run(_cancelled(to))
    reach.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def _cancelled(to: Port) -> None:
    task = asyncio.create_task(connect(to))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with contextlib.suppress(OSError):
        (await connect(to)).close()  # the thread has done what was cancelled


@pytest.mark.root
@pytest.mark.netns
def test_probes_and_requests_go_to_the_port(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    to = _of(server)

    async def main() -> None:
        prober = UnixProber()
        assert await prober.ask(to, "/", 10) == ""
        assert await prober.ask(to, "/no", 10) == "/no: HTTP 503 /no"
        assert "nothing listens on port 81 yet" in await prober.ask(Port(81, to.pid, to.ticks), "/", 10)
        assert "has ended" in await prober.ask(Port(80, to.pid, 1), "/", 10)
        entry = RunnerEntry(RUNNER, "", 2, 30.0, pid=to.pid, port=80, pid_ticks=to.ticks)
        async with serving(tmp_path / "p") as proxy:
            proxy.put_runner(entry)
            answer = await once(address_of(proxy), "/some/where?x=1")
            assert (answer.status, await answer.read(100)) == (200, b"/some/where?x=1")
        # A proxy that was killed knows it again.
        async with serving(tmp_path / "p") as proxy:
            answer = await once(address_of(proxy), "/again")
            assert (answer.status, await answer.read(100)) == (200, b"/again")
        with pytest.raises(FalError) as gone:
            await connect_worker(RunnerEntry(RUNNER, "", 1, 1.0, pid=to.pid, port=80, pid_ticks=1), 5)
        assert gone.value.code is Code.UNAVAILABLE

    _run(main())


@pytest.mark.parametrize(("pid", "ticks"), [(-1, 0), (1 << 22, 7), (os.getpid(), 0)], ids=["none", "gone", "ours"])
def test_a_runner_without_its_process_never_leads_to_the_node(pid: int, ticks: int) -> None:
    """Else a container that ends as it is registered would send requests to whatever listens on the node."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as there:
            entry = RunnerEntry(RUNNER, "", 1, 1.0, pid=pid, port=there.getsockname()[1], pid_ticks=ticks)
            with pytest.raises(FalError, match="its process has ended"):
                await connect_worker(entry, 5)
            own = await connect_worker(RunnerEntry(RUNNER, "", 1, 1.0, port=there.getsockname()[1]), 5)
            own.close()

    _run(main())


@pytest.mark.parametrize(
    "driver",
    [
        "process",
        pytest.param(
            "oci",
            marks=[
                pytest.mark.root,
                pytest.mark.oci,
                pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
            ],
        ),
    ],
)
def test_a_runner_on_a_port_serves_through_kill_9_of_its_agent(
    tmp_path_factory: pytest.TempPathFactory, driver: str
) -> None:
    async def scenario(s: Scheduler) -> None:
        agent = s.start_agent("--no-allow-host-network", driver=driver)
        hello = await s.hello()
        nosy = assignment("default/nosy-00000001")
        nosy.spec.network = "host"
        wish = assignment(A, python=worker_command(isolates=driver == "oci").argv[0])
        wish.spec.port = 80
        s.complete(wish, nosy)
        status = await s.state(A, IDLE, DONE)
        assert status.state == IDLE, f"{status.reason} {status.log_tail}"
        refused = await s.state(nosy.runner_id, DONE)
        assert "no network 'host'" in refused.reason, "the node's own veto, whatever a scheduler believes"
        before = await request(s, proxy_port(hello), A, {"n": 1})
        s.end_agent(agent, signal.SIGKILL)
        assert (await request(s, proxy_port(hello), A, {"n": 2}))["pid"] == before["pid"]
        s.start_agent(driver=driver)
        hello = await s.hello()
        assert [(r.runner_id, r.state) for r in hello.runners] == [(A, IDLE)]
        s.complete(wish)
        assert (await request(s, proxy_port(hello), A, {"n": 3}))["pid"] == before["pid"]
        wish.goal = state_pb2.GOAL_STOP
        s.complete(wish)
        await s.state(A, DONE)
        assert not list((s.state_dir / "r").iterdir()), "the port's note goes with the runner"
        if driver == "process":
            assert not alive(int(str(before["pid"])))

    async def main() -> None:
        async with scheduler(tmp_path_factory.mktemp("a")) as s:
            await scenario(s)

    _run(main())
