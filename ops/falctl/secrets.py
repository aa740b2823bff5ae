"""`falctl secret`: values that apps find as files, and nobody reads back."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from falctl.context import owned, team, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Secrets of a team: apps name them, containers find them as files.", no_args_is_help=True)


@group.command("set")
def set_secret(
    name: Annotated[str, typer.Argument(help="Its name, or TEAM/NAME.")],
    from_file: Annotated[Path | None, typer.Option("--from-file", help="File with the value; else stdin.")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a secret, or change it: runners that start from then on get it.

    The value is taken byte for byte from a file or from stdin, never from the command line, which others can read. On
    a terminal it is one line, typed without being shown.
    """
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    id_ = owned(name, field="secret")
    view = unary("SetSecret", pb.SetSecretRequest(id=id_, value=_value(from_file)))
    if json:
        print_json("secret", to_json(view))
    else:
        console().print(f"secret {view.id} set ({view.bytes} bytes, generation {view.generation})")


def _value(from_file: Path | None) -> bytes:
    """At most one byte more than a secret may have, so that the scheduler's word on it is the error."""
    from fal_contract.errors import Code, FalError, invalid
    from fal_contract.limits import SECRET_BYTES_MAX

    if from_file is not None:
        try:
            with from_file.open("rb") as file:
                value = file.read(SECRET_BYTES_MAX + 1)
        except OSError as exc:
            what = f"{from_file} cannot be read: {exc.strerror}"
            raise FalError(Code.NOT_FOUND, what, remedy="Name another file.", field="from-file") from None
    elif sys.stdin.isatty():
        typer.echo("Type the value and Enter. It is not shown, and the end of the line is not part of it.", err=True)
        try:
            value = getpass.getpass("Value: ").encode(errors="surrogateescape")
        except EOFError:
            value = b""
    else:
        value = sys.stdin.buffer.read(SECRET_BYTES_MAX + 1)
    if not value:
        raise invalid("value", "nothing", "is empty", remedy="Give it by --from-file FILE or on stdin.")
    return value


@group.command("list")
def list_secrets(
    every: Annotated[bool, typer.Option("--all", help="Of all teams.")] = False, json: JsonFlag = False
) -> None:
    """Secrets of the team, without their values."""
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListSecrets", pb.ListSecretsRequest(team="" if every else team())).secrets
    if json:
        print_json("secrets", [to_json(view) for view in views])
        return
    now_s = SystemClock().wall_s()

    def age(view: Any) -> str:
        return f"{format_duration(max(0.0, now_s - view.updated_at_s))} ago"

    print_table(
        ("SECRET", "BYTES", "GENERATION", "SET", "BY", "APPS"),
        (
            (
                view.id, str(view.bytes), str(view.generation), age(view), view.updated_by, ", ".join(view.apps),
            )
            for view in views
        ),
        empty="No secrets. Make one: falctl secret set NAME --from-file FILE",
    )  # fmt: skip


@group.command("unset")
def unset_secret(name: Annotated[str, typer.Argument(help="Its name, or TEAM/NAME.")], json: JsonFlag = False) -> None:
    """Forget a secret that no app names."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("UnsetSecret", pb.UnsetSecretRequest(id=owned(name, field="secret")))
    if json:
        print_json("secret", to_json(view))
    else:
        console().print(f"secret {view.id} is forgotten; runners that have it keep it until they end")
