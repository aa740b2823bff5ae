"""What nodes and gateways tell, taken in: sessions, statuses, orphans, ends of runners.

Pure. Late news about dead things is normal and changes nothing. What is told changes `State.live`; records change
only where a container's end is told (`_ended`). Called by `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fal_contract.limits import CRASH_BACKOFF_MAX_S, CRASH_BACKOFF_STEP_S, GPU_REFUSALS_FREE_MAX
from fal_scheduler.core import (
    bindings,
    builds,
    demand_news,
    expectations,
    gpu_faults,
    packs,
    preemption,
    rollout,
    sharing,
    suspicion,
)
from fal_scheduler.core.cache_events import PeerReach
from fal_scheduler.core.events import (
    GatewayReach,
    HelloNeeded,
    NodeChanged,
    NodeDisconnected,
    NodeHello,
    NodeReport,
    RouteChanged,
)
from fal_scheduler.core.records import Change, Goal, Runner, RunnerState
from fal_scheduler.core.told import Backoff, Health, Inventory, NodeLive, RunnerStatus
from fal_scheduler.core.work import Work

BACKOFF_STEPS_MAX = 64


def hello(work: Work, event: NodeHello) -> None:
    """A session begins: the node tells everything, and what it does not tell is not there."""
    state = work.state
    live = state.live_of(event.node_id)
    clone = suspicion.is_clone(live, event)
    suspicion.remember_boot(live, event.boot_id)
    live.session_id, live.connected = event.session_id, True
    live.agent_id, live.software, live.cluster_id = event.agent_id, event.software, event.cluster_id
    live.incarnation, live.epoch_seen, live.term_seen = event.incarnation, event.epoch_seen, event.term_seen
    live.store_revision_seen = event.store_revision_seen
    live.endpoints, live.capabilities, live.inventory = event.endpoints, event.capabilities, event.inventory
    _take_all(work, live, event.statuses)
    if clone:
        suspicion.quarantine_clone(work, live)
    suspicion.judge(work, live)
    suspicion.keep(work)
    _heard(work, live, event.arrived_s)
    state.refresh_node(live.node_id)
    _tell_gpus(work, live.node_id)
    if not live.hold:
        _forget_absent(work, live)
        _end_ended(work, live)
    for runner_id in state.runners_by_node.get(live.node_id, ()):
        state.dirty[state.runners[runner_id].app] = None
    work.capacity_grew()
    work.emit(NodeChanged(live.node_id))
    tell_orphans(work)


def _take_all(work: Work, live: NodeLive, statuses: tuple[RunnerStatus, ...]) -> None:
    """Replace all that was known of the node's containers."""
    for runner_id in list(live.orphans):
        work.state.forget_orphan(live.node_id, runner_id)
    for runner_id in live.statuses:
        work.emit(RouteChanged(runner_id))
    live.statuses, live.told_at_s = {}, {}
    for status in statuses:
        _take(work, live, status)


def _take(work: Work, live: NodeLive, status: RunnerStatus) -> RunnerStatus | None:
    """Keep one status, as a runner's or an orphan's; return what was known of the runner before."""
    state = work.state
    runner = state.runners.get(status.runner_id)
    if runner is not None and runner.node == live.node_id:
        before = live.statuses.get(runner.id)
        live.statuses[runner.id] = status
        live.told_at_s[runner.id] = work.moment.now_s
        demand_news.note_status(work, runner, before, status)
        if before is None or (before.state, before.max_multiplexing) != (status.state, status.max_multiplexing):
            work.emit(RouteChanged(runner.id))
        if status.residents and (before is None or before.residents != status.residents):
            work.emit(RouteChanged(runner.id))
            sharing.note_residents(work, runner, before, status)
        return before
    if status.ended:
        state.forget_orphan(live.node_id, status.runner_id)
    else:
        state.add_orphan(live.node_id, status)
    return None


def _forget_absent(work: Work, live: NodeLive) -> None:
    """Runners that should end and are not there have ended. One that should run is assigned again by Complete, unless
    a container that no record names has its GPUs: it can never start there."""
    state = work.state
    held = {gpu for status in live.orphans.values() for gpu in status.gpus}
    for runner_id in list(state.runners_by_node.get(live.node_id, ())):
        runner = state.runners[runner_id]
        if runner_id not in live.statuses and (runner.goal > Goal.RUN or not held.isdisjoint(runner.gpus)):
            _forget(work, runner)


def _forget(work: Work, runner: Runner) -> None:
    """Drop the record of a runner that its node has no more; with the next step where this one has no room."""
    state = work.state
    if work.full and runner.assignment is not None:
        state.absent_due[runner.id] = runner.assignment.id
        state.dirty[runner.app] = None
        return
    work.drop(runner)
    work.log("RUNNER_ENDED", runner.id, f"{runner.node} runs it no longer")


def _end_ended(work: Work, live: NodeLive) -> None:
    for status in list(live.statuses.values()):
        runner = work.state.runners.get(status.runner_id)
        if status.ended and runner is not None and runner.node == live.node_id:
            _take_end(work, live, runner, status)


def _take_end(work: Work, live: NodeLive, runner: Runner, status: RunnerStatus) -> None:
    """A container's end, now, or with the next step: one commit has room for so many."""
    if not work.full:
        _ended(work, runner, status)
        return
    work.state.ends_due[live.node_id] = None
    work.state.dirty[runner.app] = None


def go_on(work: Work) -> None:
    """Ends that steps before this one had no room for."""
    due, work.state.ends_due = work.state.ends_due, {}
    for node_id in due:
        live = work.state.live.get(node_id)
        if live is not None and not live.hold:
            _end_ended(work, live)
    absent, work.state.absent_due = work.state.absent_due, {}
    for runner_id, assignment_id in absent.items():
        runner = work.state.runners.get(runner_id)
        if runner is None or runner.assignment is None or runner.assignment.id != assignment_id:
            continue
        live = work.state.live.get(runner.node)
        if live is not None and not live.hold and runner_id not in live.statuses:
            _forget(work, runner)


def recheck(work: Work) -> None:
    """Do again what news asked for: a batch that held the answer to some was taken back."""
    suspicion.keep(work)
    for live in work.state.live.values():
        if not live.hold:
            _end_ended(work, live)
    work.state.dirty.update(dict.fromkeys(work.state.apps))


def ask_again(work: Work, undone: Sequence[Change]) -> None:
    """Records were brought back. What a node told of a runner that seemed to have left it was let go as late news, so
    where nothing is known of such a runner now, the node has to tell everything again."""
    state = work.state
    for change in undone:
        before, after = change.before, change.after
        if not isinstance(before, Runner) or (isinstance(after, Runner) and after.node == before.node):
            continue
        runner, live = state.runners.get(before.id), state.live.get(before.node)
        if runner is not None and runner.node == before.node and live is not None and runner.id not in live.statuses:
            work.emit(HelloNeeded(live.node_id))


def report(work: Work, event: NodeReport) -> None:
    """What changed on a node since its last report."""
    state = work.state
    live = state.live.get(event.node_id)
    if live is None or live.session_id != event.session_id:
        return  # a session that was superseded
    _heard(work, live, event.arrived_s)
    if event.inventory is not None:
        _take_inventory(work, live, event.inventory)
    if event.tunnels is not None and event.tunnels != live.tunnels:
        live.tunnels = event.tunnels
        work.emit(NodeChanged(live.node_id))
    for told in event.access:
        packs.note_access(work, live.node_id, told)
    orphans = len(state.orphans)
    for status in event.statuses:
        before = _take(work, live, status)
        runner = state.runners.get(status.runner_id)
        if runner is None or runner.node != live.node_id or live.hold:
            continue
        if status.ended:
            _take_end(work, live, runner, status)
        elif status.serves and (before is None or not before.serves):
            _became_ready(work, runner, status, event.arrived_s)
        if status.wounded and (before is None or not before.wounded):
            state.dirty[runner.app] = None  # another takes its place
    for runner_id in event.gone:
        _gone(work, live, runner_id)
    if len(state.orphans) != orphans:
        if len(state.orphans) < orphans:
            work.capacity_grew()
        tell_orphans(work)


def _take_inventory(work: Work, live: NodeLive, inventory: Inventory) -> None:
    live.inventory = inventory
    work.state.refresh_node(live.node_id)
    _tell_gpus(work, live.node_id)
    work.capacity_grew()
    work.emit(NodeChanged(live.node_id))


def _tell_gpus(work: Work, node_id: str) -> None:
    node = work.state.nodes.get(node_id)
    if node is not None:
        gpu_faults.tell(work, node)


def _became_ready(work: Work, runner: Runner, status: RunnerStatus, arrived_s: float) -> None:
    """A success: failures in a row start anew, and an older revision's runner may give way."""
    work.state.backoffs.pop(runner.app, None)
    work.state.refusals.pop(runner.app, None)
    work.state.dirty[runner.app] = None
    rollout.note_ready(work, runner)
    facts = expectations.ready(work.state, runner, status, arrived_s=arrived_s, wall_s=work.moment.wall_s)
    work.log("RUNNER_READY", runner.id, "ready for requests", **facts)


def _gone(work: Work, live: NodeLive, runner_id: str) -> None:
    """The node has forgotten a runner, so nothing of it is left there."""
    state = work.state
    state.forget_orphan(live.node_id, runner_id)
    last = live.statuses.get(runner_id)
    runner = state.runners.get(runner_id)
    if runner is not None and runner.node == live.node_id and last is not None and not live.hold:
        reason = last.reason or "its node has forgotten it"
        live.statuses[runner_id] = ended = replace(last, state=RunnerState.TERMINATED, reason=reason)
        _take_end(work, live, runner, ended)
    if last is not None and (runner is None or runner.node != live.node_id):
        del live.statuses[runner_id]
        live.told_at_s.pop(runner_id, None)


def _ended(work: Work, runner: Runner, status: RunnerStatus) -> None:
    """A container is gone. Where it should have run it crashed: the app waits, and its record waits without a node."""
    if status.assignment_id and runner.assignment is not None and status.assignment_id != runner.assignment.id:
        return  # the end of an earlier assignment
    why = status.reason or (f"exit code {status.exit_code}" if status.exit_code is not None else "ended")
    waiting = _without_guests(work, runner)
    task = work.state.catalog.builds.get(runner.app)  # one that packs an image counts its own tries
    packs = task is not None and task.image != ""
    if runner.goal is Goal.RUN and status.refused and not packs and _refused_freely(work, runner):
        work.put(waiting, runner)
        work.log("RUNNER_REFUSED", runner.id, f"{why}; placed again", node=runner.node)
        return
    if builds.ended(work, runner, status):
        return
    if runner.goal is not Goal.RUN:
        work.drop(runner)
        work.log("RUNNER_ENDED", runner.id, why)
        return
    for guest in runner.apps[1:]:  # any of them may have been the reason
        work.state.backoffs[guest] = _backoff_after(work, runner, status, guest)
    backoff = work.state.backoffs[runner.app] = _backoff_after(work, runner, status, runner.app)
    for app_id in runner.apps:
        preemption.backs_off(work, app_id)
    wait_s = max(0.0, backoff.until_s - work.moment.now_s)
    work.put(waiting, runner)
    work.state.failures[runner.id] = status
    rollout.note_failure(work, runner, why)
    work.log("RUNNER_FAILED", runner.id, f"{why}; tried again in {wait_s:g} s", node=runner.node)


def _without_guests(work: Work, runner: Runner) -> Runner:
    """Its record without a node, for the app whose it is: others that shared it find a place of their own."""
    first = runner.bindings[:1]
    needs = bindings.needs_of(work.state, replace(runner, bindings=first), runner.app)
    kept = tuple(one for one in runner.residencies if len(runner.bindings) == 1 or one.id in needs)
    empty = replace(runner, node="", gpus=(), assignment=None, memory_bytes=0, cpu_milli=0)
    return replace(empty, bindings=first, residencies=kept)


def _refused_freely(work: Work, runner: Runner) -> bool:
    """Whether a runner that its node turned away is placed again at once: nothing of it has run, so nothing crashed.

    The node knows better than we did what it has. Where that goes on, it is we who do not learn, and the app waits.
    """
    refusals = work.state.refusals
    refusals[runner.app] = min(refusals.get(runner.app, 0) + 1, BACKOFF_STEPS_MAX)
    return refusals[runner.app] <= GPU_REFUSALS_FREE_MAX


def _backoff_after(work: Work, runner: Runner, status: RunnerStatus, app_id: str) -> Backoff:
    """How long an app of its waits now.

    Runners that were there when the last failure counted are of the same round: a machine that takes ten of them with
    it is one failure, not ten in a row.
    """
    now_s, wall_s = work.moment.now_s, work.moment.wall_s
    have = work.state.backoffs.get(app_id)
    if have is not None and now_s < have.until_s and runner.created_at_s <= have.until_wall_s - _wait_s(have.failures):
        return replace(have, last=status)
    failures = min((have.failures if have is not None else 0) + 1, BACKOFF_STEPS_MAX)
    wait_s = _wait_s(failures)
    return Backoff(failures, now_s + wait_s, wall_s + wait_s, status)


def _wait_s(failures: int) -> float:
    return min(failures * CRASH_BACKOFF_STEP_S, CRASH_BACKOFF_MAX_S)


def _heard(work: Work, live: NodeLive, arrived_s: float) -> None:
    """The node spoke: whatever was thought of its silence is over."""
    state = work.state
    live.heard_at_s = max(live.heard_at_s, arrived_s)
    live.stall_at_heard_s = state.stall_total_s
    if live.health is Health.READY:
        return
    before, live.health = live.health, Health.READY
    for runner_id in state.runners_by_node.get(live.node_id, ()):
        if state.abandoned.pop(runner_id, "") is None:
            state.returned[runner_id] = None
        state.dirty[state.runners[runner_id].app] = None
        work.emit(RouteChanged(runner_id))
    state.refresh_node(live.node_id)
    work.capacity_grew()
    work.emit(NodeChanged(live.node_id))
    work.log("NODE_READY", live.node_id, f"was {before}")


def disconnected(work: Work, event: NodeDisconnected) -> None:
    """The stream broke. Silence counts from what was heard last; nothing else follows from it."""
    live = work.state.live.get(event.node_id)
    if live is not None and live.session_id == event.session_id and live.connected:
        live.connected = False
        work.emit(NodeChanged(live.node_id))


def reach(work: Work, event: GatewayReach) -> None:
    """A gateway tells which nodes it reaches, all of them."""
    for node_id, live in work.state.live.items():
        path = event.paths.get(node_id)
        before = live.reached.get(event.gateway_id)
        if path is not None:
            live.reached[event.gateway_id] = (path, event.arrived_s)
        elif before is not None:
            del live.reached[event.gateway_id]
        if (before[0] if before is not None else None) != path:
            work.emit(NodeChanged(node_id))


def peer_reach(work: Work, event: PeerReach) -> None:
    """A cache of another failure domain still reaches a node that is silent here."""
    live = work.state.live.get(event.node_id)
    if live is not None:
        live.witness, live.witnessed_at_s = event.by, event.arrived_s


def tell_orphans(work: Work) -> None:
    """Keep the alarm about orphans up to date."""
    state = work.state
    if not state.orphans:
        work.settle("ORPHANS", "cluster")
        return
    nodes = len({node_id for node_id, _ in state.orphans})
    work.alarm(
        "ORPHANS",
        "cluster",
        f"{len(state.orphans)} containers on {nodes} nodes are not known to the store",
        "Look at `falctl runner list`; then `falctl operator confirm adopt`, or `confirm stop`.",
    )
