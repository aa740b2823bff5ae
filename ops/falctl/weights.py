"""`falctl weights`: models and LoRAs: what is registered, what is withdrawn, what may be forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from falctl.context import owned, team, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Models and LoRAs: register them, stage them on nodes, withdraw them.", no_args_is_help=True)
_PAGE = 2000  # a page holds the scheduler up for some 10 ms


@group.command("add")
def add(
    name: str,
    uri: Annotated[
        str,
        typer.Argument(help="s3://, gs://, az://, https://, hf://ORG/REPO[@REV], or file:///FOLDER of the scheduler."),
    ],
    kind: Annotated[str, typer.Option(help="model, lora or image.")] = "model",
    revision: Annotated[str, typer.Option("--rev", help="Branch, tag or commit; resolved to a commit once.")] = "",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Take .bin, .ckpt, .pt …: loading them runs their author's code.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Register a model. It may be staged at once, and counts once its content is attested."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    if "://" not in uri and Path(uri).exists():
        uri = Path(uri).resolve().as_uri()
    request = pb.AddModelRequest(
        id=owned(name, field="NAME"), uri=uri, revision=revision, kind=kind, allow_pickle=allow_pickle
    )
    view = unary("AddModel", request)
    if json:
        print_json("model", to_json(view))
        return
    console().print(f"{view.model.kind} {view.model.id} {state_word(view)}: {_size(view)}")
    if view.model.resolved_uri not in ("", uri):
        typer.echo(f"read from {view.model.resolved_uri}", err=True)


def state_word(view: Any) -> str:
    """`attested`."""
    from fal_contract.v1 import state_pb2
    from falctl.output import enum_word

    return enum_word(state_pb2.ModelState.Name(view.model.state)).lower()


def _size(view: Any) -> str:
    from fal_contract.units import format_bytes

    return f"{view.model.files} files, {format_bytes(view.model.bytes)}"


@group.command("list")
def list_models(
    prefix: Annotated[str, typer.Option(help="Only names that begin so.")] = "",
    kind: Annotated[str, typer.Option(help="Only model, lora, image or cache.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many; 0: all.", min=0)] = 1000,
    json: JsonFlag = False,
) -> None:
    """A team's models, in order of name."""
    from fal_contract.units import format_bytes
    from falctl.output import print_json, print_table, to_json

    views, total = _listed(prefix, kind, limit, brief=not json)
    if json:
        print_json("models", [to_json(view) for view in views])
    else:
        print_table(
            ("MODEL", "KIND", "STATE", "FILES", "SIZE", "NODES", "APPS", "FROM"),
            (
                (
                    view.model.id, view.model.kind, state_word(view), str(view.model.files),
                    format_bytes(view.model.bytes), _nodes(view), ", ".join(view.apps) or "-", view.model.uri,
                )
                for view in views
            ),
            empty="No models. Register one: falctl weights add NAME URI",
        )  # fmt: skip
    if len(views) < total:
        typer.echo(f"{len(views)} of {total} models; see --prefix, --kind and --limit 0", err=True)


def _listed(prefix: str, kind: str, limit: int, *, brief: bool) -> tuple[list[Any], int]:
    """Models of the team, a page a call over one connection, and how many there are."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.context import GLOBALS, call

    async def pages(stub: Any) -> tuple[list[Any], int]:
        views: list[Any] = []
        after, total = "", 0
        while True:
            left = limit - len(views) if limit else _PAGE
            request = pb.ListModelsRequest(
                team=owner, kind=kind, prefix=prefix, limit=min(left, _PAGE), after=after, brief=brief
            )
            reply = await stub.ListModels(request, timeout=GLOBALS.timeout_s)
            views += reply.models
            after, total = reply.next, reply.total
            if not after or (limit and len(views) >= limit):
                return views, total

    owner = team()
    return call(pages)


def _nodes(view: Any) -> str:
    """`3`, or `3 (+2)` while two bring it."""
    return f"{view.nodes_ready} (+{view.nodes_staging})" if view.nodes_staging else str(view.nodes_ready)


_ATTESTED_BY = {
    "digests": "the origin's digests, confirmed",
    "version": "every range came under one version of the origin's file; it does not publish the digest of each",
    "read": "the scheduler read the folder",
    "push": "an operator's upload",
    "build": "a build task of this cluster left it",
    "pack": "a task of this cluster packed it",
}


@group.command("show")
def show(name: str, json: JsonFlag = False) -> None:
    """One model with its files, digests and wishes."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_facts, print_json, print_table, to_json

    view = unary("GetModel", pb.GetModelRequest(id=owned(name, field="NAME")))
    if json:
        print_json("model", to_json(view))
        return
    model = view.model
    rests_on = _ATTESTED_BY.get(model.attestation, model.attestation)
    pieces = f"{view.pieces} of {format_bytes(view.piece_bytes)}" if view.piece_bytes else ""
    print_facts(
        [
            ("model", model.id),
            ("kind", model.kind),
            ("state", state_word(view)),
            ("reason", model.reason),
            ("from", model.uri),
            ("revision", model.revision),
            ("read from", model.resolved_uri if model.resolved_uri != model.uri else ""),
            ("artifact", model.artifact_id),
            ("manifest", model.manifest_digest),
            ("attested", f"{rests_on}; told by {model.attested_by}" if rests_on else ""),
            ("pickles", "allowed" if model.allow_pickle else ""),
            ("size", _size(view)),
            ("pieces", pieces),
            ("nodes", _nodes(view)),
            ("apps", ", ".join(view.apps)),
            *(("wish", text) for text in wish_texts(view.wishes)),
        ]
    )
    print_table(
        ("FILE", "SIZE", "SHA-256"),
        ((file.path, format_bytes(file.bytes), file.sha256.hex() or "not known yet") for file in view.files),
        empty="No files.",
    )


def wish_texts(wishes: Any) -> Iterator[str]:
    """`pool/east on disk, for 2h00m more`."""
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration

    now_s = SystemClock().wall_s()
    for wish in wishes:
        where = f"{wish.replicas} nodes" if wish.target == "replicas" else wish.target
        left_s = wish.expires_at_s - now_s
        until = "until it is taken back" if not wish.expires_at_s else f"for {format_duration(max(0.0, left_s))} more"
        yield f"{where}, {wish.tier}, {until}"


@group.command("revoke")
def revoke(
    name: str,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for everyone who meets it.")] = "",
    json: JsonFlag = False,
) -> None:
    """Withdraw a model for good: its runners stop, every node drops its files, also those that are off now."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("RevokeModel", pb.RevokeModelRequest(id=owned(name, field="NAME"), reason=reason))
    if json:
        print_json("model", to_json(view))
        return
    users = f"; apps that name it wait for another model: {', '.join(view.apps)}" if view.apps else ""
    console().print(f"{view.model.kind} {view.model.id} revoked: {view.model.reason}{users}")


@group.command("gc")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    json: JsonFlag = False,
) -> None:
    """Forget refused and revoked models that no app names and no node has, wishes that ended, stray manifests.

    Revoked ones are remembered while any node is out of reach: it may have them, and must be told.
    """
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    reply = unary("CollectModels", pb.CollectModelsRequest(dry_run=dry_run))
    if json:
        print_json("collected", to_json(reply))
        return
    word = "would go" if dry_run else "gone"
    for model in reply.models:
        console().print(f"{model} {word}")
    counts = f"{len(reply.models)} models, {len(reply.wishes)} wishes, {reply.blobs} manifests"
    console().print(f"{counts} {word}")
