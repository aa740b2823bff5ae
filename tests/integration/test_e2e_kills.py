"""SIGKILL of every process of the chain in turn, while requests flow: what is lost, what comes back by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e_cluster import PNG, Cluster, Node, alive, processes, until, worker_pid

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]
PROXY, FSD = "fal_agent.proxy.main", "fal_fsd.main"


class Traffic:
    """Requests one after the other until told to stop; what each was answered."""

    def __init__(self, real: Cluster, app: str) -> None:
        self._real, self._app = real, app
        self._stop = threading.Event()
        self.statuses: list[int] = []

    def __call__(self) -> None:
        while not self._stop.wait(0.02):
            self.statuses.append(self._real.post(self._app).status)

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self)
            try:
                yield
            finally:
                self._stop.set()
            done.result(60)

    def more(self, count: int) -> None:
        """Wait until so many further requests were answered."""
        target = len(self.statuses) + count
        until(lambda: len(self.statuses) >= target, f"{count} more answers")


@pytest.fixture(scope="module")
def victim(shared_cluster: Cluster) -> str:
    """A runner whose worker was killed. The next try waits half a minute, during which another test may run."""
    [runner] = shared_cluster.apply("mortal")
    os.kill(worker_pid(runner), signal.SIGKILL)
    return runner


@pytest.mark.usefixtures("victim")
def test_a_request_outlives_every_process_of_the_agents_cgroup(real: Cluster, agent_cgroup: str) -> None:
    """As systemd does it: all pids of the unit's cgroup, in every hierarchy, get SIGKILL in the middle of a request."""
    node = real.nodes["box"]
    [runner] = real.apply("long", env={"FAL_FAKE_STEP_S": "1"}, health_check={"interval_s": 1.0})
    before = (worker_pid(runner), node.daemon_pid(PROXY), node.daemon_pid(FSD), conmon_of(node, runner))
    stream = real.events("long", steps=30)
    events = [next(stream) for _ in range(3)]
    assert [name for name, _ in events] == ["start", "step", "step"]

    killed = kill_cgroup(agent_cgroup)
    assert node.process.pid in killed
    assert not set(before) & killed
    node.process.end()
    node.process.start()
    events += list(stream)
    assert [name for name, _ in events].count("step") == 30
    assert [name for name, _ in events][-2:] == ["output", "completed"]

    real.wait_node("box", "ready")
    until(lambda: "long" in str(real.ready("long")), "the agent tells of its runner again")
    assert list(real.ready("long")) == [runner]
    assert (worker_pid(runner), node.daemon_pid(PROXY), node.daemon_pid(FSD), conmon_of(node, runner)) == before
    assert containers_of(node) == len(real.node("box").runners)
    real.delete("long")
    assert not alive(before[0])


def kill_cgroup(name: str) -> set[int]:
    """SIGKILL to all of it, again and again until it is empty; who was killed."""
    killed: set[int] = set()
    tree = Path("/sys/fs/cgroup")
    files = [*tree.glob(f"*/{name}/cgroup.procs"), *tree.glob(f"{name}/cgroup.procs")]

    def rest() -> set[int]:
        return {pid for file in files for pid in map(int, file.read_text().split()) if alive(pid)}

    def empty() -> bool:
        for pid in rest():
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not rest()

    until(empty, f"cgroup {name} is empty", within_s=10)
    return killed


def conmon_of(node: Node, runner: str) -> int:
    """The pid of the process that keeps a container's log and exit code. A prepared container has it under a name of
    its own, so its driver's note tells which; that it is one, and of this node, is seen by its arguments."""
    name = runner.replace("/", ".")
    pid = int(json.loads((node.state_dir / "c" / "containers" / name / "created.json").read_text())["conmon"])
    [argv] = [argv for each, argv in processes() if each == pid]
    assert argv[0].endswith("conmon")
    assert any(str(node.state_dir) in word for word in argv)
    return pid


def containers_of(node: Node) -> int:
    """How many containers the driver of a node has on disk."""
    return sum(1 for _ in (node.state_dir / "c" / "containers").iterdir())


def test_no_warm_request_fails_while_the_scheduler_is_killed(real: Cluster) -> None:
    runners = real.apply("warm", count=2)
    pids = {runner: worker_pid(runner) for runner in runners}
    traffic = Traffic(real, "warm")
    with traffic.flowing():
        traffic.more(10)
        os.kill(real.scheduler.pid, signal.SIGKILL)
        real.scheduler.end()
        traffic.more(50)
        real.start_scheduler()
        real.wait_node("box", "ready")
        until(lambda: sorted(real.ready("warm")) == runners, "the same runners are known again")
        traffic.more(20)
    assert set(traffic.statuses) == {200}, traffic.statuses
    assert {runner: worker_pid(runner) for runner in runners} == pids
    assert [view.runner.id for view in real.runners("warm")] == sorted(runners)
    assert not any(view.orphan for view in real.runners())


def test_a_killed_worker_is_replaced(real: Cluster, victim: str) -> None:
    until(lambda: set(real.ready("mortal")) - {victim}, "another runner serves", within_s=90)
    assert victim not in real.ready("mortal")
    assert real.picture("mortal").startswith(PNG)
    said = [event["message"] for event in real.ask("events", "events", "--subject", victim)]
    assert any("killed by SIGKILL" in message for message in said), said


@pytest.mark.parametrize("module", [PROXY, FSD])
def test_a_nodes_daemon_comes_back_by_itself(real: Cluster, module: str) -> None:
    app = "steady"
    [runner] = real.apply(app)
    node, worker = real.nodes["box"], worker_pid(runner)
    assert real.picture(app).startswith(PNG)
    first = node.daemon_pid(module)
    os.kill(first, signal.SIGKILL)
    until(lambda: not alive(first), "it is dead")
    until(lambda: started(node, module), "it runs again", within_s=20)
    until(lambda: real.post(app).status == 200, "requests are served", within_s=10)
    assert worker_pid(runner) == worker
    assert list(real.ready(app)) == [runner]


def started(node: Node, module: str) -> bool:
    with contextlib.suppress(AssertionError):
        return alive(node.daemon_pid(module))
    return False
