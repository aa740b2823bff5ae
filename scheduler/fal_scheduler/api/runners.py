"""Runners and orphans."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from fal_contract.errors import Code, FalError, not_found
from fal_contract.ids import team_of
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api.paging import page
from fal_scheduler.api.views import find_node, orphan_view, runner_view
from fal_scheduler.core.events import StopRunner
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership

TAIL_LINES_MAX = 100_000


def list_runners(leader: Leadership, request: cluster_pb2.ListRunnersRequest) -> cluster_pb2.ListRunnersReply:
    """A page of runners in order of id, orphans among them; of a team, an app, a node. NOT_FOUND for the node."""
    state = leader.view
    keys = sorted(_chosen(state, request))
    views, following = page(keys, lambda key: _view(state, key), limit=request.limit, after=request.after)
    return cluster_pb2.ListRunnersReply(runners=views, next=following, total=len(keys))


def _chosen(state: State, request: cluster_pb2.ListRunnersRequest) -> Iterator[tuple[str, str]]:
    """Ids of runners, and of orphans with their node."""
    node_id = find_node(state, request.node).id if request.node else ""
    for runner in state.runners.values():
        of_app = request.app in ("", *runner.apps)
        if of_app and node_id in ("", runner.node) and request.team in ("", team_of(runner.id)):
            yield runner.id, ""
    for on_node, runner_id in state.orphans:
        app_id = state.live[on_node].orphans[runner_id].app
        if request.app in ("", app_id) and node_id in ("", on_node) and request.team in ("", team_of(runner_id)):
            yield runner_id, on_node


def _view(state: State, key: tuple[str, str]) -> cluster_pb2.RunnerView:
    runner_id, on_node = key
    if on_node:
        return orphan_view(state, on_node, state.live[on_node].orphans[runner_id])
    return runner_view(state, state.runners[runner_id])


def get_runner(leader: Leadership, request: cluster_pb2.GetRunnerRequest) -> cluster_pb2.RunnerView:
    """One runner or orphan."""
    return find_runner(leader.view, request.id)


def find_runner(state: State, runner_id: str) -> cluster_pb2.RunnerView:
    """A runner or orphan by id. Raises NOT_FOUND."""
    runner = state.runners.get(runner_id)
    if runner is not None:
        return runner_view(state, runner)
    for node_id, orphan in sorted(state.orphans):
        if orphan == runner_id:
            return orphan_view(state, node_id, state.live[node_id].orphans[orphan])
    raise not_found("runner", runner_id, remedy="List runners with `falctl runner list`.")


async def stop_runner(leader: Leadership, request: cluster_pb2.StopRunnerRequest, actor: str) -> cluster_pb2.RunnerView:
    """Stop a runner or orphan; the app replaces a runner while it still wants one. Raises NOT_FOUND."""
    before = find_runner(leader.view, request.id)
    await leader.engine.submit(StopRunner(request.id, request.kill, request.reason, actor))
    try:
        return find_runner(leader.view, request.id)
    except FalError:  # it had no node, so it is gone at once
        before.state = state_pb2.RUNNER_STATE_TERMINATED
        before.reason = request.reason or f"stopped by {actor}"
        return before


def _ended(leader: Leadership, runner_id: str) -> cluster_pb2.RunnerView:
    """Where a runner that is gone was placed last. NOT_FOUND when no event in memory tells."""
    placed = leader.feed.latest("RUNNER_PLACED", runner_id)
    if placed is None:
        remedy = "List runners with `falctl runner list`; events tell of ended ones."
        raise not_found("runner", runner_id, remedy=remedy)
    return cluster_pb2.RunnerView(runner=state_pb2.Runner(id=runner_id, node=placed.facts["node"]))


def _node_of_last_life(leader: Leadership, runner_id: str) -> str:
    """The connected node on which a runner that waits for its next try ran last; empty: none."""
    placed = leader.feed.latest("RUNNER_PLACED", runner_id)
    node_id = placed.facts["node"] if placed is not None else ""
    return node_id if node_id and leader.sessions.connected(node_id) else ""


async def runner_logs(leader: Leadership, request: cluster_pb2.RunnerLogsRequest) -> AsyncIterator[agent_pb2.LogChunk]:
    """A runner's output, from its node, also when it has ended. NOT_FOUND, UNAVAILABLE (the node is silent)."""
    try:
        view = find_runner(leader.view, request.id)
    except FalError:
        view = _ended(leader, request.id)
    node_id = view.runner.node or _node_of_last_life(leader, request.id)
    tail: Sequence[str] = view.status.log_tail if not view.runner.node and view.HasField("status") else ()
    last = agent_pb2.LogChunk(lines=[agent_pb2.LogLine(stream="stdout", text=text) for text in tail], end=True)
    if not node_id:
        if not tail:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"runner {request.id!r} has no output: {view.reason}",
                remedy="Wait until it is on a node.",
            )
        yield last
        return
    chunks = leader.sessions.logs.follow(
        node_id,
        request.id,
        tail_lines=min(request.tail_lines, TAIL_LINES_MAX),
        follow=request.follow,
        since_s=request.since_s,
        request_id=request.request_id,
    )
    async for chunk in chunks:
        yield last if tail and chunk.error else chunk  # its node keeps nothing of it any more
        tail = ()
