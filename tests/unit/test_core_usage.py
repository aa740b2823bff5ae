"""The ledger: every container once, whoever leads; folded by day without a loss; and what it costs."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_world import SimNode, World, records_of, spec_of
from fal_contract.limits import USAGE_CHECKPOINT_S, USAGE_DAYS_KEPT, USAGE_DETAILS_KEPT_S
from fal_scheduler.codec import encode
from fal_scheduler.core import usage
from fal_scheduler.core.events import ApplyApp, ApplyPool, DeleteApp, Moment, RevokeNode, ScaleApp, StopRunner, Tick
from fal_scheduler.core.records import Pool, RunnerState, ScaleOverride, key_of
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.core.usage_records import Usage, UsageRow
from fal_scheduler.core.work import Work
from fal_scheduler.recovery import recover

APP = "default/a"
DAY_S = 86_400.0


class Ledger:
    """A world whose nodes tell times and GPU seconds as agents do; `truth_ms` is what really ran."""

    def __init__(self, *, least: int = 2, gpus: int = 1, price_micros: int = 3_600_000) -> None:
        self.world = World(Random(1), nodes=2)
        for name, zone in (("east", "z1"), ("west", "z2")):
            self.world.step(ApplyPool(Pool(name, zone=zone, gpu_hour_price_micros=price_micros)))
        spec, digest = spec_of(gpus=gpus, least=least)
        self.world.step(ApplyApp(APP, spec, digest))
        self.started: dict[str, float] = {}
        for node in self.world.nodes.values():
            self._ends(node)
        self.truth: dict[str, float] = {}  # GPU milliseconds by assignment, as the nodes count them
        for _ in range(4):
            self.round(1.0)

    def round(self, seconds_s: float) -> None:
        """Nodes obey and tell; then time passes."""
        world = self.world
        world.settle()
        for node_id, node in world.nodes.items():
            if not node.connected:
                continue
            world.deliver(node_id)
            for runner_id in list(node.containers):
                if node.containers[runner_id].state is not RunnerState.IDLE:
                    node.advance(runner_id)
            for runner_id, status in list(node.containers.items()):
                if not status.ended:
                    self._told(runner_id, node.id)
            world.report(node_id)
        world.tick(seconds_s)

    def _told(self, runner_id: str, node_id: str) -> None:
        node = self.world.nodes[node_id]
        status = node.containers[runner_id]
        if status.state in (RunnerState.SETUP, RunnerState.IDLE, RunnerState.RUNNING, RunnerState.DRAINING):
            self.started.setdefault(status.assignment_id, self.world.wall_s)
            node.containers[runner_id] = self._counted(status)
            node.changed[runner_id] = None

    def _counted(self, status: RunnerStatus) -> RunnerStatus:
        """With what its node counts of it now."""
        began_s = self.started[status.assignment_id]
        seconds_s = (self.world.wall_s - began_s) * len(status.gpus)
        self.truth[status.assignment_id] = seconds_s * 1000
        return replace(status, started_at_s=began_s, gpu_seconds=seconds_s, busy_seconds=seconds_s / 4, served=3)

    def _ends(self, node: SimNode) -> None:
        """Agents tell the whole with the end."""
        plain = node._set

        def counted(status: RunnerStatus) -> None:
            have = node.containers.get(status.runner_id)
            over = have is not None and have.ended and have.assignment_id == status.assignment_id
            plain(
                self._counted(status) if status.ended and not over and status.assignment_id in self.started else status
            )

        node._set = counted  # type: ignore[method-assign]

    def end(self) -> None:
        self.world.step(DeleteApp(APP))
        for _ in range(60):
            self.round(1.0)
            if not self.world.state.runners:
                return
        raise AssertionError("runners are left")

    def rows(self, since_s: float = 0.0) -> list[UsageRow]:
        wall_s = self.world.wall_s
        return usage.rows(self.world.state, since_s=since_s, until_s=wall_s, now_s=self.world.now_s, wall_s=wall_s)

    def gpu_ms(self) -> int:
        return sum(row.gpu_ms for row in self.rows())


def test_what_runs_counts_before_and_after_its_end() -> None:
    ledger = Ledger()
    for _ in range(10):
        ledger.round(60.0)
    running = ledger.gpu_ms()
    assert abs(running - 2 * 600_000) < 2 * 65_000
    assert not ledger.world.state.usage
    ledger.end()
    assert len(ledger.world.state.usage) == 2
    assert all(one.ended for one in ledger.world.state.usage.values())
    assert running <= ledger.gpu_ms() <= running + 2 * 70_000
    [row] = {replace(row, pool="") for row in ledger.rows() if row.runners == 1} or [None]
    assert row is not None
    assert 0 < row.busy_gpu_ms < row.gpu_ms
    assert row.cost_micros == row.gpu_ms, "3.6 USD an hour is a micro a millisecond"


def test_the_same_end_told_again_changes_nothing() -> None:
    ledger = Ledger()
    ledger.round(600.0)
    ledger.end()
    before = dict(ledger.world.state.usage)
    for node_id in ledger.world.nodes:
        ledger.world.hello(node_id)
    for _ in range(3):
        ledger.round(1.0)
    assert ledger.world.state.usage == before


def test_a_revoked_node_counts_up_to_what_it_told() -> None:
    ledger = Ledger(least=1)
    ledger.round(600.0)
    ledger.round(1.0)
    [runner] = ledger.world.state.runners.values()
    ledger.world.step(RevokeNode(runner.node))
    [one] = ledger.world.state.usage.values()
    assert one.ended
    assert one.gpu_ms >= 600_000


def test_long_runs_are_written_down_and_replaced_upward_only() -> None:
    ledger = Ledger(least=1)
    for _ in range(4):
        ledger.round(USAGE_CHECKPOINT_S / 2)
    [one] = ledger.world.state.usage.values()
    assert not one.ended
    assert one.gpu_ms >= USAGE_CHECKPOINT_S * 1000
    assert sum(row.runners for row in ledger.rows()) == 1, "the record gives way to what is told now"
    ledger.round(60.0)
    ledger.end()
    [more] = ledger.world.state.usage.values()
    assert more.ended
    assert more.gpu_ms > one.gpu_ms


def test_folded_by_day_without_a_loss_and_forgotten_after_the_retention() -> None:
    ledger = Ledger()
    ledger.round(3600.0)
    ledger.end()
    total, wall_s = ledger.gpu_ms(), ledger.world.wall_s
    ledger.world.now_s += USAGE_DETAILS_KEPT_S
    ledger.round(61.0)
    state = ledger.world.state
    assert not state.usage
    assert {day for day, _ in state.usage_days} <= {usage.day_of(wall_s), usage.day_of(wall_s - 3700.0)}
    assert ledger.gpu_ms() == total
    assert sum(row.runners for row in ledger.rows()) == 2
    ledger.world.now_s += USAGE_DAYS_KEPT * DAY_S
    for _ in range(3):
        ledger.round(61.0)
    assert not state.usage_days


def test_nothing_is_folded_in_a_leaders_first_minutes() -> None:
    ledger = Ledger()
    ledger.round(60.0)
    ledger.end()
    state = ledger.world.state
    state.grace_over, state.term_began_s = False, ledger.world.now_s + USAGE_DETAILS_KEPT_S
    ledger.world.now_s += USAGE_DETAILS_KEPT_S
    ledger.world.step(Tick())
    assert state.usage


USAGES = st.builds(
    Usage,
    assignment=st.just("a"),
    app=st.just(APP),
    revision=st.just(1),
    runner=st.just("r"),
    started_at_s=st.floats(1.7e9, 1.7e9 + 5 * DAY_S),
    gpu_ms=st.integers(0, 10**12),
    busy_gpu_ms=st.integers(0, 10**12),
    served=st.integers(0, 10**6),
    price_micros=st.integers(0, 10**8),
).flatmap(lambda one: st.floats(0, 40 * DAY_S).map(lambda long_s: replace(one, until_s=one.started_at_s + long_s)))


@settings(max_examples=200, deadline=None)
@given(USAGES)
def test_days_add_up_to_the_whole(one: Usage) -> None:
    days = list(usage.by_day(one))
    names = [day for day, _ in days]
    assert names == sorted(set(names))
    assert names[0] == usage.day_of(one.started_at_s)
    whole = usage.summed([row for _, row in days])
    assert whole == [UsageRow(APP, "", "", one.gpu_ms, one.busy_gpu_ms, one.served, one.cost_micros, 1)]
    assert all(row.gpu_ms >= 0 and row.served >= 0 and row.cost_micros >= 0 for _, row in days)


@settings(max_examples=200, deadline=None)
@given(USAGES, st.floats(0, 1))
def test_two_halves_make_the_whole(one: Usage, share: float) -> None:
    middle_s = one.started_at_s + (one.until_s - one.started_at_s) * share
    parts = [usage.between(one, 0.0, middle_s), usage.between(one, middle_s, 4e9)]
    found = sum(part.gpu_ms for part in parts if part is not None)
    assert abs(found - one.gpu_ms) <= 1 or one.until_s == one.started_at_s
    assert usage.between(one, 0.0, one.started_at_s - 1.0) is None


class Failing(Ledger):
    """Leaders come and go; nodes fall silent and come back; runners crash, are scaled and are stopped."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        super().__init__(least=3)

    def fail_over(self) -> None:
        """The leader is gone; all that the next one has is the store, and what the nodes tell."""
        world = self.world
        records = {key_of(one): encode(one) for one in records_of(world.state)}
        state, broken = recover(records, term=world.state.term + 1, revision=1, now_s=world.now_s)
        assert not broken
        world.core = world.core_of(state)
        for node_id, node in world.nodes.items():
            if node.connected:
                world.hello(node_id)

    def moment(self) -> Moment:
        return Moment(self.world.now_s, self.world.wall_s)

    def live(self) -> None:
        """Some minutes of one leader."""
        world, rng = self.world, self.rng
        for _ in range(rng.randrange(2, 8)):
            self.round(rng.choice((5.0, 30.0, 300.0)))
            node_id = rng.choice(sorted(world.nodes))
            node = world.nodes[node_id]
            serving = [id_ for id_, one in node.containers.items() if one.serves]
            match rng.randrange(5):
                case 0 if serving:
                    node.crash(rng.choice(serving))
                case 1:
                    world.step(ScaleApp(APP, ScaleOverride(min_concurrency=rng.randrange(1, 5))))
                case 2 if world.state.runners:
                    world.step(StopRunner(rng.choice(sorted(world.state.runners)), actor="ada"))
                case 3 if node.connected:
                    world.cut(node_id)
                case 4:
                    world.hello(node_id)


@pytest.mark.parametrize("seed", range(3))
def test_twenty_failovers_lose_and_double_nothing(seed: int) -> None:
    """Within 0.1 %: GPU seconds of the ledger against what the nodes really ran."""
    ledger = Failing(seed)
    for _ in range(20):
        ledger.live()
        ledger.fail_over()
    for node_id in ledger.world.nodes:
        ledger.world.hello(node_id)
    ledger.round(400.0)
    ledger.end()
    truth_ms = sum(ledger.truth.values())
    assert not ledger.world.state.runners
    assert len(ledger.world.state.usage) == len(ledger.truth) > 20
    assert abs(ledger.gpu_ms() - truth_ms) <= truth_ms / 1000


def test_a_ledger_that_counts_twice_after_a_failover_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a record for each leader instead of each assignment."""
    grown = usage._grow

    def doubled(work: Work, found: Usage) -> None:
        grown(work, replace(found, assignment=f"{found.assignment}-{work.state.term}"))

    monkeypatch.setattr(usage, "_grow", doubled)
    ledger = Failing(0)
    for _ in range(20):
        ledger.live()
        for runner in list(ledger.world.state.runners.values()):
            usage.note_end(Work(ledger.world.state, ledger.moment(), ledger.world.core.ids), runner)
        ledger.fail_over()
    assert ledger.gpu_ms() > 1.1 * sum(ledger.truth.values())
