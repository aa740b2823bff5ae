"""Commands in runners' containers, and looks at them. Every command is an event before it runs."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.v1 import agent_pb2, cluster_pb2
from fal_scheduler.api.runners import find_runner
from fal_scheduler.core.events import Logged
from fal_scheduler.leadership import Leadership
from fal_scheduler.stream_edges import first_message

_COMMAND_BYTES_MAX: Final = 64 << 10
_SHOWN_CHARS_MAX: Final = 512  # of a command in an event


async def exec_runner(
    leader: Leadership, requests: AsyncIterator[cluster_pb2.ExecRequest], actor: str
) -> AsyncIterator[agent_pb2.ExecOutput]:
    """Run a command; output until its end. NOT_FOUND, FAILED_PRECONDITION (no container), INVALID, UNAVAILABLE."""
    first = await first_message(requests)
    if not first.HasField("open"):
        raise invalid("open", "", "is missing in the first message", remedy="Say first what is to run.")
    opening = first.open
    if sum(map(len, opening.command)) > _COMMAND_BYTES_MAX:
        raise invalid("command", opening.command[0], "is too long", remedy=f"At most {_COMMAND_BYTES_MAX} characters.")
    node_id = _node_of(leader, opening.runner_id)
    shown = shlex.join(opening.command) or "a shell"
    shown = "".join(c if c.isprintable() else "�" for c in shown)  # events are printed on terminals
    if len(shown) > _SHOWN_CHARS_MAX:
        shown = shown[:_SHOWN_CHARS_MAX] + "…"
    text = f"{actor} runs {shown} in its container"
    facts = {"command": shown, "terminal": str(opening.terminal).lower()}
    leader.feed.note(Logged("EXEC", opening.runner_id, text, leader.clock.wall_s(), actor, facts))
    async for output in leader.sessions.execs.run(node_id, opening, _inputs(requests)):
        yield output


async def _inputs(requests: AsyncIterator[cluster_pb2.ExecRequest]) -> AsyncIterator[agent_pb2.ExecInput]:
    async for request in requests:
        if request.HasField("open"):
            raise invalid("open", request.open.runner_id, "came twice", remedy="Open another stream.")
        yield request.input


async def top_runner(leader: Leadership, request: cluster_pb2.TopRunnerRequest) -> agent_pb2.TopReply:
    """What a runner's container uses. NOT_FOUND, FAILED_PRECONDITION (no container), UNAVAILABLE."""
    reply = await leader.sessions.execs.top(_node_of(leader, request.id), request.id)
    if reply.error:
        raise FalError(Code.FAILED_PRECONDITION, reply.error, remedy="Look at `falctl runner show`.")
    return reply


def _node_of(leader: Leadership, runner_id: str) -> str:
    view = find_runner(leader.view, runner_id)
    if not view.runner.node:
        what = f"runner {runner_id!r} has no container: {view.reason}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Wait until it is on a node.")
    return view.runner.node
