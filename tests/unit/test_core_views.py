"""What operators read of runners and apps: each text names what is waited for and what ends the wait."""

from __future__ import annotations

from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.views import app_view
from fal_scheduler.core.events import ApplyApp, DeleteApp, RevokeNode
from fal_scheduler.core.records import Runner
from fal_scheduler.core.told import Health
from fal_scheduler.core.views import app_reason, runner_phase
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
