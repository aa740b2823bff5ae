"""Silence judged per failure domain, by the rules of the design (section 5, rule 3) and pitfall 18."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine_rig import Rig, deploy
from fal_contract.limits import FAILOVER_GRACE_S
from fal_scheduler.codec import encode
from fal_scheduler.core.events import ScaleApp
from fal_scheduler.core.liveness import UNKNOWN_AFTER_S, Silence, judge
from fal_scheduler.core.records import Goal, RunnerState, ScaleOverride, key_of
from fal_scheduler.core.told import Health
from virtual_time import run_virtually

LONG_S, SHORT_S = 61.0, 16.0


def silences(text: str, *, age_s: float = LONG_S, reached: str = "") -> list[Silence]:
    """ "aaA bB": a letter is a domain; a capital is a silent node. `reached` names silent nodes by index."""
    nodes = [letter for letter in text if letter != " "]
    return [
        Silence(f"{letter.lower()}{at}", letter.lower(), age_s if letter.isupper() else 1.0, str(at) in reached.split())
        for at, letter in enumerate(nodes)
    ]


@pytest.mark.parametrize(
    ("cluster", "lost"),
    [
        ("", 0),
        ("aaa", 0),
        ("A", 0),  # the only node: we may be cut off
        ("AAA", 0),
        ("AAA BBB", 0),  # silence everywhere
        ("Aa", 1),  # one of two is never most of a small domain
        ("aAA", 0),  # most of the only domain
        ("aaaaA", 1),
        ("aaaAA", 2),
        ("aaAAA", 0),  # most of the only domain, which is large
        ("aaAAA bbb", 3),  # another domain speaks
        ("AAAAA bbb", 5),  # a lost zone
        ("A b", 1),
        ("AAA B c", 4),
        ("aAA bBB", 0),  # no domain is a witness
    ],
)
def test_which_nodes_are_lost(cluster: str, lost: int) -> None:
    health = judge(silences(cluster))
    assert sum(one is Health.LOST for one in health.values()) == lost
    silent = sum(letter.isupper() for letter in cluster)
    assert sum(one is Health.UNKNOWN for one in health.values()) == silent - lost


def test_a_short_silence_is_unknown_and_a_reached_node_is_not_lost() -> None:
    assert set(judge(silences("aaA", age_s=SHORT_S)).values()) == {Health.READY, Health.UNKNOWN}
    assert judge(silences("aaA", age_s=UNKNOWN_AFTER_S))["a2"] is Health.READY
    assert judge(silences("aaA", reached="2"))["a2"] is Health.UNKNOWN
    assert judge(silences("aaA"))["a2"] is Health.LOST


def test_a_new_leader_scales_nothing_down_by_itself_for_five_minutes_but_obeys() -> None:
    async def go() -> None:
        rig = Rig()
        await rig.found(1)
        await rig.engine.submit(deploy(least=4))
        # The leader dies before it has drained what an operator does not want any more: two are left over.
        await rig.engine.stop()
        app = rig.engine.view.apps["default/a"]
        rig.backend.records[key_of(app)] = encode(
            replace(app, scale=ScaleOverride(min_concurrency=2), generation=app.generation + 1)
        )
        await rig.store.close()
        heir = Rig(rig.backend)
        await heir.engine.start("heir")
        await heir.hello("n-0")
        heir.tell(RunnerState.IDLE)
        for _ in range(int(FAILOVER_GRACE_S / 5.0) - 2):
            await asyncio.sleep(5.0)
            heir.heartbeat("n-0")
            assert {runner.goal for runner in heir.engine.view.runners.values()} == {Goal.RUN}
        await heir.engine.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=3)))
        assert _draining(heir) == 1, "an operator is obeyed at once"
        for _ in range(6):
            await asyncio.sleep(5.0)
            heir.heartbeat("n-0")
        await heir.engine.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=2)))
        assert _draining(heir) == 2
        await heir.engine.stop()

    run_virtually(go())


def _draining(rig: Rig) -> int:
    return sum(runner.goal is Goal.DRAIN for runner in rig.engine.view.runners.values())


def test_own_stalls_are_taken_off_every_silence() -> None:
    """The loop stands still for 100 s; nobody is UNKNOWN for it, though nobody was heard meanwhile."""

    async def go() -> None:
        rig = Rig()
        await rig.found(3)
        await asyncio.sleep(2.0)
        rig.clock_jump(100.0)
        await asyncio.sleep(3.0)
        assert rig.engine.statistics()["stall_s"] == pytest.approx(100.0, abs=2.0)
        assert {live.health for live in rig.engine.view.live.values()} == {Health.READY}
        await asyncio.sleep(14.0)
        assert {live.health for live in rig.engine.view.live.values()} == {Health.UNKNOWN}
        await rig.engine.stop()

    run_virtually(go())
