"""`falctl weights`: models and LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from falctl.context import owned, team, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Models and LoRAs.", no_args_is_help=True)


@group.command("add")
def add(
    name: str,
    uri: Annotated[str, typer.Argument(help="file:///absolute/folder, as the scheduler sees it.")],
    kind: Annotated[str, typer.Option(help="model or lora.")] = "model",
    revision: Annotated[str, typer.Option("--rev", help="Branch, tag or commit.")] = "",
    json: JsonFlag = False,
) -> None:
    """Register a model; its digests are taken before it counts."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    if "://" not in uri and Path(uri).exists():
        uri = Path(uri).resolve().as_uri()
    request = pb.AddModelRequest(id=owned(name, field="NAME"), uri=uri, revision=revision, kind=kind)
    view = unary("AddModel", request)
    if json:
        print_json("model", to_json(view))
    else:
        console().print(f"{view.model.kind} {view.model.id} {_state(view)}: {_size(view)}")


def _state(view: Any) -> str:
    from fal_contract.v1 import state_pb2
    from falctl.output import enum_word

    return enum_word(state_pb2.ModelState.Name(view.model.state)).lower()


def _size(view: Any) -> str:
    from fal_contract.units import format_bytes

    return f"{view.model.files} files, {format_bytes(view.model.bytes)}"


@group.command("list")
def list_models(json: JsonFlag = False) -> None:
    """A team's models."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListModels", pb.ListModelsRequest(team=team())).models
    if json:
        print_json("models", [to_json(view) for view in views])
        return
    print_table(
        ("MODEL", "KIND", "STATE", "FILES", "SIZE", "APPS", "FROM"),
        (
            (
                view.model.id, view.model.kind, _state(view), str(view.model.files), format_bytes(view.model.bytes),
                ", ".join(view.apps) or "-", view.model.uri,
            )
            for view in views
        ),
        empty="No models. Register one: falctl weights add NAME file:///folder",
    )  # fmt: skip


@group.command("show")
def show(name: str, json: JsonFlag = False) -> None:
    """One model with its files and digests."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_facts, print_json, print_table, to_json

    view = unary("GetModel", pb.GetModelRequest(id=owned(name, field="NAME")))
    if json:
        print_json("model", to_json(view))
        return
    print_facts(
        [
            ("model", view.model.id),
            ("kind", view.model.kind),
            ("state", _state(view)),
            ("reason", view.model.reason),
            ("from", view.model.uri),
            ("manifest", view.model.manifest_digest),
            ("size", _size(view)),
            ("apps", ", ".join(view.apps)),
        ]
    )
    print_table(
        ("FILE", "SIZE", "SHA-256"),
        ((file.path, format_bytes(file.bytes), file.sha256.hex()) for file in view.files),
        empty="No files.",
    )
