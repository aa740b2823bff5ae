"""Drains, labels, removal, lost pools, quotas and usage by the operators' API over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2 as pb
from fal_scheduler.api import apps, nodes, quotas, usage
from fal_scheduler.leadership import Leadership
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, ready


def test_a_node_is_drained_labelled_and_removed(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            for name in ("n1", "n2"):
                await join(leader, name)
            async with Agent(leader, "n1"), Agent(leader, "n2"):
                await apps.apply_app(leader, app_request(runners=2), ACTOR)
                await eventually(lambda: ready(leader) == 2)
                node = next(iter(leader.view.runners.values())).node
                view = await nodes.drain_node(leader, pb.DrainNodeRequest(node=node, reason="fan"), ACTOR)
                assert (view.node.drain.kind, view.node.drain.reason, view.node.cordoned) == ("drain", "fan", True)
                await eventually(lambda: not leader.view.runners_by_node.get(node))
                await eventually(lambda: leader.view.nodes[node].drain is None)
                assert ready(leader) == 2
                request = pb.LabelNodeRequest(node=node, put={"disk": "nvme"})
                assert (await nodes.label_node(leader, request, ACTOR)).node.labels == {"disk": "nvme"}
                reply = await nodes.remove_node(leader, pb.RemoveNodeRequest(node=node), ACTOR)
                assert (reply.node, reply.runners) == (node, 0)
                assert node not in leader.view.nodes
            found = usage.get_usage(leader, pb.GetUsageRequest(since_s=1.0))
            assert {row.app for row in found.rows} <= {"t/a"}
            listed = usage.get_usage(leader, pb.GetUsageRequest(since_s=1.0, details=True))
            assert not listed.more

    asyncio.run(body())


def test_quotas_are_set_listed_and_taken_away(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1"):
                view = await quotas.set_quota(leader, pb.SetQuotaRequest(team="t", gpu_milli=1000), ACTOR)
                assert view.quota.gpu_milli == 1000
                await apps.apply_app(leader, app_request(runners=2), ACTOR)
                await eventually(lambda: ready(leader) == 2)
                [view] = quotas.list_quotas(leader, pb.ListQuotasRequest()).quotas
                assert (view.held_gpu_milli, view.borrowed_gpu_milli) == (2000, 1000)
                view = await quotas.unset_quota(leader, pb.UnsetQuotaRequest(team="t"), ACTOR)
                assert not view.HasField("quota")

    asyncio.run(body())


Call = Callable[[Leadership], Awaitable[object]]


async def _now(found: object) -> object:
    return found


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda x: nodes.drain_node(x, pb.DrainNodeRequest(node="none"), ACTOR), Code.NOT_FOUND),
        (lambda x: nodes.drain_node(x, pb.DrainNodeRequest(node="n1", kind="explode"), ACTOR), Code.INVALID),
        (lambda x: nodes.drain_node(x, pb.DrainNodeRequest(node="n1", deadline_s=-1.0), ACTOR), Code.INVALID),
        (lambda x: nodes.label_node(x, pb.LabelNodeRequest(node="n1", put={"": "x"}), ACTOR), Code.INVALID),
        (lambda x: nodes.label_node(x, pb.LabelNodeRequest(node="n1", put={"a b": "x"}), ACTOR), Code.INVALID),
        (lambda x: nodes.remove_node(x, pb.RemoveNodeRequest(node="none"), ACTOR), Code.NOT_FOUND),
        (lambda x: nodes.declare_lost(x, pb.DeclareLostRequest(pool="none"), ACTOR), Code.NOT_FOUND),
        (lambda x: quotas.set_quota(x, pb.SetQuotaRequest(team="A!", gpu_milli=1), ACTOR), Code.INVALID),
        (lambda x: quotas.unset_quota(x, pb.UnsetQuotaRequest(team="t"), ACTOR), Code.NOT_FOUND),
        (lambda x: _now(quotas.list_quotas(x, pb.ListQuotasRequest(team="t"))), Code.NOT_FOUND),
        (lambda x: _now(usage.get_usage(x, pb.GetUsageRequest(since_s=9e9))), Code.INVALID),
    ],
)
def test_wrong_input_is_refused_with_a_remedy(tmp_path: Path, call: Call, code: Code) -> None:
    async def body() -> FalError:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            with pytest.raises(FalError) as refused:
                await call(leader)
            return refused.value

    error = asyncio.run(body())
    assert error.code is code
    assert error.remedy
