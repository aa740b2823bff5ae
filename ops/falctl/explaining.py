"""`falctl explain`: why an app, a runner, a node or a request is as it is, and what would change it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import GLOBALS, call, owned, team, unary
from falctl.pools import JsonFlag

EXPLAINED: Final = ("app", "runner", "node", "request")
LOOKED_THROUGH: Final = 5000  # lines of each runner's output, for a request's id


def explain(
    subject: Annotated[str, typer.Argument(help="What to explain, or its kind: app, runner, node or request.")],
    name: Annotated[str, typer.Argument(help="Its name, after a kind; a request's id.")] = "",
    app: Annotated[str, typer.Option("--app", help="Of a request: the app that it was sent to.")] = "",
    json: JsonFlag = False,
) -> None:
    """Why an app, a runner, a node or a request is as it is, and what would change it."""
    from rich.markup import escape

    from falctl.output import console, print_json, print_table, to_json

    if name and subject not in EXPLAINED:
        raise invalid("KIND", subject, "is none", remedy=f"Use one of {', '.join(EXPLAINED)}.")
    if subject == "request":
        explain_request(name, app, json)
        return
    reply = _explained(name, subject) if name else _explained(subject)
    if json:
        print_json("explanation", to_json(reply))
        return
    out = console()
    out.print(f"[bold]{reply.kind}[/bold] {escape(reply.summary)}", markup=True)
    for line in reply.lines:
        typer.echo(f"  {line}")
    if reply.parts:
        print_table(
            ("PART", "PREDICTED MS", "ACTUAL MS", "BECAUSE"),
            ((p.name, _ms(p.predicted_ms), _ms(p.actual_ms), p.because) for p in reply.parts),
            empty="",
        )
    if reply.placement.nearest_miss:
        out.print(f"nearest miss: {reply.placement.nearest_miss}")
    for number, change in enumerate(reply.admissions):
        out.print(f"{'would admit it' if not number else '           or'}: {change.text}  ({change.command})")
    if reply.verdicts:
        print_table(
            ("NODE", "FITS", "PLACE", "REFUSED BY", "BECAUSE"),
            (
                (
                    v.node_name or v.node_id,
                    "yes" if v.feasible else "no",
                    str(v.score + 1) if v.feasible else "-",
                    v.filter,
                    v.detail or ", ".join(f"{term} {value}" for term, value in sorted(v.why.items())),
                )
                for v in reply.verdicts
            ),
            empty="",
        )


def _ms(value: int) -> str:
    return str(value) if value >= 0 else "-"


def explain_request(request_id: str, app: str, json: bool) -> None:
    """Where a request waits or ran: the line of its app, and the runners whose output names it."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    if not request_id:
        raise invalid("ID", request_id, "is missing", remedy="falctl explain request ID --app APP")
    if not app:
        raise invalid("--app", app, "is missing", remedy="Name the app that the request was sent to.")
    name = owned(app, field="--app")
    reply = unary("Explain", pb.ExplainRequest(subject=name, kind="request"))
    views = unary("ListRunners", pb.ListRunnersRequest(app=name)).runners
    found = [view.runner.id for view in views if _names(view.runner.id, request_id)]
    words = f"its output is on {', '.join(found)}" if found else "no runner's output names it"
    if json:
        print_json("explanation", {**to_json(reply), "request": request_id, "runners": found})
        return
    console().print(f"request {request_id}: {words}")
    typer.echo(f"  {reply.summary}")
    for line in reply.lines:
        typer.echo(f"  {line}")


def _names(runner_id: str, request_id: str) -> bool:
    """Whether a runner's kept output has a line of this request."""
    from fal_contract.v1 import cluster_pb2 as pb

    async def work(stub: Any) -> bool:
        asked = pb.RunnerLogsRequest(id=runner_id, tail_lines=LOOKED_THROUGH, request_id=request_id)
        async for chunk in stub.RunnerLogs(asked, timeout=GLOBALS.timeout_s):
            if chunk.lines:
                return True
        return False

    try:
        return call(work)
    except FalError:
        return False  # it has not started, or its node is silent


def _explained(value: str, kind: str = "") -> Any:
    """What the scheduler says about an app or runner of the team, or about a node by id or name."""
    from fal_contract.v1 import cluster_pb2 as pb

    meant = [value] if "/" in value else [f"{team()}/{value}", value]
    if value.startswith("n-"):
        meant.reverse()
    for number, subject in enumerate(meant, start=1):
        try:
            return unary("Explain", pb.ExplainRequest(subject=subject, kind=kind))
        except FalError as error:
            if error.code is not Code.NOT_FOUND or number == len(meant):
                raise
    raise AssertionError("the last one returns or raises")
