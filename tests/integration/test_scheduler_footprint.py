"""What a scheduler with 100 runners costs at rest: memory, CPU, store writes. Real process, real mutual TLS.

What is asserted finds a leak, a loop that spins, a write per heartbeat. The promised figures are those of
`ops/bench footprint`: they depend on the machine.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_contract.limits import HEARTBEAT_INTERVAL_S
from fal_contract.v1 import cluster_pb2
from scheduler_process import Process, RemoteAgent, cluster, init, joined, ready, scheduler
from scheduler_rig import app_request

if TYPE_CHECKING:
    from fal_contract.v1.cluster_pb2_grpc import ClusterAsyncStub

NODES, APPS, RUNNERS_PER_APP = 13, 10, 10
RSS_BYTES_MAX = 180 << 20
CPU_SHARE_MAX = 0.2
QUIET_LOOKS, LOOKS_MAX = 3, 60
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


async def settled(stub: ClusterAsyncStub) -> cluster_pb2.ClusterStatus:
    """The status once a few looks in a row saw no commit: those of the deploy and of what its nodes told are over."""
    last, same = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10), 0
    for _ in range(LOOKS_MAX):
        await asyncio.sleep(1)
        now = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)
        same = same + 1 if now.commits == last.commits else 0
        last = now
        if same == QUIET_LOOKS:
            return last
    raise AssertionError(f"{last.commits} commits, and more every second")


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
        before = await settled(stub)
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
