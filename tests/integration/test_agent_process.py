"""fal-agent as a process with its proxy, fsd and the process driver; the scheduler is in the test's hand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_process import WAIT_S, Scheduler, alive, assignment, scheduler, until
from fal_contract.clock import SystemClock
from fal_contract.identity import Identity, Role
from fal_contract.model_manifest import FileEntry, manifest_digest
from fal_contract.tls import client_context
from fal_contract.v1 import agent_pb2, state_pb2

A, B = "default/digits-00000001", "default/digits-00000002"
IDLE, DONE = state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_TERMINATED


def play(root: Path, scenario: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def main() -> None:
        async with scheduler(root) as s:
            await scenario(s)

    asyncio.run(main())


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, for unix sockets."""
    return tmp_path_factory.mktemp("a")


async def request(s: Scheduler, port: int, runner: str, body: dict[str, object]) -> dict[str, object]:
    """One request through the node's proxy, as a gateway sends it."""
    identity: Identity = s.ca.new_identity(role=Role.SERVING, name="g-1", now_s=SystemClock().wall_s())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(identity), server_hostname="")
    payload = json.dumps(body).encode()
    head = f"POST /v1/runners/{runner}/infer HTTP/1.1\r\nHost: node\r\nFal-Ticket: term=1;lease=l-1\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:400]
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))


def proxy_port(hello: agent_pb2.Hello) -> int:
    return hello.endpoints[0].port


def test_a_runner_from_assignment_to_answer_and_through_kill_9(root: Path) -> None:
    _, artifact = model(root)

    async def scenario(s: Scheduler) -> None:
        agent = s.start_agent()
        hello = await s.hello()
        assert (hello.node_id, len(hello.inventory.gpus)) == ("n-agenttest001", 2)
        assert hello.capabilities.driver == "process"
        assert (hello.endpoints[0].network, hello.endpoints[0].host) == ("default", "127.0.0.1")
        gpu = hello.inventory.gpus[0].id
        wish = assignment(A, gpus=[gpu], artifacts=[artifact])
        s.complete(wish)
        status = await s.state(A, IDLE)
        assert [p.name for p in status.phases] == ["weights", "make", "stage", "create", "start", "setup"]
        answer = await request(s, proxy_port(hello), A, {"n": 1})
        await until(lambda: s.statuses[A].served == 1)
        s.tell(log_request=agent_pb2.LogRequest(id=1, runner_id=A, tail_lines=10))
        await until(lambda: s.chunks and s.chunks[-1].end)
        assert [line.text for chunk in s.chunks for line in chunk.lines] == ["first line"]

        # A request is under way while the agent is killed, and while there is none; nothing notices.
        held = asyncio.create_task(request(s, proxy_port(hello), A, {"hold": True}))
        await until(lambda: s.statuses[A].in_flight == 1)
        s.end_agent(agent, signal.SIGKILL)
        assert (await request(s, proxy_port(hello), A, {"release": True}))["pid"] == answer["pid"]
        assert (await held)["pid"] == answer["pid"]
        agent = s.start_agent()
        hello = await s.hello()
        assert hello.cluster_id == s.ca.cluster_id
        assert [(r.runner_id, r.state, list(r.gpus)) for r in hello.runners] == [(A, IDLE, [gpu])]
        s.complete(wish)
        await until(lambda: s.statuses[A].served == 3)
        assert proxy_port(hello) == proxy_port(await restarted(s, agent))

        stop = assignment(A, gpus=[gpu], artifacts=[artifact], goal=state_pb2.GOAL_STOP)
        s.complete(stop)
        status = await s.state(A, DONE)
        assert status.gpu_seconds > 0
        assert not alive(int(str(answer["pid"])))

    async def restarted(s: Scheduler, agent: subprocess.Popen[bytes]) -> agent_pb2.Hello:
        """An orderly end and start: containers, proxy and fsd stay."""
        assert (s.state_dir / "driver").read_text() == "process"
        assert s.end_agent(agent) == 0
        s.start_agent()
        return await s.hello()

    play(root, scenario)


def test_a_worker_that_crashes_is_told_with_its_last_lines(root: Path) -> None:
    async def scenario(s: Scheduler) -> None:
        s.start_agent()
        hello = await s.hello()
        crash = assignment(B)
        crash.spec.command[:] = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
        s.complete(assignment(A), crash)
        status = await s.state(B, DONE)
        assert (status.exit_code, list(status.log_tail)) == (3, ["no such model"])
        await s.state(A, IDLE)
        with pytest.raises(AssertionError):
            await request(s, proxy_port(hello), A, {"exit": 7})
        status = await s.state(A, DONE)
        assert status.exit_code == 7
        assert status.log_tail[-1] == "told to exit"

    play(root, scenario)


def test_the_scheduler_may_be_away(root: Path) -> None:
    async def scenario(s: Scheduler) -> None:
        s.start_agent()
        hello = await s.hello()
        s.complete(assignment(A))
        await s.state(A, IDLE)
        await s.down()
        first = await request(s, proxy_port(hello), A, {})
        await s.up()
        hello = await s.hello()
        assert [r.runner_id for r in hello.runners] == [A]
        await until(
            lambda: (s.statuses[A].state, s.statuses[A].served) == (IDLE, 1)
        )  # the proxy's count may come later
        assert (await request(s, proxy_port(hello), A, {}))["pid"] == first["pid"]

    play(root, scenario)


def test_the_proxy_is_started_again_and_serves_what_it_served(root: Path) -> None:
    async def scenario(s: Scheduler) -> None:
        s.start_agent()
        hello = await s.hello()
        s.complete(assignment(A))
        await s.state(A, IDLE)
        control = s.state_dir / "proxy" / "proxy.sock"
        pid = listener(control)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: listener(control) not in (0, pid))
        await until(lambda: not alive(pid))
        answer = await request(s, proxy_port(hello), A, {})
        assert alive(int(str(answer["pid"])))

    play(root, scenario)


@pytest.mark.root
@pytest.mark.oci
def test_every_process_of_the_agents_cgroup_may_be_killed(root: Path) -> None:
    """As systemd does with KillMode=control-group: a request under way succeeds and no container notices."""
    from fal_runtime.host_image import worker_command
    from fal_runtime.oci import cgroups

    if cgroups.mode() == "none":
        pytest.skip("needs cgroups")
    name = f"/falctl-test-agent-{os.getpid()}"
    _, artifact = model(root)

    async def scenario(s: Scheduler) -> None:
        agent = s.start_agent(driver="oci")
        cgroups.enter(agent.pid, name)  # before it has started anything
        hello = await s.hello()
        assert hello.capabilities.isolates
        wish = assignment(A, python=worker_command(isolates=True).argv[0], artifacts=[artifact], gpus=gpus(hello)[:1])
        s.complete(wish)
        status = await s.state(A, IDLE, DONE)
        assert status.state == IDLE, f"{status.reason} {status.log_tail}"
        before = await request(s, proxy_port(hello), A, {"list": "/models"})
        assert before["listed"] == {"default.m": ["model_index.json"]}
        proxy = listener(s.state_dir / "proxy" / "proxy.sock")
        assert {line.rpartition(":")[2] for line in cgroups.of_process(proxy)} == {"/falctl-proxy"}

        held = asyncio.create_task(request(s, proxy_port(hello), A, {"hold": True}))
        await until(lambda: s.statuses[A].in_flight == 1)
        await asyncio.to_thread(cgroups.remove, name)
        assert agent.wait(WAIT_S) == -signal.SIGKILL
        await request(s, proxy_port(hello), A, {"release": True})
        assert (await held)["asked"] == {"hold": True}
        assert listener(s.state_dir / "proxy" / "proxy.sock") == proxy

        s.start_agent(driver="oci")
        hello = await s.hello()
        (runner,) = hello.runners
        assert (runner.runner_id, runner.state, runner.started_at_s) == (A, IDLE, status.started_at_s)
        assert list(runner.gpus) == gpus(hello)[:1]
        stop = agent_pb2.Assignment()
        stop.CopyFrom(wish)
        stop.goal = state_pb2.GOAL_STOP
        s.complete(stop)
        status = await s.state(A, DONE)
        assert status.log_tail[0] == "first line"
        mounts = Path("/proc/self/mounts").read_text()
        assert str(s.state_dir) not in mounts

    try:
        play(root, scenario)
    finally:
        cgroups.remove(name)


def gpus(hello: agent_pb2.Hello) -> list[str]:
    return [gpu.id for gpu in hello.inventory.gpus]


def model(root: Path) -> tuple[Path, agent_pb2.Artifact]:
    """A folder with one file, and the artifact that names it."""
    origin = root / "origin"
    origin.mkdir()
    (origin / "model_index.json").write_bytes(b"{}")
    files = [FileEntry("model_index.json", 2, hashlib.sha256(b"{}").digest())]
    manifest = state_pb2.ModelManifest(
        files=[state_pb2.ModelFile(path=f.path, bytes=f.size_bytes, sha256=f.sha256) for f in files]
    )
    artifact = agent_pb2.Artifact(
        model="default/m", kind="model", uri=origin.as_uri(), manifest_digest=manifest_digest(files), bytes=2,
        manifest=manifest,
    )  # fmt: skip
    return origin, artifact


def test_a_start_that_cannot_work_says_why(root: Path) -> None:
    async def scenario(s: Scheduler) -> None:
        s.start_agent()
        await s.hello()
        second = s.start_agent()
        assert second.wait(30) == 1
        assert "error: another agent runs in" in s.log()

    play(root, scenario)
    agent = [sys.executable, "-m", "fal_agent.main", "run", "--driver", "process", "--state-dir"]
    for flags, words in (
        ([str(root / "x"), "--schedulers", "127.0.0.1:1"], "no identity"),
        ([str(root / "x"), "--schedulers", "nowhere"], "is not host:port"),
        ([str(root / ("y" * 80)), "--schedulers", "127.0.0.1:1"], "longer than 70 bytes"),
        ([str(root / "x"), "--schedulers", "127.0.0.1:1", "--addresses", "10.0.0.1"], "NETWORK=HOST"),
    ):
        done = subprocess.run([*agent, *flags], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    journal = root / "n" / "journal"
    content = b"FALJ" + (9).to_bytes(4, "little")
    journal.write_bytes(content)
    done = subprocess.run(
        [*agent, str(root / "n"), "--schedulers", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "version 9" in done.stderr) == (1, True)
    assert journal.read_bytes() == content


def listener(path: Path) -> int:
    """Pid of the process that answers at a unix socket; 0: none."""
    import socket
    import struct

    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return 0
        return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
