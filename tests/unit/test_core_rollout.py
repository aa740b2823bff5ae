"""A revision takes over from another: in steps, by canary, paused, promoted, and back again when it fails."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from core_world import World, spec_of
from fal_contract.errors import Code, FalError
from fal_scheduler.core.events import ApplyApp, CordonNode, DeleteApp, Moment, ScaleApp
from fal_scheduler.core.records import App, Goal, RolloutPolicy, Runner, RunnerState, ScaleOverride
from fal_scheduler.core.rollout import canaries
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from fal_scheduler.core.views import app_reason

APP = "default/a"


class Fleet:
    """A world in which runners of revisions in `broken` crash when they are set up."""

    def __init__(self, *, nodes: int = 6) -> None:
        self.world = World(Random(1), nodes=nodes)
        self.broken: set[int] = set()
        self.stuck: set[int] = set()

    def apply(
        self, tag: str, policy: RolloutPolicy = RolloutPolicy(), *, least: int = 4, gpus: int = 1, memory_gib: int = 1
    ) -> None:
        spec, _ = spec_of(gpus=gpus, least=least, most=8, tag=tag, memory_gib=memory_gib)
        self.world.step(ApplyApp(APP, replace(spec, rollout=policy), f"{tag}-{policy}"))

    @property
    def app(self) -> App:
        return self.world.state.apps[APP]

    def runners(self, revision: int = 0) -> list[Runner]:
        state = self.world.state
        found = [state.runners[id_] for id_ in state.runners_by_app.get(APP, ())]
        return [one for one in found if revision in (0, one.revision)]

    def serving(self, revision: int = 0) -> int:
        state = self.world.state
        ready = [
            one for one in self.runners(revision) if one.goal is Goal.RUN and (s := state.status_of(one)) and s.serves
        ]
        return len(ready)

    def round(self) -> None:
        """Agents hear what they should run, come a phase further, tell; a second passes."""
        world = self.world
        world.settle()
        for node_id, node in world.nodes.items():
            world.deliver(node_id)
            for runner_id in list(node.containers):
                status = node.containers[runner_id]
                if status.revision in self.broken and status.state is RunnerState.SETUP:
                    node.crash(runner_id)
                elif status.state is not RunnerState.IDLE and status.revision not in self.stuck:
                    node.advance(runner_id)
            world.report(node_id)
        world.tick(1.0)

    def rounds(self, count: int, *, least: int = 0, most: int = 99) -> None:
        for _ in range(count):
            self.round()
            assert self.serving() >= least, [(one.revision, one.goal) for one in self.runners()]
            wanting = [one for one in self.runners() if one.goal is Goal.RUN]
            assert len(wanting) <= most, wanting


def serving_four(policy: RolloutPolicy = RolloutPolicy(), *, nodes: int = 6) -> Fleet:
    fleet = Fleet(nodes=nodes)
    fleet.apply("one", policy)
    fleet.rounds(12)
    assert (fleet.serving(1), fleet.app.rollout) == (4, None)
    return fleet


def test_rolling_never_has_fewer_and_goes_in_steps() -> None:
    fleet = serving_four()
    fleet.apply("two")
    assert fleet.app.rollout is not None
    assert len(fleet.runners(2)) == 1, "a quarter of four at once"
    fleet.rounds(40, least=4, most=5)
    assert (fleet.serving(2), len(fleet.runners()), fleet.app.rollout) == (4, 4, None)


def test_a_large_share_rolls_at_once() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(max_disturbed_perc=100))
    assert len(fleet.runners(2)) == 4
    fleet.rounds(40, least=4, most=8)
    assert fleet.serving(2) == 4


def test_a_revision_that_cannot_be_placed_never_takes_down_the_one_that_serves() -> None:
    for policy in (RolloutPolicy(), RolloutPolicy(strategy="recreate"), RolloutPolicy(canary_perc=50)):
        fleet = serving_four()
        fleet.apply("two", policy, gpus=16)
        fleet.rounds(30, least=4)
        assert fleet.serving(1) == 4
        assert fleet.app.revision == 2


def test_a_recreate_begins_only_where_its_own_runners_make_the_place_and_is_tried_again_when_one_is_there() -> None:
    fleet = Fleet(nodes=1)
    fleet.apply("one", least=1)
    fleet.rounds(12)
    policy = RolloutPolicy(strategy="recreate")
    fleet.apply("more memory than any node has", policy, least=1, memory_gib=4096)
    fleet.rounds(10, least=1)
    spec, digest = spec_of(least=1)
    fleet.world.step(ApplyApp("default/neighbour", spec, digest))
    fleet.rounds(5, least=1)
    fleet.apply("as many GPUs as the neighbour leaves no place for", policy, least=1, gpus=2)
    fleet.rounds(10, least=1)
    assert fleet.app.rollout is not None
    fleet.world.step(DeleteApp("default/neighbour"))
    fleet.rounds(30)
    assert (fleet.serving(3), fleet.app.rollout) == (1, None)


def test_a_recreate_that_is_not_begun_says_why_and_begins_when_a_place_is_there() -> None:
    fleet = serving_four(nodes=2)
    state = fleet.world.state
    fleet.world.step(CordonNode("n-1", True))
    fleet.rounds(5)
    spec, _ = spec_of(gpus=4, least=1, tag="two")
    spec = replace(spec, rollout=RolloutPolicy(strategy="recreate"))
    fleet.world.step(ApplyApp(APP, spec, "two"))
    fleet.rounds(20, least=1)
    assert app_reason(state, fleet.app).startswith("revision 2 is not begun: ")
    began_s = fleet.world.now_s
    fleet.world.step(CordonNode("n-1", False))
    fleet.world.tick(1.0)
    assert {one.goal for one in fleet.runners(1)} == {Goal.DRAIN}, "at the next tick"
    assert fleet.world.now_s == began_s + 1.0
    assert not state.pending
    fleet.rounds(20)
    assert (fleet.serving(2), fleet.app.rollout) == (1, None)


def test_while_a_recreate_is_not_begun_the_revision_that_serves_is_kept_like_any_other() -> None:
    fleet = serving_four()
    state = fleet.world.state
    fleet.apply("two", RolloutPolicy(strategy="recreate"), gpus=16)
    fleet.rounds(5, least=4)
    victim = fleet.runners(1)[0]
    fleet.world.nodes[victim.node].crash(victim.id)
    fleet.rounds(5, least=3)
    assert APP in state.backoffs
    assert app_reason(state, fleet.app).startswith("revision 2 is not begun: "), "which the backoff is no reason of"
    fleet.rounds(45, least=3)
    assert (fleet.serving(1), fleet.runners(2)) == (4, [])
    fleet.world.step(ScaleApp(APP, ScaleOverride(min_concurrency=6)))
    fleet.rounds(20, least=4)
    assert (fleet.serving(1), fleet.runners(2)) == (6, [])


def test_what_a_recreate_waited_for_is_forgotten_when_it_is_aborted() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(strategy="recreate"), gpus=16)
    fleet.rounds(5, least=4)
    assert (APP, 2) in fleet.world.state.pending
    fleet.world.step(SetRollout(APP, "abort"))
    fleet.rounds(5, least=4)
    assert not fleet.world.state.pending


def test_recreate_stops_first_and_starts_then() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(strategy="recreate"))
    assert {one.goal for one in fleet.runners(1)} == {Goal.DRAIN}
    assert not fleet.runners(2)
    for _ in range(30):
        fleet.round()
        assert not (fleet.runners(1) and fleet.runners(2)), "never both"
    assert (fleet.serving(2), fleet.app.rollout) == (4, None)


def test_a_failing_revision_is_rolled_back_and_nobody_watches() -> None:
    fleet = serving_four()
    fleet.broken = {2}
    fleet.apply("two")
    fleet.rounds(120, least=4)
    assert (fleet.app.revision, fleet.app.rollout) == (1, None)
    assert (fleet.serving(1), len(fleet.runners(2))) == (4, 0)
    assert "revision 2 failed 2 times" in fleet.world.state.alarms["ROLLED_BACK", APP].message
    fleet.broken = set()
    fleet.apply("three")
    assert fleet.app.revision == 3, "numbers are never used twice"
    fleet.rounds(40, least=4)
    assert fleet.serving(3) == 4
    assert ("ROLLED_BACK", APP) not in fleet.world.state.alarms


def test_one_that_never_serves_is_rolled_back_at_its_deadline() -> None:
    fleet = serving_four()
    fleet.stuck = {2}
    fleet.apply("two", RolloutPolicy(deadline_s=20.0))
    fleet.rounds(15, least=4)
    assert fleet.app.revision == 2
    fleet.rounds(20, least=4)
    assert (fleet.app.revision, fleet.serving(1)) == (1, 4)


def test_its_deadline_counts_from_the_last_runner_that_became_ready() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(deadline_s=15.0))
    began_s = fleet.world.wall_s
    seen = 0
    while fleet.app.rollout is not None and fleet.app.rollout.phase == "rolling":
        fleet.stuck = {2}
        fleet.rounds(6, least=4)  # one after the other: each takes its time, and four of them more than the deadline
        fleet.stuck = set()
        while fleet.app.rollout is not None and fleet.serving(2) == seen:
            fleet.rounds(1, least=4)
        seen = fleet.serving(2)
    assert (fleet.app.revision, fleet.serving(2), fleet.app.rollout) == (2, 4, None)
    assert fleet.world.wall_s - began_s > 2 * 15.0


def test_one_that_gets_stuck_halfway_goes_back_when_the_deadline_of_its_last_progress_is_over() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(deadline_s=20.0))
    while fleet.serving(2) < 2:
        fleet.rounds(1, least=4)
    fleet.stuck = {2}
    assert fleet.app.rollout is not None
    assert fleet.app.rollout.progress_at_s > fleet.app.rollout.began_at_s
    while fleet.app.revision == 2:
        fleet.rounds(1, least=4)
    assert fleet.app.rollout is not None
    assert fleet.app.rollout.reason == "revision 2 does not serve: 2 of 4 runners, and no other in 20 s"
    assert fleet.world.wall_s >= fleet.app.rollout.progress_at_s + 20.0
    fleet.stuck = set()
    fleet.rounds(40, least=4)
    assert (fleet.serving(1), fleet.app.rollout) == (4, None)


def test_without_rollback_it_stays_and_says_so() -> None:
    fleet = serving_four()
    fleet.broken = {2}
    fleet.apply("two", RolloutPolicy(no_rollback=True))
    fleet.rounds(120, least=4)
    assert fleet.app.revision == 2
    assert ("ROLLOUT_FAILED", APP) in fleet.world.state.alarms
    fleet.world.step(SetRollout(APP, "abort", "ada"))
    fleet.rounds(20, least=4)
    assert (fleet.app.revision, fleet.app.rollout, fleet.serving(1)) == (1, None, 4)


def test_a_canary_has_its_share_until_it_is_promoted() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(canary_perc=25))
    fleet.rounds(30, least=4, most=5)
    assert (fleet.serving(1), fleet.serving(2)) == (3, 1)
    fleet.world.step(ScaleApp(APP, ScaleOverride(min_concurrency=8)))
    fleet.rounds(30, least=4)
    assert (fleet.serving(1), fleet.serving(2)) == (6, 2), "both are scaled"
    fleet.world.step(SetRollout(APP, "promote"))
    fleet.rounds(60, least=8)
    assert (fleet.serving(2), len(fleet.runners(1)), fleet.app.rollout) == (8, 0, None)


def test_old_runners_are_replaced_while_a_canary_lasts_also_where_the_new_one_waits_after_a_crash() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(canary_perc=25))
    fleet.rounds(30, least=4)
    state = fleet.world.state
    [canary] = fleet.runners(2)
    fleet.world.nodes[canary.node].crash(canary.id)
    victim = fleet.runners(1)[0]
    fleet.world.nodes[victim.node].crash(victim.id)
    fleet.world.report(canary.node)
    fleet.world.report(victim.node)
    assert APP in state.backoffs
    fleet.rounds(45)
    assert fleet.serving(1) == 3
    assert fleet.serving(2) == 1


def test_a_canary_that_holds_is_promoted_by_itself_and_one_that_fails_is_not() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(canary_perc=25, canary_hold_s=30.0))
    fleet.rounds(25, least=4)
    assert fleet.serving(2) == 1
    fleet.rounds(80, least=4)
    assert (fleet.serving(2), fleet.app.rollout) == (4, None)
    fleet.broken = {3}
    fleet.apply("three", RolloutPolicy(canary_perc=25, canary_hold_s=30.0))
    fleet.rounds(150, least=4)
    assert (fleet.app.revision, fleet.serving(2)) == (2, 4)


def test_pause_and_resume() -> None:
    fleet = serving_four()
    fleet.apply("two")
    while fleet.serving(2) < 2:
        fleet.round()
    fleet.world.step(SetRollout(APP, "pause"))
    fleet.rounds(30, least=4)
    assert fleet.serving(1) + fleet.serving(2) == 4
    assert fleet.serving(1) >= 1
    fleet.world.step(SetRollout(APP, "resume"))
    fleet.rounds(40, least=4)
    assert fleet.serving(2) == 4


def test_one_that_was_paused_for_longer_than_its_deadline_goes_on_when_it_is_resumed() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(deadline_s=60.0))
    fleet.rounds(2, least=4)
    fleet.world.step(SetRollout(APP, "pause"))
    fleet.rounds(100, least=4)
    fleet.world.step(SetRollout(APP, "resume"))
    fleet.rounds(40, least=4)
    assert (fleet.serving(2), fleet.app.revision, fleet.app.rollout) == (4, 2, None)


def test_a_third_revision_comes_before_the_second_is_through_and_goes_back_to_the_first() -> None:
    fleet = serving_four()
    fleet.broken = {2, 3}
    fleet.apply("two")
    fleet.rounds(3, least=4)
    fleet.apply("three")
    assert fleet.app.rollout is not None
    assert fleet.app.rollout.from_revision == 1
    fleet.rounds(150, least=4)
    assert (fleet.app.revision, fleet.serving(1)) == (1, 4)


def test_an_older_revision_is_set_again() -> None:
    fleet = serving_four()
    fleet.apply("two")
    fleet.rounds(40)
    fleet.world.step(SetRevision(APP))
    assert fleet.app.revision == 1
    fleet.rounds(40, least=4)
    assert fleet.serving(1) == 4


def test_with_nothing_wanted_a_rollout_is_over_at_once() -> None:
    fleet = Fleet()
    fleet.apply("one", least=0)
    fleet.apply("two", least=0)
    assert (fleet.app.revision, fleet.app.rollout) == (2, None)


def test_a_new_leader_goes_on() -> None:
    fleet = serving_four()
    fleet.broken = {2}
    fleet.apply("two")
    fleet.rounds(3, least=4)
    rollout = fleet.app.rollout
    assert rollout is not None
    assert rollout.to_revision == 2
    assert list(fleet.world.state.rolling) == [APP]


@pytest.mark.parametrize(
    ("event", "code", "field"),
    [
        (SetRollout("default/none", "pause"), Code.NOT_FOUND, ""),
        (SetRollout(APP, "pause"), Code.FAILED_PRECONDITION, ""),
        (SetRollout(APP, "explode"), Code.INVALID, "action"),
        (SetRevision(APP, 9), Code.INVALID, "revision"),
        (SetRevision(APP), Code.INVALID, "revision"),
    ],
)
def test_wrong_commands_are_refused(event: SetRollout | SetRevision, code: Code, field: str) -> None:
    fleet = serving_four()
    before = fleet.app
    with pytest.raises(FalError) as refused:
        fleet.world.core.step(event, Moment(fleet.world.now_s, fleet.world.wall_s))
    assert refused.value.code is code
    assert field in ("", refused.value.field)
    assert fleet.app == before


def test_canaries_round_up() -> None:
    assert [canaries(wanted, 10) for wanted in (0, 1, 9, 10, 11, 20)] == [0, 1, 1, 1, 2, 2]


def test_an_app_in_a_rollout_can_be_deleted() -> None:
    fleet = serving_four()
    fleet.apply("two", RolloutPolicy(canary_perc=25))
    fleet.rounds(5)
    fleet.world.step(DeleteApp(APP))
    fleet.rounds(20)
    assert APP not in fleet.world.state.apps
    assert not fleet.world.state.rolling


def test_what_was_said_of_a_revision_that_nobody_waits_with_is_forgotten_and_a_deleted_app_leaves_no_alarm() -> None:
    fleet = serving_four()
    fleet.apply("huge", RolloutPolicy(deadline_s=10.0), gpus=64)
    fleet.rounds(5, least=4)
    state = fleet.world.state
    assert (APP, 2) in state.pending
    fleet.rounds(30, least=4)
    assert (fleet.app.revision, fleet.app.rollout) == (1, None)
    assert ("ROLLED_BACK", APP) in state.alarms
    assert not state.pending
    fleet.world.step(DeleteApp(APP))
    fleet.rounds(20)
    assert APP not in state.apps
    assert not state.alarms
