"""Rollouts by the operators' API over a real engine: steered, listed, set back, and refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2, state_pb2
from fal_scheduler.api import apps, rollouts
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, ready


def test_a_canary_is_paused_promoted_listed_and_set_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1"):
                await apps.apply_app(leader, app_request(runners=2), ACTOR)
                await eventually(lambda: ready(leader) == 2 and leader.view.apps["t/a"].rollout is None)
                request = app_request(runners=2, env={"X": "1"})
                request.spec.rollout.CopyFrom(state_pb2.RolloutPolicy(canary_perc=50))
                await apps.apply_app(leader, request, ACTOR)

                def of(revision: int) -> int:
                    listed = rollouts.list_revisions(leader, cluster_pb2.ListRevisionsRequest(id="t/a"))
                    return next(one.ready for one in listed.revisions if one.revision.number == revision)

                await eventually(lambda: (of(1), of(2)) == (1, 1))
                steer = cluster_pb2.SteerRolloutRequest(id="t/a", action="pause")
                view = await rollouts.steer_rollout(leader, steer, ACTOR)
                assert (view.app.rollout.phase, view.app.rollout.paused) == ("canary", True)
                for action in ("resume", "promote"):
                    steer.action = action
                    view = await rollouts.steer_rollout(leader, steer, ACTOR)
                assert view.app.rollout.phase == "rolling"
                await eventually(lambda: of(2) == 2 and leader.view.apps["t/a"].rollout is None)
                view = await rollouts.set_revision(leader, cluster_pb2.SetRevisionRequest(id="t/a"), ACTOR)
                assert view.app.revision == 1
                await eventually(lambda: of(1) == 2)
                listed = rollouts.list_revisions(leader, cluster_pb2.ListRevisionsRequest(id="t/a")).revisions
                assert [(one.revision.number, one.current) for one in listed] == [(2, False), (1, True)]

    asyncio.run(body())


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await apps.apply_app(leader, app_request(runners=0), ACTOR)
            for request, code in (
                (cluster_pb2.SteerRolloutRequest(id="t/a", action="pause"), Code.FAILED_PRECONDITION),
                (cluster_pb2.SteerRolloutRequest(id="t/a", action="explode"), Code.INVALID),
                (cluster_pb2.SteerRolloutRequest(id="t/none", action="pause"), Code.NOT_FOUND),
            ):
                with pytest.raises(FalError) as refused:
                    await rollouts.steer_rollout(leader, request, ACTOR)
                assert refused.value.code is code, request
                assert refused.value.remedy
            with pytest.raises(FalError) as refused:
                await rollouts.set_revision(leader, cluster_pb2.SetRevisionRequest(id="t/a", revision=7), ACTOR)
            assert refused.value.field == "revision"
            with pytest.raises(FalError):
                rollouts.list_revisions(leader, cluster_pb2.ListRevisionsRequest(id="t/none"))

    asyncio.run(body())
