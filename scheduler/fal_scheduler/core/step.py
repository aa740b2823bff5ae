"""One event on one state: command or news in, changes and effects out. The core's only entrance.

Pure and deterministic: the same state, event, moment and ids give the same outcome. `step` leaves the new state in
place (so that the next step can build on it while the commit is under way); a FalError or a broken invariant leaves
the records as they were. Called by the engine and by tests; nothing else may change a State.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from fal_contract.errors import Code, FalError
from fal_contract.limits import FAILOVER_GRACE_S
from fal_scheduler.core import (
    builds,
    commands,
    demand_news,
    drain,
    expectations,
    gpu_commands,
    invariants,
    learnt_shards,
    liveness,
    model_commands,
    news,
    packs,
    preemption,
    quotas,
    rollout,
    scaling,
    secrets,
    starts,
    usage,
    waiting,
)
from fal_scheduler.core.build_events import BuildCache, EvictCacheEntry, FailBuild, PutCacheEntry, TrimCache
from fal_scheduler.core.cache_events import CacheTold, PeerReach
from fal_scheduler.core.cache_facts import time_step
from fal_scheduler.core.confirm import confirm
from fal_scheduler.core.demand_events import DemandTold
from fal_scheduler.core.events import (
    AcceptCluster,
    ApplyApp,
    ApplyPool,
    Command,
    Confirm,
    CordonNode,
    CreateToken,
    DeleteApp,
    Event,
    GatewayReach,
    IdSource,
    Moment,
    NodeDisconnected,
    NodeHello,
    NodeReport,
    Outcome,
    Proceed,
    RedeemToken,
    Reply,
    RevokeCaller,
    RevokeNode,
    RevokeToken,
    ScaleApp,
    StopRunner,
    Tick,
)
from fal_scheduler.core.gpu_events import QuarantineGpu, ReleaseGpu
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.model_events import (
    AddModel,
    AttestModel,
    CollectModels,
    IdentifyModel,
    RefuseModel,
    RevokeModel,
    StageModel,
    UnstageModel,
)
from fal_scheduler.core.node_events import (
    CancelDrain,
    DeclareLost,
    DrainNode,
    LabelNode,
    NodeNotice,
    RebootRefused,
    RemoveNode,
)
from fal_scheduler.core.pack_events import PackImage, PutImage, RemoveModel
from fal_scheduler.core.place import Placer
from fal_scheduler.core.quota_events import SetQuota, UnsetQuota
from fal_scheduler.core.reconcile import reconcile
from fal_scheduler.core.records import Change
from fal_scheduler.core.rollout_events import SetRevision, SetRollout
from fal_scheduler.core.secret_events import SetSecret, UnsetSecret
from fal_scheduler.core.state import EXPLANATIONS_PER_TICK_MAX, State
from fal_scheduler.core.suspicion import judge_again
from fal_scheduler.core.work import Work

RECONCILE_GAP_S = 0.2  # between two looks at an app of RUNNERS_MANY, while reports come
RUNNERS_MANY = 100
RUNNERS_LOOKED_AT_MAX = 1000  # by one step, and its last app's: some 30 ms, then others get the loop
SETTLE_S = 5.0  # how long a new leader waits for all of its nodes before it places anything


class BrokenInvariant(Exception):
    """A step would have broken a rule. It was taken back; the objects named should be frozen."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{found.rule}: {found.message}" for found in violations))
        self.violations = violations


@dataclass(slots=True)
class Core:
    """A state and the caches over it."""

    state: State
    placer: Placer
    ids: IdSource

    def step(self, event: Event, moment: Moment) -> Outcome:
        """Do one event. Raises FalError (refused, nothing changed) or BrokenInvariant (taken back)."""
        work = Work(self.state, moment, self.ids, by_operator=getattr(event, "actor", ""))
        if self.state.cache_facts.under_way:
            self.state.facts_at_ms = time_step(moment.now_s)
        try:
            reply = _take(work, event)
            _reconcile(work, self.placer, by_report=isinstance(event, NodeReport))
            if isinstance(event, Tick):
                starts.refresh_reasons(work)
            violations = invariants.check(self.state, work.changes) if work.changes else []
        except FalError:
            work.undo()
            raise
        if violations:
            work.undo()
            self.state.fleet.distrust()  # what placement looked at may be what was wrong
            raise BrokenInvariant(violations)
        return Outcome(tuple(work.changes), tuple(work.effects.values()), reply)

    def taken_back(self, moment: Moment, undone: Sequence[Change] = ()) -> Outcome:
        """Records were undone: decide again what was decided together with them and is not a record.

        `undone`: of batches that did not happen, as they were made; none where only the last step was taken back.
        """
        work = Work(self.state, moment, self.ids)
        news.ask_again(work, undone)
        judge_again(work)
        return Outcome((), tuple(work.effects.values()))

    def freeze(self, violations: list[Violation], moment: Moment) -> Outcome:
        """Freeze what broke a rule: nothing is started or stopped on it by itself any more."""
        work = Work(self.state, moment, self.ids)
        for violation in violations:
            for subject in violation.subjects:
                self.state.frozen[subject] = violation.message
                work.alarm("INVARIANT", subject, violation.message, "Report the replay file beside the store.")
                if subject in self.state.nodes:
                    self.state.refresh_node(subject)
        return Outcome((), tuple(work.effects.values()))


def _take(work: Work, event: Event) -> Reply | None:
    match event:
        case NodeReport():
            news.report(work, event)
        case Tick():
            _tick(work, event)
        case NodeHello():
            news.hello(work, event)
            drain.hello(work, event.node_id)
            _settle(work)
            return Reply("done", event.node_id)
        case NodeNotice() | RebootRefused():
            drain.told(work, event)
        case NodeDisconnected():
            news.disconnected(work, event)
        case GatewayReach():
            news.reach(work, event)
        case PeerReach():
            news.peer_reach(work, event)
        case DemandTold():
            demand_news.told(work, event)
        case CacheTold():
            work.state.cache_facts.take(event)
        case Proceed():
            news.go_on(work)
        case _:
            return _command(work, event)
    return None


def _command(work: Work, event: Command) -> Reply:
    match event:
        case ApplyPool():
            return commands.apply_pool(work, event)
        case ApplyApp():
            return commands.apply_app(work, event)
        case ScaleApp():
            return commands.scale_app(work, event)
        case DeleteApp():
            return commands.delete_app(work, event)
        case CordonNode():
            return commands.cordon_node(work, event)
        case RevokeNode():
            return commands.revoke_node(work, event)
        case RevokeCaller():
            return commands.revoke_caller(work, event)
        case CreateToken():
            return commands.create_token(work, event)
        case RevokeToken():
            return commands.revoke_token(work, event)
        case RedeemToken():
            return commands.redeem_token(work, event)
        case StopRunner():
            return commands.stop_runner(work, event)
        case Confirm():
            return confirm(work, event)
        case AcceptCluster():
            return commands.accept_cluster(work, event)
        case _:
            return _model_command(work, event)


def _model_command(work: Work, event: Command) -> Reply:
    match event:
        case AddModel():
            return model_commands.add_model(work, event)
        case AttestModel():
            return model_commands.attest_model(work, event)
        case RefuseModel():
            return model_commands.refuse_model(work, event)
        case IdentifyModel():
            return model_commands.identify_model(work, event)
        case RevokeModel():
            return model_commands.revoke_model(work, event)
        case StageModel():
            return model_commands.stage_model(work, event)
        case UnstageModel():
            return model_commands.unstage_model(work, event)
        case CollectModels():
            return model_commands.collect_models(work, event)
        case BuildCache() | PutCacheEntry() | FailBuild() | TrimCache() | EvictCacheEntry():
            return builds.command(work, event)
        case PackImage() | PutImage() | RemoveModel():
            return packs.command(work, event)
        case DrainNode() | CancelDrain() | LabelNode() | RemoveNode() | DeclareLost():
            return drain.command(work, event)
        case SetQuota() | UnsetQuota():
            return quotas.command(work, event)
        case SetRollout() | SetRevision():
            return rollout.command(work, event)
        case SetSecret() | UnsetSecret():
            return secrets.command(work, event)
        case QuarantineGpu() | ReleaseGpu():
            return gpu_commands.command(work, event)
    raise FalError(Code.INTERNAL, f"{type(event).__name__} is no command", remedy="Report this.")


def _tick(work: Work, event: Tick) -> None:
    state, now_s = work.state, work.moment.now_s
    state.stall_total_s += event.stall_s
    state.explanations_left = EXPLANATIONS_PER_TICK_MAX
    if event.recheck:
        news.recheck(work)
    liveness.tick(work)
    scaling.tick(work)
    builds.tick(work)
    learnt_shards.save(work)
    expectations.sweep(state, now_s=now_s)
    rollout.tick(work)
    drain.tick(work)
    usage.tick(work)
    _settle(work)
    for app_id, backoff in state.backoffs.items():
        if backoff.until_s <= now_s and app_id in state.waiting:
            state.dirty[app_id] = None
    preemption.tick(work)
    waiting.tick(state)
    if not state.grace_over and now_s - state.term_began_s >= FAILOVER_GRACE_S:
        state.grace_over = True
        state.dirty.update(dict.fromkeys(state.apps))


def _settle(work: Work) -> None:
    """Place again when every node has said what it runs, or has had the time to."""
    state = work.state
    if state.settled:
        return
    heard = all(
        node.revoked or ((live := state.live.get(node.id)) is not None and live.session_id)
        for node in state.nodes.values()
    )
    if heard or work.moment.now_s - state.term_began_s >= SETTLE_S:
        state.settled = True
        work.capacity_grew()


def _reconcile(work: Work, placer: Placer, *, by_report: bool) -> None:
    """Every app that is dirty, as far as one step goes; before them those that wait and may find a place now.

    A reconciliation looks at each of the app's runners. Where they report one after the other, an app of many is looked
    at once in RECONCILE_GAP_S, and when nothing waits to be taken in any more: it stays dirty until then. So do apps
    that are left where one step has looked at many runners.
    """
    state = work.state
    waiting.wake(state)
    if state.awake:
        for app_id in waiting.turns(state):
            reconcile(work, placer, app_id)
            if work.full:
                state.dirty[app_id] = None
                return
            state.dirty.pop(app_id, None)
    later: dict[str, None] = {}
    looked_at = 0
    while not work.full and looked_at < RUNNERS_LOOKED_AT_MAX:
        app_id = next((one for one in state.dirty if one not in later), "")
        if not app_id:
            return
        if by_report and work.moment.now_s - state.reconciled_at_s.get(app_id, -inf) < RECONCILE_GAP_S:
            later[app_id] = None
            continue
        runners = len(state.runners_by_app.get(app_id, ()))
        looked_at += runners
        if runners >= RUNNERS_MANY:
            state.reconciled_at_s[app_id] = work.moment.now_s
        else:
            state.reconciled_at_s.pop(app_id, None)
        reconcile(work, placer, app_id)
        if not work.full:  # what it changed made the app dirty again, but it has seen that itself
            state.dirty.pop(app_id, None)
