"""What operators command, as changes: each function checks everything first, then changes, then replies.

Pure. A refused command has changed nothing (`step` undoes what a half-way FalError left). Runners are not made or
stopped here but by `reconcile`, for the apps that a command touched. Called by `step`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.ids import team_of
from fal_scheduler.core import gpu_faults, tokens
from fal_scheduler.core.drain import give_up
from fal_scheduler.core.events import (
    AcceptCluster,
    ApplyApp,
    ApplyPool,
    CordonNode,
    CreateToken,
    DeleteApp,
    NodeChanged,
    RedeemToken,
    Reply,
    RevokeCaller,
    Revoked,
    RevokeNode,
    RevokeToken,
    ScaleApp,
    StopRunner,
)
from fal_scheduler.core.model_commands import check_image, check_models
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    Goal,
    Node,
    Pool,
    Revision,
    Revocation,
    Runner,
    ScaleOverride,
)
from fal_scheduler.core.rollout import begun
from fal_scheduler.core.scale_checks import check_scaling
from fal_scheduler.core.secrets import check_secrets
from fal_scheduler.core.state import State
from fal_scheduler.core.stops import stop
from fal_scheduler.core.told import RunnerStatus
from fal_scheduler.core.work import Work

REVISIONS_KEPT: Final = 20
CALLER_ROLES: Final = ("viewer", "operator", "admin", "serving")


def apply_pool(work: Work, event: ApplyPool) -> Reply:
    """Make or change a pool."""
    pool, have = event.pool, work.state.pools.get(event.pool.name)
    _expect(event.expected_generation, have.generation if have is not None else 0, f"pool {pool.name}")
    if have is not None:
        pool = replace(pool, lost_declared_at_s=have.lost_declared_at_s)  # no manifest says it
    if have is not None and replace(pool, generation=have.generation) == have:
        return Reply("unchanged", pool.name, have.generation)
    after = replace(pool, generation=have.generation + 1 if have is not None else 1)
    work.put(after, have)
    work.capacity_grew()
    _nodes_of_pool_changed(work, after)
    outcome = "created" if have is None else "changed"
    work.log("POOL_APPLIED", pool.name, f"pool {outcome}")
    return Reply(outcome, pool.name, after.generation)


def _nodes_of_pool_changed(work: Work, pool: Pool) -> None:
    for node in work.state.nodes.values():
        if node.pool == pool.name:
            work.emit(NodeChanged(node.id))


def apply_app(work: Work, event: ApplyApp) -> Reply:
    """Deploy: a new revision, which becomes the one that should run."""
    state = work.state
    have = state.apps.get(event.id)
    _expect(event.expected_generation, have.generation if have is not None else 0, f"app {event.id}")
    _check_alive(state, event.id)
    check_models(state, event.spec)
    check_image(state, event.spec)
    check_secrets(state, team_of(event.id), event.spec)
    if have is not None and state.revision_of(have).digest == event.digest:
        if not event.reset_scale or have.scale is None:
            return Reply("unchanged", event.id, have.generation)
        return scale_app(work, ScaleApp(event.id, ScaleOverride(), reset=True, actor=event.actor))
    scale = have.scale if have is not None and not event.reset_scale else None
    check_scaling(scale.over(event.spec.scaling) if scale is not None else event.spec.scaling)
    number = 1 + max((kept for owner, kept in state.revisions if owner == event.id), default=0)
    work.put(Revision(event.id, number, event.spec, event.digest, work.moment.wall_s, event.actor), None)
    if have is None:
        app = App(event.id, number, created_at_s=work.moment.wall_s)
    else:
        app = begun(work, replace(have, revision=number, scale=scale, generation=have.generation + 1), have)
    work.put(app, have)
    state.backoffs.pop(event.id, None)  # the new revision may be what mends it
    _touch(work, event.id)
    _forget_revisions(work, app)
    outcome = "created" if have is None else "changed"
    work.log("APP_APPLIED", event.id, f"revision {number} should run", revision=str(number))
    return Reply(outcome, event.id, app.generation)


def _forget_revisions(work: Work, app: App) -> None:
    """Keep the last revisions and those that runners serve."""
    state = work.state
    number = app.revision - REVISIONS_KEPT
    served = {state.runners[id_].revision_for(app.id) for id_ in state.runners_by_app.get(app.id, ())}
    back = app.rollout.from_revision if app.rollout is not None else 0
    old = state.revisions.get((app.id, number))
    if old is not None and number != back and number not in served:
        work.drop(old)


def scale_app(work: Work, event: ScaleApp) -> Reply:
    """Set scaling values at run time."""
    state = work.state
    app = _app(state, event.id)
    _check_alive(state, event.id)
    base = ScaleOverride() if event.reset or app.scale is None else app.scale
    scale = base.under(event.scale)
    check_scaling(scale.over(state.revision_of(app).spec.scaling))
    kept = None if scale == ScaleOverride() else scale
    if kept == app.scale:
        return Reply("unchanged", app.id, app.generation)
    after = replace(app, scale=kept, generation=app.generation + 1)
    work.put(after, app)
    _touch(work, app.id)
    work.log("APP_SCALED", app.id, f"scaling set to {kept}")
    return Reply("changed", app.id, after.generation)


def delete_app(work: Work, event: DeleteApp) -> Reply:
    """Stop an app's runners; reconcile forgets it when they are gone."""
    app = _app(work.state, event.id)
    runners = len(work.state.runners_by_app.get(app.id, ()))
    if not app.deleting:
        work.put(replace(app, deleting=True, generation=app.generation + 1), app)
        work.log("APP_DELETING", app.id, f"{runners} runners are stopped")
    _touch(work, app.id)
    return Reply("done", app.id, app.generation + 1, (f"{runners} runners",))


def cordon_node(work: Work, event: CordonNode) -> Reply:
    """Stop or allow new placements on a node."""
    node = _node(work.state, event.node)
    reason = event.reason if event.cordon else ""
    if node.drain is not None and not event.cordon:  # else what is placed there would have to leave at once
        what = f"node {node.name} is being drained ({node.drain.reason or node.drain.kind})"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=f"`falctl node drain {node.name} --cancel` ends that.")
    if (node.cordoned, node.cordon_reason) == (event.cordon, reason):
        return Reply("unchanged", node.id)
    work.put(replace(node, cordoned=event.cordon, cordon_reason=reason), node)
    if not event.cordon:
        work.capacity_grew()
    work.log("NODE_CORDONED" if event.cordon else "NODE_UNCORDONED", node.id, reason or "by an operator")
    return Reply("changed", node.id)


def revoke_node(work: Work, event: RevokeNode) -> Reply:
    """Refuse a node's certificates. It never comes back, so its runners' records go and are replaced."""
    state = work.state
    node = _node(state, event.node)
    if node.revoked:
        return Reply("unchanged", node.id)
    work.put(replace(node, revoked=True), node)
    gpu_faults.forget(work, node.id)
    subject = f"node/{node.id}"
    work.put(Revocation(event.serial or node.id, subject, work.moment.wall_s, event.reason), None)
    give_up(work, node.id)
    work.emit(Revoked(subject))
    work.log("NODE_REVOKED", node.id, event.reason or "by an operator")
    return Reply("changed", node.id)


def revoke_caller(work: Work, event: RevokeCaller) -> Reply:
    """Refuse what was issued to a person or gateway until now; a certificate issued afterwards is good."""
    role, _, name = event.subject.partition("/")
    if role not in CALLER_ROLES or not name:
        remedy = f"Write role/name with one of the roles {', '.join(CALLER_ROLES)}; nodes: `falctl node revoke`."
        raise invalid("subject", event.subject, "names no person and no gateway", remedy=remedy)
    if event.subject == event.actor:
        raise invalid("subject", event.subject, "is yourself", remedy="Let another admin do it.")
    serial = f"{role}.{name}"  # no serial of a certificate; one record a subject, the latest
    before = work.state.revocations.get(serial)
    work.put(Revocation(serial, event.subject, work.moment.wall_s, event.reason), before)
    work.emit(Revoked(event.subject))
    work.log("CALLER_REVOKED", event.subject, event.reason or "by an operator")
    return Reply("done", event.subject)


def create_token(work: Work, event: CreateToken) -> Reply:
    """Keep a join token."""
    token = event.token
    if token.pool not in work.state.pools:
        raise not_found("pool", token.pool, remedy="Make it with `falctl pool apply`.")
    if token.id in work.state.tokens:
        raise FalError(Code.ALREADY_EXISTS, f"token {token.id!r} exists", remedy="Draw another id.")
    work.put(token, None)
    work.log("TOKEN_CREATED", token.id, f"{token.uses_left} machines may join pool {token.pool}")
    return Reply("created", token.id)


def revoke_token(work: Work, event: RevokeToken) -> Reply:
    """Refuse a token from now on."""
    token = work.state.tokens.get(event.id)
    if token is None:
        raise not_found("token", event.id, remedy="List them with `falctl node token list`.")
    if token.revoked:
        return Reply("unchanged", token.id)
    work.put(tokens.revoke(token), token)
    work.log("TOKEN_REVOKED", token.id, "by an operator")
    return Reply("changed", token.id)


def redeem_token(work: Work, event: RedeemToken) -> Reply:
    """A machine joins; one commit lowers the token and makes the node."""
    state = work.state
    token = state.tokens.get(event.token_id)
    used = tokens.redeem(token, event.secret, now_s=work.moment.wall_s)
    if event.node_id in state.nodes:
        raise FalError(Code.ALREADY_EXISTS, f"node {event.node_id!r} exists", remedy="Draw another id.")
    work.put(used, token)
    node = Node(event.node_id, event.node_name, used.pool, joined_at_s=work.moment.wall_s, token_id=used.id)
    work.put(node, None)
    work.log("NODE_JOINED", node.id, f"{node.name} joined pool {node.pool}", token=used.id)
    return Reply("created", node.id)


def stop_runner(work: Work, event: StopRunner) -> Reply:
    """Stop a runner or an orphan."""
    state = work.state
    goal = Goal.KILL if event.kill else Goal.STOP
    reason = event.reason or f"stopped by {event.actor or 'an operator'}"
    runner = state.runners.get(event.id)
    if runner is None:
        holders = [node_id for node_id, runner_id in state.orphans if runner_id == event.id]
        if not holders:
            raise not_found("runner", event.id, remedy="List them with `falctl runner list`.")
        for node_id in holders:
            adopt_to_stop(work, node_id, state.live[node_id].orphans[event.id], goal, reason)
        return Reply("done", event.id)
    if runner.node and runner.goal >= goal:
        return Reply("unchanged", runner.id)
    _touch(work, runner.app)
    stop(work, runner, goal, reason)
    return Reply("done", runner.id)


def adopt_to_stop(work: Work, node_id: str, status: RunnerStatus, goal: Goal, reason: str) -> None:
    """Give an orphan a record with the goal to stop, so that its node is told and the stop survives us."""
    assignment = status.assignment_id or work.ids.suffix()
    if assignment in work.state.runners_by_assignment:
        assignment = work.ids.suffix()
    runner = Runner(
        id=status.runner_id,
        share_group=status.share_group,
        bindings=(Binding(status.app, status.revision),),
        created_at_s=status.started_at_s,
        node=node_id,
        gpus=status.gpus,
        assignment=AssignmentRef(assignment, min(status.term, work.state.term)),
        residencies=status.residencies,
        goal=goal,
        goal_reason=reason,
        memory_bytes=status.memory_bytes,
        cpu_milli=status.cpu_milli,
        gpu_milli=status.gpu_milli,
    )
    work.put(runner, None)
    work.log("RUNNER_STOPPING", runner.id, reason)


def accept_cluster(work: Work, event: AcceptCluster) -> Reply:
    """Take nodes of another cluster in."""
    meta = work.state.meta
    assert meta is not None, "the engine makes it before the first event"
    if event.cluster_id in (*meta.accepted_clusters, meta.cluster_id):
        return Reply("unchanged", event.cluster_id)
    work.put(replace(meta, accepted_clusters=(*meta.accepted_clusters, event.cluster_id)), meta)
    work.log("CLUSTER_ACCEPTED", event.cluster_id, "its nodes may join this cluster")
    return Reply("changed", event.cluster_id)


def _touch(work: Work, app_id: str) -> None:
    """An operator's command touched the app: what it stops, they asked for."""
    work.state.dirty[app_id] = None
    work.state.asked[app_id] = None


def _expect(expected: int | None, generation: int, what: str) -> None:
    if expected is None or expected == generation:
        return
    seen = "does not exist yet" if expected == 0 else f"has generation {expected}"
    raise FalError(
        Code.CONFLICT,
        f"{what} has generation {generation}, you assumed that it {seen}",
        remedy="Look at what changed, then apply again.",
        field="expected_generation",
    )


def _app(state: State, app_id: str) -> App:
    app = state.apps.get(app_id)
    if app is None:
        raise not_found("app", app_id, remedy="List them with `falctl app list`.")
    return app


def _check_alive(state: State, app_id: str) -> None:
    app = state.apps.get(app_id)
    if app is not None and app.deleting:
        raise FalError(
            Code.FAILED_PRECONDITION, f"app {app_id!r} is being deleted", remedy="Wait until its runners are gone."
        )
    if app_id in state.frozen:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"app {app_id!r} is frozen: {state.frozen[app_id]}",
            remedy="Report the replay file; restart the scheduler when it is understood.",
        )


def _node(state: State, name: str) -> Node:
    node = state.find_node(name)
    if node is None:
        raise not_found("node", name, remedy="List them with `falctl node list`; use the id where names repeat.")
    return node
