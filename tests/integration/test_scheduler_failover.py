"""Two schedulers on one etcd: one leads, the other answers NOT_LEADER and takes over when the first is killed."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from etcd_server import EtcdServer
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2
from scheduler_process import Process, RemoteAgent, cluster, init, joined, node_ready, ready, scheduler
from scheduler_rig import app_request


async def status(process: Process) -> cluster_pb2.ClusterStatus:
    async with cluster(process) as stub:
        return await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)


@pytest.mark.etcd
@pytest.mark.slow
def test_a_standby_takes_over_and_stops_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "s", tmp_path / "two" / "s"
    init(first)
    shutil.copytree(first, second)  # the same CA and seal key, as an operator gives them to every scheduler

    async def deploy(leader: Process, standby: Process) -> tuple[RemoteAgent, int]:
        with pytest.raises(FalError) as caught:
            await status(standby)
        assert caught.value.code is Code.NOT_LEADER
        assert caught.value.retryable
        agent = RemoteAgent(leader, await joined(leader, "alpha"))
        async with agent, cluster(leader) as stub:
            await node_ready(stub)
            await stub.ApplyApp(app_request(runners=2), timeout=10)
            await ready(stub, "t/a", 2)
            refused = RemoteAgent(standby, agent.own)
            refused.dial()
            assert refused.task is not None
            with pytest.raises(FalError) as caught:
                await asyncio.wait_for(refused.task, 10)
            assert caught.value.code is Code.NOT_LEADER
        return agent, (await status(leader)).term

    async def take_over(standby: Process, old: RemoteAgent, term: int) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    now = await status(standby)
                except FalError as error:
                    assert error.code is Code.NOT_LEADER  # noqa: PT017  (polled until it leads)
                    await asyncio.sleep(0.2)
                else:
                    break
        assert now.term == term + 1
        agent = RemoteAgent(standby, old.own)
        agent.statuses = dict(old.statuses)
        async with agent, cluster(standby) as stub:
            await ready(stub, "t/a", 2)
            assert set(agent.held) == set(old.statuses)
            assert {held.goal for held in agent.held.values()} == {1}
            assert {held.term for held in agent.held.values()} == {term}  # assignments of the old leader stand

    with EtcdServer(tmp_path / "etcd") as etcd:
        args = ("--store", "etcd", "--etcd-endpoints", etcd.endpoint)
        with scheduler(first, *args) as leader, scheduler(second, *args) as standby:
            agent, term = asyncio.run(deploy(leader, standby))
            leader.end(signal.SIGKILL)
            asyncio.run(take_over(standby, agent, term))


@pytest.mark.etcd
@pytest.mark.slow
def test_a_leader_that_lost_its_store_leads_again_when_the_store_is_back(tmp_path: Path) -> None:
    data = tmp_path / "s"
    init(data)

    async def leads(process: Process, term_min: int) -> int:
        async with asyncio.timeout(90):
            while True:
                try:
                    now = await status(process)
                except FalError as error:
                    assert error.code in (Code.NOT_LEADER, Code.UNAVAILABLE)  # noqa: PT017  (polled until it leads)
                else:
                    if now.term >= term_min:
                        return now.term
                await asyncio.sleep(0.2)

    async def deposed(process: Process) -> None:
        async with asyncio.timeout(90):
            while True:
                try:
                    await status(process)
                except FalError as error:
                    assert error.code is Code.NOT_LEADER  # noqa: PT017
                    return
                await asyncio.sleep(0.2)

    with (
        EtcdServer(tmp_path / "etcd") as etcd,
        scheduler(data, "--store", "etcd", "--etcd-endpoints", etcd.endpoint) as process,
    ):
        term = asyncio.run(leads(process, 1))
        etcd.kill()
        asyncio.run(deposed(process))
        etcd.restart()
        assert asyncio.run(leads(process, term + 1)) > term
        assert process.popen.poll() is None
