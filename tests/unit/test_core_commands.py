"""Bad input at the core: one clear error, nothing changed. And what a broken invariant does in production."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from core_world import World, spec_of
from engine_rig import Rig, deploy
from fal_contract.errors import Code, FalError
from fal_scheduler.core import starts, tokens
from fal_scheduler.core.events import (
    ApplyApp,
    ApplyPool,
    Confirm,
    CordonNode,
    CreateToken,
    DeleteApp,
    Event,
    Moment,
    RedeemToken,
    RevokeCaller,
    Revoked,
    RevokeNode,
    RevokeToken,
    ScaleApp,
    StopRunner,
)
from fal_scheduler.core.records import Pool, Runner, ScaleOverride, Spec
from fal_scheduler.engine import Engine, EngineOptions
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from virtual_time import run_virtually

SPEC, DIGEST = spec_of()


def _refused(world: World, event: Event) -> FalError:
    with pytest.raises(FalError) as failure:
        world.core.step(event, Moment(world.now_s, world.wall_s))
    return failure.value


@pytest.fixture
def world() -> World:
    """Two nodes and an app."""
    made = World(Random(1), nodes=2)
    made.step(ApplyApp("default/a", SPEC, DIGEST))
    return made


@pytest.mark.parametrize(
    ("event", "code", "says"),
    [
        (ApplyApp("default/a", SPEC, "other", 0), Code.CONFLICT, "does not exist yet"),
        (ApplyApp("default/a", SPEC, "other", 7), Code.CONFLICT, "generation 7"),
        (ApplyApp("default/b", SPEC, DIGEST, 1), Code.CONFLICT, "generation 0"),
        (ApplyApp("default/b", Spec("host", model="default/m"), "x"), Code.NOT_FOUND, "default/m"),
        (ApplyApp("default/b", Spec("host", loras=("default/l",)), "x"), Code.NOT_FOUND, "loras[0]"),
        (ApplyPool(Pool("east", zone="z9"), 7), Code.CONFLICT, "pool east"),
        (ScaleApp("default/x", ScaleOverride(min_concurrency=1)), Code.NOT_FOUND, "default/x"),
        (ScaleApp("default/a", ScaleOverride(min_concurrency=9)), Code.INVALID, "min_concurrency"),
        (ScaleApp("default/a", ScaleOverride(max_concurrency=10**6)), Code.INVALID, "max_concurrency"),
        (ScaleApp("default/a", ScaleOverride(keep_alive_s=-1.0)), Code.INVALID, "keep_alive"),
        (DeleteApp("default/x"), Code.NOT_FOUND, "default/x"),
        (StopRunner("default/x-1"), Code.NOT_FOUND, "default/x-1"),
        (CordonNode("nowhere", True), Code.NOT_FOUND, "nowhere"),
        (RevokeNode("nowhere"), Code.NOT_FOUND, "nowhere"),
        (RevokeCaller("node/n-0"), Code.INVALID, "names no person"),
        (RevokeCaller("ada"), Code.INVALID, "names no person"),
        (RevokeCaller("admin/ada", actor="admin/ada"), Code.INVALID, "yourself"),
        (RevokeToken("nothing"), Code.NOT_FOUND, "nothing"),
        (RedeemToken("t-east", "wrong", "n-9", "x"), Code.UNAUTHENTICATED, "not known"),
        (RedeemToken("t-none", "secret", "n-9", "x"), Code.UNAUTHENTICATED, "not known"),
        (Confirm("everything"), Code.INVALID, "everything"),
    ],
)
def test_bad_input_is_refused_with_a_remedy_and_changes_nothing(
    world: World, event: Event, code: Code, says: str
) -> None:
    apps, nodes = dict(world.state.apps), dict(world.state.nodes)
    error = _refused(world, event)
    assert error.code is code
    assert says in error.what
    assert error.remedy
    assert (world.state.apps, world.state.nodes) == (apps, nodes)
    world.check()


def test_a_token_is_refused_when_expired_revoked_or_used_up(world: World) -> None:
    def redeem(node_id: str) -> RedeemToken:
        return RedeemToken("tk", "s", node_id, node_id)

    now_s = world.wall_s
    token = tokens.create("tk", "s", pool="east", ttl_s=60.0, uses=1, created_by="op", now_s=now_s)
    world.step(CreateToken(token))
    assert world.step(redeem("n-10")) is not None
    assert "used up" in _refused(world, redeem("n-11")).what
    world.step(RevokeToken("tk"))
    assert "revoked" in _refused(world, redeem("n-11")).what
    late = tokens.create("late", "s", pool="east", ttl_s=60.0, uses=1, created_by="op", now_s=now_s)
    world.step(CreateToken(late))
    world.now_s += 61.0
    assert "expired" in _refused(world, RedeemToken("late", "s", "n-12", "x")).what
    assert set(world.state.nodes) == {"n-0", "n-1", "n-10"}


def test_an_app_that_is_being_deleted_takes_no_deploy(world: World) -> None:
    world.step(DeleteApp("default/a"))
    assert _refused(world, ApplyApp("default/a", SPEC, "x")).code is Code.FAILED_PRECONDITION


def test_a_caller_is_revoked_for_what_was_issued_until_now(world: World) -> None:
    for reason in ("left", "left again"):
        world.now_s += 10.0
        outcome = world.step(RevokeCaller("serving/gw-1", reason, actor="admin/ada"))
        assert outcome is not None
        assert Revoked("serving/gw-1") in outcome.effects
        (made,) = world.state.revocations.values()
        assert (made.subject, made.revoked_at_s, made.reason) == ("serving/gw-1", world.wall_s, reason)


def test_a_revoked_node_is_emptied_and_its_runners_are_replaced() -> None:
    world = World(Random(1), nodes=4)
    world.step(ApplyApp("default/a", SPEC, DIGEST))
    (before,) = world.state.runners.values()
    world.step(RevokeNode(before.node, "stolen", actor="op"))
    (after,) = world.state.runners.values()
    assert after.id != before.id
    assert after.node != before.node


def test_a_broken_invariant_refuses_the_batch_freezes_and_leaves_the_process_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug promises one GPU to everybody; production refuses the deploy and goes on for others."""

    async def go() -> None:
        rig = Rig()
        options = EngineOptions("c1", tmp_path / "events")
        rig.engine = Engine(rig.store, clock=rig.clock, rng=Random(7), options=options)
        await rig.found(1)
        await rig.engine.submit(deploy("default/good"))
        taken = next(iter(rig.engine.view.runners.values())).gpus

        placed = starts.placed

        def greedy(*args: object) -> Runner | None:
            found = placed(*args)  # type: ignore[arg-type]
            return replace(found, gpus=taken) if found is not None else None

        with monkeypatch.context() as patch:
            patch.setattr(starts, "placed", greedy)
            with pytest.raises(FalError) as failure:
                await rig.engine.submit(deploy("default/bad"))
        assert failure.value.code is Code.INVARIANT
        assert "default/bad" not in rig.engine.view.apps
        assert {kind for kind, _ in rig.engine.view.alarms} == {"INVARIANT"}
        assert taken[0] in str(rig.engine.view.frozen.values())
        replay = json.loads(next((tmp_path / "events").glob("replay-*.json")).read_text())
        assert replay["violations"][0]["rule"] == "gpu-once"
        assert (await rig.engine.submit(deploy("default/other"))).outcome == "created"
        assert len(rig.engine.assignments("n-0")) == 2
        await rig.engine.stop()

    run_virtually(go())


def test_events_are_numbered_across_restarts_and_survive_a_torn_line(tmp_path: Path) -> None:
    async def go() -> None:
        rig = Rig(MemoryBackend())
        store = MemoryStore(rig.backend)
        options = EngineOptions("c1", tmp_path / "events", strict=True)
        numbers = []
        for _ in range(2):
            engine = Engine(store, clock=rig.clock, rng=Random(1), options=options)
            await engine.start("x")
            await engine.submit(ApplyPool(Pool("p", zone=str(len(numbers)))))
            numbers.append(engine.events.last_number)
            assert engine.events.since(numbers[-1] - 1, subject="p")
            await engine.stop()
            with (tmp_path / "events" / "events.jsonl").open("ab") as file:
                file.write(b'{"number":')
        assert numbers == [1, 2]

    run_virtually(go())


def test_a_running_deploy_survives_its_operator_going_away() -> None:
    """A cancelled submit is still done: the command was taken."""

    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        task = asyncio.create_task(rig.engine.submit(deploy()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(1.0)
        assert list(rig.engine.view.apps) == ["default/a"]
        assert len(rig.engine.assignments("n-0")) == 1
        await rig.engine.stop()

    run_virtually(go())
