"""What `falctl plan` and `falctl explain` are told by a real engine: nothing changes, causes have remedies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2
from fal_scheduler.api import apps, explain, nodes, plans
from fal_scheduler.core.snapshot import fingerprints
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, ready


def asked(*requests: pb.ApplyAppRequest) -> pb.PlanRequest:
    return pb.PlanRequest(items=[pb.PlanItem(app=request) for request in requests])


def test_a_plan_says_what_would_start_roll_and_wait_and_changes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1"):
                [item] = (await plans.plan(leader, asked(app_request(runners=2)))).items
                assert (item.kind, item.name, item.outcome, list(item.changes)) == ("app", "t/a", "created", [])
                assert [one.node_id for one in item.starts] == ["n1", "n1"]
                assert not leader.view.apps
                await apps.apply_app(leader, app_request(runners=2), ACTOR)
                await eventually(lambda: ready(leader) == 2 and leader.view.apps["t/a"].rollout is None)
                before = fingerprints(leader.view)
                [same] = (await plans.plan(leader, asked(app_request(runners=2)))).items
                assert (same.outcome, list(same.starts)) == ("unchanged", [])
                [item] = (await plans.plan(leader, asked(app_request(runners=2, env={"X": "1"})))).items
                assert (item.outcome, item.rollout) == ("changed", "rolling from revision 1 to 2")
                assert [(one.field, one.before, one.after) for one in item.changes] == [("env.X", "", "1")]
                assert len(item.starts) == 1, "a step of the rollout"
                [item] = (await plans.plan(leader, asked(app_request(name="b", num_gpus=16)))).items
                assert item.starts[0].reason.startswith("no node has 16 such GPUs")
                pool = state_pb2.Pool(name="spot", cloud="metal", spot=True, zone="z9")
                pool_item = pb.PlanItem(pool=pb.ApplyPoolRequest(pool=pool))
                reply = await plans.plan(leader, pb.PlanRequest(items=[pool_item]))
                assert (reply.items[0].kind, reply.items[0].outcome) == ("pool", "created")
                after = fingerprints(leader.view)
                kept = ("pools", "nodes", "apps", "revisions", "runners", "waiting", "alarms", "quotas", "usage")
                assert {name: before[name] for name in kept} == {name: after[name] for name in kept}

    asyncio.run(body())


def test_a_plan_that_would_be_refused_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            for request, code in (
                (pb.PlanRequest(), Code.INVALID),
                (pb.PlanRequest(items=[pb.PlanItem()]), Code.INVALID),
                (asked(app_request(model="none")), Code.NOT_FOUND),
                (asked(app_request(expected=7)), Code.CONFLICT),
            ):
                with pytest.raises(FalError) as refused:
                    await plans.plan(leader, request)
                assert refused.value.code is code
                assert refused.value.remedy

    asyncio.run(body())


def test_an_explanation_names_wants_terms_parts_and_the_smallest_change(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1"):
                await apps.apply_app(leader, app_request(runners=1), ACTOR)
                await eventually(lambda: ready(leader) == 1)
                found = explain.explain(leader, pb.ExplainRequest(subject="t/a", kind="app"))
                assert any(line.startswith("wants 1: ") for line in found.lines)
                assert found.verdicts[0].feasible
                assert "ready_ms" in found.verdicts[0].why
                assert not found.admissions
                runner = next(iter(leader.view.runners))
                found = explain.explain(leader, pb.ExplainRequest(subject=runner))
                assert any("placed on n1" in line for line in found.lines)
                assert found.parts[-1].name == "total"
                assert found.parts[-1].actual_ms >= 0
                found = explain.explain(leader, pb.ExplainRequest(subject="t/a", kind="request"))
                assert "0 requests wait" in found.summary
                await nodes.cordon_node(leader, pb.CordonNodeRequest(node="n1", cordon=True), ACTOR)
                await apps.apply_app(leader, app_request(name="b"), ACTOR)
                found = explain.explain(leader, pb.ExplainRequest(subject="t/b"))
                assert found.admissions[0].text == "uncordon name-n1"
                assert found.admissions[0].command == "falctl node uncordon name-n1"

    asyncio.run(body())


@pytest.mark.parametrize(
    ("subject", "kind", "code"),
    [
        ("t/none", "", Code.NOT_FOUND),
        ("t/none", "app", Code.NOT_FOUND),
        ("none", "node", Code.NOT_FOUND),
        ("t/none", "request", Code.NOT_FOUND),
        ("t/none", "thing", Code.INVALID),
    ],
)
def test_what_is_not_there_is_not_explained(tmp_path: Path, subject: str, kind: str, code: Code) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            with pytest.raises(FalError) as refused:
                explain.explain(leader, pb.ExplainRequest(subject=subject, kind=kind))
            assert refused.value.code is code
            assert refused.value.remedy

    asyncio.run(body())
