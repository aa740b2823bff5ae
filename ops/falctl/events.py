"""`falctl events`: what happened, and with -f what happens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import GLOBALS, call


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    after: Annotated[int, typer.Option(help="Only events after this number.", min=0)] = 0,
    subject: Annotated[str, typer.Option(help="Only events about this runner, node, app …")] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON object; with -f one object a line.")] = False,
) -> None:
    """Events, oldest first."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_json_line, to_json

    request = pb.EventsRequest(follow=follow, after=after, subject=subject)
    collected: list[dict[str, Any]] = []

    async def work(stub: Any) -> None:
        async for event in stub.Events(request, timeout=None if follow else GLOBALS.timeout_s):
            if not json:
                typer.echo(event_line(event))
            elif follow:
                print_json_line(to_json(event))
            else:
                collected.append(to_json(event))

    call(work)
    if json and not follow:
        print_json("events", collected)


def event_line(event: Any) -> str:
    """`12:34:56  RUNNER_PLACED  default/digits-…  on node n1`."""
    from datetime import datetime

    stamp = datetime.fromtimestamp(event.time_s).strftime("%H:%M:%S")
    actor = f"  (by {event.actor})" if event.actor else ""
    return f"{event.number:>6}  {stamp}  {event.kind:<22} {event.subject}  {event.message}{actor}"
