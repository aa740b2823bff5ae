"""Agents in network namespaces of their own: a lost line, and a line behind masquerade.

`near` is reachable both ways. `nat` is behind masquerade: nothing comes in, MTU 1400, connections idle for 30 s are
forgotten. Scheduler and gateway are in a third namespace; a router joins them.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from e2e_cluster import PNG, POOLS, STRANGERS, Cluster, cluster, until, worker_pid
from e2e_network import CORE, CORE_ADDRESS, IDLE_CUT_S, Network, network
from fal_contract.limits import LOST_AFTER_S
from fal_contract.v1 import state_pb2

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.netns, pytest.mark.slow]
IDLE_S = IDLE_CUT_S + 10
SILENCE_S = 40.0  # three heartbeats of 5 s, and a busy machine
NAT_ADDRESS = "10.77.9.1"


@dataclass
class Idle:
    """A plain TCP connection out of `nat`, silent since `since_s`: the proof that the rig cuts what idles."""

    inner: socket.socket
    outer: socket.socket
    since_s: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.since_s + IDLE_S - time.monotonic()))

    def passes(self) -> bool:
        """Whether a byte still gets through."""
        self.inner.sendall(b"x")
        self.outer.settimeout(3.0)
        try:
            return self.outer.recv(1) == b"x"
        except TimeoutError:
            return False


@dataclass
class Wide:
    """The cluster with a runner on each node."""

    net: Network
    cluster: Cluster
    runners: dict[str, str]
    idle: Idle

    def pids(self) -> dict[str, int]:
        """Everything that must not restart."""
        found = {f"worker {name}": worker_pid(runner) for name, runner in self.runners.items()}
        for name, node in self.cluster.nodes.items():
            found |= {f"proxy {name}": node.daemon_pid("fal_agent.proxy.main"), f"agent {name}": node.process.pid}
        return found

    def unchanged(self) -> bool:
        """The same runners, each ready, none beside them."""
        return {name: list(self.cluster.ready(name)) for name in self.runners} == {
            name: [runner] for name, runner in self.runners.items()
        } and len(self.cluster.runners()) == len(self.runners)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wide]:
    root = tmp_path_factory.mktemp("w")
    with network() as net:
        net.attach("near", "10.77.1")
        assert net.behind_masquerade("nat", "10.77.9") == NAT_ADDRESS
        with cluster(root, net) as made:
            made.add_node("near", namespace="near")
            made.add_node("nat", namespace="nat", pool=STRANGERS)
            pools = {"near": POOLS["oci"], "nat": STRANGERS}
            runners = {name: made.apply(name, pools=[pool])[0] for name, pool in pools.items()}
            assert made.picture("nat", timeout_s=20).startswith(PNG)
            inner, outer = connection(net)
            with inner, outer:
                yield Wide(net, made, runners, Idle(inner, outer, time.monotonic()))
    shutil.rmtree(root)


def connection(net: Network) -> tuple[socket.socket, socket.socket]:
    """An open TCP connection from `nat` to the core."""
    inner = net.socket("nat")
    with net.socket(CORE) as listener:
        listener.bind((CORE_ADDRESS, 0))
        listener.listen()
        inner.settimeout(60)
        inner.connect(listener.getsockname())
        outer, peer = listener.accept()
    assert peer[0] != NAT_ADDRESS, "the address is masqueraded"
    return inner, outer


def test_a_node_that_only_the_scheduler_lost_goes_on_serving(wide: Wide) -> None:
    c, pids, port = wide.cluster, wide.pids(), wide.cluster.ports["rpc"]
    assert c.node("near").paths["g-1"] == "direct"
    wide.net.block("near", port)
    try:
        c.wait_node("near", "unknown", within_s=SILENCE_S)
        [view] = c.runners("near")
        assert view.state == state_pb2.RUNNER_STATE_UNKNOWN
        assert view.reason
        for _ in range(5):
            assert c.picture("near", timeout_s=10).startswith(PNG)
    finally:
        wide.net.unblock("near", port)
    c.wait_node("near", "ready")
    until(wide.unchanged, "the same runners")
    assert wide.pids() == pids


def test_behind_masquerade_requests_come_back_along_the_nodes_own_tunnels(wide: Wide) -> None:
    c = wide.cluster
    assert c.node("nat").paths["g-1"] == "tunnel"
    with wide.net.socket(CORE) as direct:
        direct.settimeout(1.0)
        with pytest.raises(OSError):
            direct.connect((NAT_ADDRESS, c.node("nat").endpoints[0].port))
    wide.idle.wait()
    assert not wide.idle.passes(), "the rig does not cut idle connections"
    began_s = time.monotonic()
    assert c.picture("nat", timeout_s=20).startswith(PNG)
    assert time.monotonic() - began_s < 10
    prompt = "seven " * 600  # both ways longer than a packet
    wide_picture = c.post("nat", prompt=prompt, width=2048, height=2048)
    assert wide_picture.status == 200
    assert len(wide_picture.body) > 4096
    names = [name for name, _ in c.events("nat", steps=5)]
    assert names == ["start", *["step"] * 5, "output", "completed"]


@pytest.mark.timeout(300)
def test_nothing_is_replaced_when_everybody_falls_silent_and_all_come_back(
    wide: Wide, request: pytest.FixtureRequest
) -> None:
    c, pids = wide.cluster, wide.pids()
    for name in wide.runners:
        wide.net.cut(name)
    try:
        for name in wide.runners:
            c.wait_node(name, "unknown", within_s=SILENCE_S)
        if request.config.getoption("--all"):
            time.sleep(LOST_AFTER_S)
        assert {view.runner.id for view in c.runners()} == set(wide.runners.values())
        assert {c.node(name).health for name in wide.runners} == {"unknown"}
    finally:
        for name in wide.runners:
            wide.net.mend(name)
    for name in wide.runners:
        c.wait_node(name, "ready", within_s=90)
    until(wide.unchanged, "the same runners")
    for name in wide.runners:
        until(lambda name=name: c.post(name, timeout_s=20).status == 200, f"{name} serves")  # type: ignore[misc]
    assert wide.pids() == pids
