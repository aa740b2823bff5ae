"""`falctl status`, `operator confirm`, `operator revoke` and `server init`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import unary
from falctl.pools import JsonFlag

operator_group = typer.Typer(help="What needs an operator's decision.", no_args_is_help=True)
server_group = typer.Typer(help="The scheduler itself.", no_args_is_help=True)

CONFIRMABLE = ("adopt", "stop", "stops", "store", "node")


@operator_group.callback()
def _operator() -> None:
    """Settles what waits for an operator, and refuses people and gateways."""


@server_group.callback()
def _server() -> None:
    """Keeps `init` a verb of its own although it is the only one."""


def status(json: JsonFlag = False) -> None:
    """Leader, store, counts and what waits for an operator."""
    from rich.markup import escape

    from fal_contract.units import format_duration
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_facts, print_json, to_json

    reply = unary("GetStatus", pb.GetStatusRequest())
    if json:
        print_json("status", to_json(reply))
        return
    print_facts(
        [
            ("cluster", f"{reply.cluster_id} (epoch {reply.epoch})"),
            ("leader", f"term {reply.term}, for {format_duration(reply.uptime_s)}, falctl {reply.software}"),
            ("store", f"{reply.store}, revision {reply.store_revision}"),
            ("nodes", _counts(reply.nodes)),
            ("GPUs", f"{reply.gpus_free} free of {reply.gpus}"),
            ("apps", str(reply.apps)),
            ("models", str(reply.models)),
            ("runners", _counts(reply.runners) or "none"),
        ]
    )
    for alarm in reply.alarms:
        text = escape(f"{alarm.subject}: {alarm.message.rstrip('.')}. {alarm.remedy}")
        console().print(f"[bold red]{escape(alarm.kind)}[/bold red] {text}", markup=True)


def _counts(counts: Any) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items()) if count)


@operator_group.command("revoke")
def revoke(
    subject: Annotated[str, typer.Argument(metavar="ROLE/NAME", help="Such as operator/ada or serving/gateway-1.")],
    reason: Annotated[str, typer.Option(help="Why, for the events.")] = "",
    json: JsonFlag = False,
) -> None:
    """Refuse a person's or gateway's present certificates everywhere; what is issued afterwards is good."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    reply = unary("Revoke", pb.RevokeRequest(subject=subject, reason=reason))
    if json:
        print_json("revocation", to_json(reply))
    else:
        console().print(f"{reply.subject}: every certificate issued until now is refused")


@operator_group.command("confirm")
def confirm(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(CONFIRMABLE)}.")],
    subject: Annotated[str, typer.Option(help="Only about this runner or node.")] = "",
    json: JsonFlag = False,
) -> None:
    """Settle what waits: adopt or stop orphans, let held stops go, trust the store, accept a node."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, to_json

    if what not in CONFIRMABLE:
        raise invalid("WHAT", what, "cannot be confirmed", remedy=f"Use one of {', '.join(CONFIRMABLE)}.")
    reply = unary("Confirm", pb.ConfirmRequest(what=what, subject=subject))
    if json:
        print_json("confirmed", to_json(reply))
    else:
        for line in reply.settled or ["nothing was waiting"]:
            typer.echo(line)


@server_group.command("init")
def server_init(
    data_dir: Annotated[Path, typer.Option(help="Folder of the new scheduler.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address it is reached at; repeatable.")] = None,
) -> None:
    """Make a cluster: its CA, the sealing key, and a first admin certificate."""
    argv = [daemon("fal-scheduler"), "init", "--data-dir", str(data_dir)]
    for name in host or []:
        argv += ["--host", name]
    os.execv(argv[0], argv)  # the scheduler's own code makes it; falctl must not import it


def daemon(name: str) -> str:
    """Path of one of our daemons: beside this interpreter, else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"{name} is not installed",
            remedy="Install the extras: pip install 'falctl[scheduler,agent]'.",
        )
    return found
