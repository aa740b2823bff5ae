"""What operators read of runners and apps: each text names what is waited for and what ends the wait."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import app_view
from fal_scheduler.core.events import ApplyApp, CordonNode, DeleteApp, RevokeNode, ScaleApp
from fal_scheduler.core.records import Runner, RunnerState, ScaleOverride
from fal_scheduler.core.told import Health, RunnerStatus
from fal_scheduler.core.views import app_reason, failed_text, runner_phase
from falctl import waiting

SPEC, DIGEST = spec_of(least=1)
APP = "default/a"


def _with_a_lost_runner() -> tuple[World, Runner]:
    """An app whose only runner is on a node that has been silent for long."""
    world = World(Random(1), nodes=4)
    world.step(ApplyApp(APP, SPEC, DIGEST))
    world.heal()
    (runner,) = world.state.runners.values()
    world.step(DeleteApp(APP))  # the node does not hear of it
    world.cut(runner.node)
    return world, world.state.runners[runner.id]


def _silent_until(world: World, node: str, health: Health) -> None:
    for _ in range(200):
        if world.state.health_of(node) is health:
            return
        world.tick(1.0)
    raise AssertionError(f"{node} is {world.state.health_of(node)}")


def test_deleting_an_app_names_the_lost_node_and_revoking_it_releases_the_app() -> None:
    world, runner = _with_a_lost_runner()
    name = world.state.nodes[runner.node].name
    assert app_reason(world.state, world.state.apps[APP]) == "its runners are being stopped"
    _silent_until(world, runner.node, Health.UNKNOWN)
    assert f"waits for {name} (unknown)" in app_reason(world.state, world.state.apps[APP])
    reason = runner_phase(world.state, runner).reason
    assert f"its node {name} is silent" in reason
    assert "revoke" not in reason, "a short silence is no reason to give a node up"
    _silent_until(world, runner.node, Health.LOST)
    for text in (app_reason(world.state, world.state.apps[APP]), runner_phase(world.state, runner).reason):
        assert name in text
        assert f"falctl node revoke {name}" in text
    world.step(RevokeNode(runner.node, "gone for good", actor="op"))
    world.settle()
    assert APP not in world.state.apps


def test_waiting_for_the_end_of_an_app_tells_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world, runner = _with_a_lost_runner()
    _silent_until(world, runner.node, Health.LOST)

    def unary(method: str, request: cluster_pb2.GetAppRequest) -> cluster_pb2.AppView:
        assert (method, request.id) == ("GetApp", APP)
        return app_view(world.state, world.state.apps[APP])

    monkeypatch.setattr(waiting, "unary", unary)
    with pytest.raises(FalError) as error:
        waiting.wait_until_gone(APP, timeout_s=0.0)
    assert error.value.code is Code.TIMEOUT
    assert f"falctl node revoke {world.state.nodes[runner.node].name}" in error.value.what


def test_what_fits_nowhere_says_how_many_nodes_refuse_for_which_reason() -> None:
    world = World(Random(1), nodes=4)
    for node in list(world.state.nodes.values())[:3]:
        world.step(CordonNode(node.id, True, "fan"))
    world.step(ApplyApp(APP, spec_of(least=8)[0], DIGEST))
    world.settle()
    reason = app_reason(world.state, world.state.apps[APP])
    assert "none of 4 nodes can take it (3 cordoned, 1 gpu-free); closest: " in reason


def test_a_draining_runner_says_how_many_requests_it_finishes() -> None:
    world = World(Random(1), nodes=2)
    world.step(ApplyApp(APP, SPEC, DIGEST))
    world.heal()
    (runner,) = world.state.runners.values()
    live = world.state.live[runner.node]
    world.step(ScaleApp(APP, ScaleOverride(min_concurrency=0), actor="op"))
    for in_flight, words in ((0, ""), (1, "finishes 1 request; "), (3, "finishes 3 requests; ")):
        live.statuses[runner.id] = replace(live.statuses[runner.id], in_flight=in_flight)
        phase = runner_phase(world.state, world.state.runners[runner.id])
        assert (phase.state, phase.reason) == (RunnerState.DRAINING, f"{words}{APP} should have 0 runners now")


@pytest.mark.parametrize(
    ("count", "last", "text"),
    [
        (1, RunnerStatus("t/a-1", RunnerState.TERMINATED, exit_code=3), "failed: exit code 3"),
        (2, RunnerStatus("t/a-1", RunnerState.TERMINATED, reason="boom"), "failed 2 times in a row; last: boom"),
        (1, RunnerStatus("t/a-1", RunnerState.TERMINATED), "failed: it ended"),
    ],
)
def test_how_often_an_app_failed(count: int, last: RunnerStatus, text: str) -> None:
    assert failed_text(count, last) == text
