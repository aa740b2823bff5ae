"""A node behind masquerade: inbound blocked, MTU 1400, flows forgotten after 30 s of silence. It still serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane import NODE, RUNNER, entry, identities, until, working
from fal_agent.proxy.control import ProxyControl
from fal_agent.proxy.messages import GatewayEntry
from fal_contract.errors import FalError

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
SILENCE_S = 36.0
GATEWAY = "10.199.2.2"
PORT = 7443


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def nat() -> Iterator[tuple[str, str]]:
    """Namespaces node – router – gateway; yields the names of the outer two."""
    node, router, gateway = (f"fal{part}{os.getpid()}" for part in "nrg")
    try:
        for name in (node, router, gateway):
            run("ip", "netns", "add", name)
        for inside, (end, near), subnet in (
            (node, ("fni", "fno"), "10.199.1"),
            (gateway, ("fgi", "fgo"), "10.199.2"),
        ):
            run("ip", "-n", inside, "link", "add", end, "mtu", "1400", "type", "veth", "peer", "name", near,
                "mtu", "1400", "netns", router)  # fmt: skip
            run("ip", "-n", inside, "addr", "add", f"{subnet}.2/24", "dev", end)
            run("ip", "-n", router, "addr", "add", f"{subnet}.1/24", "dev", near)
            run("ip", "-n", inside, "link", "set", end, "up")
            run("ip", "-n", router, "link", "set", near, "up")
        # The gateway has no route to the node: only what the router masquerades comes back.
        run("ip", "-n", node, "route", "add", "default", "via", "10.199.1.1")
        inside_router = ("ip", "netns", "exec", router)
        try:
            run(*inside_router, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "fgo", "-j", "MASQUERADE")
            run(*inside_router, "iptables", "-A", "FORWARD", "-i", "fgo", "-m", "conntrack", "--ctstate", "NEW",
                "-j", "DROP")  # fmt: skip
            run(*inside_router, "iptables", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
            for setting in (
                "net.ipv4.ip_forward=1",
                "net.netfilter.nf_conntrack_tcp_timeout_established=30",
                "net.netfilter.nf_conntrack_tcp_loose=0",
            ):
                run(*inside_router, "sysctl", "-w", setting)
        except (OSError, subprocess.CalledProcessError) as exc:
            pytest.skip(f"this machine cannot masquerade: {getattr(exc, 'stderr', exc)!r}")
        yield node, gateway
    finally:
        for name in (node, router, gateway):
            subprocess.run(("ip", "netns", "del", name), capture_output=True, timeout=20, check=False)


def environment() -> dict[str, str]:
    roots = ("proto", "agent", "runtime", "fsd")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in roots)}


async def spawn(stack: contextlib.AsyncExitStack, namespace: str, *command: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", namespace, sys.executable, *command,
        env=environment(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.communicate()

    stack.push_async_callback(end)
    return process


async def answer(gateway: asyncio.subprocess.Process) -> dict[str, object]:
    assert gateway.stdout is not None
    async with asyncio.timeout(25):
        told = json.loads(await gateway.stdout.readline())
    assert isinstance(told, dict)
    return told


def ask(gateway: asyncio.subprocess.Process, action: str, size: int) -> None:
    assert gateway.stdin is not None
    gateway.stdin.write(f"ask {NODE} {RUNNER} {action} {size}\n".encode())


async def connect(path: Path) -> ProxyControl:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(FalError):
                return await ProxyControl.connect(path, on_stats=lambda stats: None)
            await asyncio.sleep(0.05)


def test_a_node_behind_masquerade_serves_after_long_silence(tmp_path: Path, nat: tuple[str, str]) -> None:
    async def scenario() -> None:
        cluster = identities(tmp_path)
        cluster.gateway.save(tmp_path / "gw.pem")
        async with working(tmp_path) as worker, contextlib.AsyncExitStack() as stack:
            gateway = await spawn(
                stack, nat[1], str(REPOSITORY / "tests/nat_gateway.py"), str(tmp_path / "gw.pem"), GATEWAY, str(PORT)
            )
            assert await answer(gateway) == {"ready": True}
            await spawn(
                stack, nat[0], "-m", "fal_agent.proxy.main", "run", "--state-dir", str(tmp_path / "p"),
                "--identity", str(cluster.node_file),
            )  # fmt: skip
            control = await connect(tmp_path / "p" / "proxy.sock")
            stack.push_async_callback(control.close)
            await control.put_runner(entry(worker, slots=2, timeout_s=90))
            await control.set_gateways([GatewayEntry("gw-1", ((GATEWAY, PORT),))])
            ask(gateway, "/infer", 300_000)  # far above the MTU
            assert (await answer(gateway))["status"] == 200
            # One request computes without a byte, the other tunnels are idle, for longer than the NAT remembers.
            worker.gate.clear()
            ask(gateway, "/infer?silent", 10)
            await until(lambda: worker.running == 1)
            stream = {one.runner_id: one.in_flight for one in (await control.stats()).runners}
            assert stream == {RUNNER: 1}
            end_s = asyncio.get_running_loop().time() + SILENCE_S
            await until(lambda: asyncio.get_running_loop().time() >= end_s, SILENCE_S + 10)
            worker.gate.set()
            assert (await answer(gateway))["status"] == 200, "the silent request was answered"
            ask(gateway, "/big?n=1048576", 10)
            assert await answer(gateway) == {"action": "/big?n=1048576", "status": 200, "bytes": 1 << 20}
            (runner,) = (await control.stats()).runners
            assert (runner.served, runner.failed, runner.cancelled) == (3, 0, 0)
            assert worker.broken == 0

    asyncio.run(scenario())
