"""What a scheduler with 100 runners costs at rest: memory, CPU, store writes. Real process, real mutual TLS."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from fal_contract.limits import HEARTBEAT_INTERVAL_S
from fal_contract.v1 import cluster_pb2
from scheduler_process import Process, RemoteAgent, cluster, init, joined, ready, scheduler
from scheduler_rig import app_request

NODES, APPS, RUNNERS_PER_APP = 13, 10, 10
RSS_BYTES_MAX = 120 << 20
CPU_SHARE_MAX = 0.01
REST_S = 2 * HEARTBEAT_INTERVAL_S + 2


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def beat(agents: list[RemoteAgent]) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)
        for agent in agents:
            agent.report()


async def measure(process: Process, record_property: object) -> None:
    agents = [RemoteAgent(process, await joined(process, f"n{n}")) for n in range(NODES)]
    for agent in agents:
        agent.dial()
    heart = asyncio.create_task(beat(agents))
    pid = process.popen.pid
    async with cluster(process) as stub:
        for n in range(APPS):
            await stub.ApplyApp(app_request(f"a{n}", runners=RUNNERS_PER_APP), timeout=10)
        for n in range(APPS):
            await ready(stub, f"t/a{n}", RUNNERS_PER_APP)
        await asyncio.sleep(2)  # the last commits of the deploy, a sample of the metrics
        before = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)
        used_s = cpu_s(pid)
        await asyncio.sleep(REST_S)
        share = (cpu_s(pid) - used_s) / REST_S
        after = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)
    heart.cancel()
    for agent in agents:
        agent.hang_up()
    await asyncio.gather(heart, *(agent.task for agent in agents if agent.task), return_exceptions=True)
    record_property("rss_bytes", rss_bytes(pid))  # type: ignore[operator]
    record_property("idle_cpu_share", share)  # type: ignore[operator]
    print(
        f"resident {rss_bytes(pid) / (1 << 20):.1f} MiB, idle CPU {share:.2%}, writes {after.commits - before.commits}"
    )
    assert dict(after.runners) == {"IDLE": APPS * RUNNERS_PER_APP}
    assert dict(after.nodes) == {"ready": NODES}
    assert after.commits == before.commits
    assert rss_bytes(pid) <= RSS_BYTES_MAX
    assert share <= CPU_SHARE_MAX


@pytest.mark.slow
def test_a_hundred_runners_at_rest(tmp_path: Path, record_property: object) -> None:
    init(tmp_path / "s")
    with scheduler(tmp_path / "s") as process:
        asyncio.run(measure(process, record_property))
