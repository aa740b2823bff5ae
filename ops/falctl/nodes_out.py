"""`falctl node drain|maintenance|reboot|rm|label`, `falctl pool declare-lost`: machines that are taken out."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Final

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import unary
from falctl.nodes import group
from falctl.pools import JsonFlag
from falctl.pools import group as pool_group

DEADLINE: Final = "1h"
_POLL_S: Final = 0.5

Reason = Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")]
Monitor = Annotated[bool, typer.Option("--monitor", help="Follow it until it is done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@group.command("drain")
def drain(
    node: str,
    deadline: Annotated[str, typer.Option(help="What is left is stopped then: 90s, 15m, 1h.")] = DEADLINE,
    no_deadline: Annotated[bool, typer.Option("--no-deadline", help="Nothing is ever stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Stop everything at once.")] = False,
    uncordon: Annotated[
        bool, typer.Option("--uncordon/--keep-cordoned", help="Use it again when it is empty, or not.")
    ] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End a drain: what still runs stays.")] = False,
    reason: Reason = "",
    monitor: Monitor = False,
    json: JsonFlag = False,
) -> None:
    """Let a node's runners leave it: replaced first, drained then."""
    from fal_contract.units import parse_duration_s

    if cancel and (force or no_deadline or uncordon or monitor or deadline != DEADLINE):
        raise invalid("--cancel", node, "takes no other option", remedy="Give --cancel alone.")
    if force and no_deadline:
        raise invalid("--no-deadline", node, "means nothing with --force", remedy="Give one of them.")
    if no_deadline and deadline != DEADLINE:
        raise invalid("--deadline", deadline, "means nothing with --no-deadline", remedy="Give one of them.")
    if cancel:
        _told(_ask(node, cancel=True), json)
        return
    deadline_s = None if no_deadline else parse_duration_s(deadline, field="--deadline")
    view = _ask(node, kind="drain", deadline_s=deadline_s, force=force, uncordon=uncordon, reason=reason)
    _told_or_followed(view, json, monitor=monitor)


@group.command("maintenance")
def maintenance(
    node: str,
    on: Annotated[bool, typer.Option("--on/--off", help="Begin, or end.")] = True,
    reason: Reason = "",
    monitor: Monitor = False,
    json: JsonFlag = False,
) -> None:
    """Take a node out for as long as it takes; nothing that serves is stopped."""
    if not on:
        _told(_ask(node, cancel=True), json)
        return
    _told_or_followed(_ask(node, kind="maintenance", reason=reason), json, monitor=monitor)


@group.command("reboot")
def reboot(
    node: str,
    deadline: Annotated[str, typer.Option(help="What is left is stopped then.")] = DEADLINE,
    reason: Reason = "",
    monitor: Monitor = False,
    json: JsonFlag = False,
) -> None:
    """Drain a node, reboot its machine, use it again when it is back."""
    from fal_contract.units import parse_duration_s

    deadline_s = parse_duration_s(deadline, field="--deadline")
    _told_or_followed(_ask(node, kind="reboot", deadline_s=deadline_s, reason=reason), json, monitor=monitor)


@group.command("rm")
def remove(
    node: str,
    force: Annotated[bool, typer.Option("--force", help="Give up whatever it runs.")] = False,
    json: JsonFlag = False,
) -> None:
    """Forget a node that is drained or lost; its certificates are refused from then on."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    reply = unary("RemoveNode", pb.RemoveNodeRequest(node=node, force=force))
    if json:
        print_json("node", to_json(reply))
    else:
        console().print(f"node {reply.node} is forgotten" + (f" ({reply.runners} runners given up)" if force else ""))


@group.command("label")
def label(
    node: str,
    labels: Annotated[list[str], typer.Argument(metavar="NAME=VALUE|NAME-", help="Set, or remove with a dash.")],
    json: JsonFlag = False,
) -> None:
    """Set and remove labels of a node's own; they win over its pool's."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    request = pb.LabelNodeRequest(node=node)
    for word in labels:
        name, equals, value = word.partition("=")
        if not equals:
            name = word[:-1]
        if not name or not (equals or word.endswith("-")):
            raise invalid("NAME=VALUE", word, "is no label", remedy="Write NAME=VALUE, or NAME- to remove it.")
        if name in request.put or name in request.drop:
            raise invalid("NAME=VALUE", word, f"names the label {name} again", remedy="Name each label once.")
        if equals:
            request.put[name] = value
        else:
            request.drop.append(name)
    view = unary("LabelNode", request)
    if json:
        print_json("node", to_json(view))
    else:
        told = ", ".join(f"{name}={value}" for name, value in sorted(view.node.labels.items()))
        console().print(f"node {view.node.name}: {told or 'no labels of its own'}")


@pool_group.command("declare-lost")
def declare_lost(name: str, yes: Yes = False, json: JsonFlag = False) -> None:
    """Say that what is silent in a pool is gone: its runners are replaced although nobody else may speak."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    if not yes:
        question = f"Runners on silent nodes of pool {name} may still serve. Replace them?"
        if not sys.stdin.isatty() or not typer.confirm(question, err=True):
            what = f"pool {name} was not declared lost"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Say yes, or give --yes.")
    reply = unary("DeclareLost", pb.DeclareLostRequest(pool=name))
    if json:
        print_json("pool", to_json(reply))
    else:
        console().print(f"pool {name}: {reply.nodes} silent nodes are lost, {reply.runners} runners are replaced")


def _ask(
    node: str,
    *,
    cancel: bool = False,
    kind: str = "",
    deadline_s: float | None = None,
    force: bool = False,
    uncordon: bool = False,
    reason: str = "",
) -> Any:
    from fal_contract.v1 import cluster_pb2 as pb

    return unary(
        "DrainNode",
        pb.DrainNodeRequest(
            node=node, cancel=cancel, kind=kind, deadline_s=deadline_s, force=force, uncordon=uncordon, reason=reason
        ),
    )


def _told(view: Any, json: bool) -> None:
    from falctl.output import console, print_json, to_json

    if json:
        print_json("node", to_json(view))
    else:
        console().print(f"node {view.node.name}: {drain_text(view)}")


def _told_or_followed(view: Any, json: bool, *, monitor: bool) -> None:
    if monitor:
        _follow(view.node.id, json)
    else:
        _told(view, json)


def drain_text(view: Any) -> str:
    """`drain, 3 runners left, 59m to the deadline`."""
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration

    if not view.node.HasField("drain"):
        return view.node.cordon_reason or ("cordoned" if view.node.cordoned else "in use")
    found = view.node.drain
    words = [found.kind, f"{len(view.runners)} runners left"]
    if found.notice:
        words.insert(1, f"beside {found.notice}")
    if deadlines := [at_s for at_s in (found.deadline_at_s, found.notice_at_s) if at_s]:
        left_s = max(0.0, min(deadlines) - SystemClock().wall_s())
        words.append(f"{format_duration(left_s)} to the deadline")
    return ", ".join(words)


def _follow(node: str, json: bool) -> None:
    """Until the drain is over. Raises FalError where it was cancelled, or the machine was not rebooted."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console

    last = ""
    while True:
        try:
            view = unary("ListNodes", pb.ListNodesRequest(node=node)).nodes[0]
        except FalError as error:
            if error.code is Code.NOT_FOUND:
                return  # it was to be removed
            raise
        text, left = drain_text(view), f"{len(view.runners)} of {view.node.cordon_reason}"
        if not json and left != last:  # the deadline comes nearer all the time
            console().print(f"node {view.node.name}: {text}")
        last = left
        if not view.node.HasField("drain"):
            if view.node.cordon_reason.startswith("not rebooted"):
                what = f"node {view.node.name} was {view.node.cordon_reason}"
                remedy = f"Reboot it by hand; then `falctl node uncordon {view.node.name}`."
                raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy)
            if not view.node.cordoned and view.runners:
                what = f"the drain of node {view.node.name} was cancelled, {len(view.runners)} runners are left"
                raise FalError(Code.FAILED_PRECONDITION, what, remedy="Begin it again.")
            if json:
                _told(view, json)
            return
        time.sleep(_POLL_S)
