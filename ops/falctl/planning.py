"""`falctl plan`: what applying manifests would do. Exit 0: nothing, 1: changes, 2: it would be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fal_contract.errors import FalError
from falctl.context import unary
from falctl.pools import JsonFlag


def plan(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Manifests of pools and apps, in this order.")
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", "-f", help="The same, as `apply` has it; repeat. None: app.toml.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """What applying these manifests would do: exit 0 nothing, 1 changes, 2 refused."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_error, print_json, to_json

    try:
        items = [_item(one) for one in [*(files or ()), *(file or ())] or [Path("app.toml")]]
        reply = unary("Plan", pb.PlanRequest(items=items))
    except FalError as error:
        print_error(error)
        raise typer.Exit(2) from None
    changes = any(item.outcome != "unchanged" for item in reply.items)
    if json:
        print_json("plan", {"changes": changes, **to_json(reply)})
    else:
        for item in reply.items:
            _show(item)
    raise typer.Exit(int(changes))


def is_pool(keys: set[str]) -> bool:
    """Whether a manifest with these keys is a pool's. An app's has a key that only apps have, or one like it."""
    from fal_contract.config import nearest
    from fal_contract.manifest import AppManifest, PoolManifest

    apps, pools = set(AppManifest.model_fields), set(PoolManifest.model_fields)
    if keys & (pools - apps) or not keys:
        return bool(keys)
    return not (keys & (apps - pools) or any(nearest(key, sorted(apps - pools)) for key in sorted(keys - apps)))


def _item(file: Path) -> Any:
    """What is asked about a manifest."""
    import tomllib

    import yaml

    from fal_contract.manifest import AppManifest, PoolManifest, read_manifest
    from fal_contract.v1 import cluster_pb2 as pb

    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text) if file.suffix.lower() == ".toml" else yaml.safe_load(text)
        keys = set(map(str, data)) if isinstance(data, dict) else set()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError):
        keys = set()  # reading it as an app's manifest says what is wrong
    if is_pool(keys):
        return pb.PlanItem(pool=pb.ApplyPoolRequest(pool=read_manifest(PoolManifest, file).to_proto()))
    manifest = read_manifest(AppManifest, file)
    return pb.PlanItem(app=pb.ApplyAppRequest(id=manifest.id, spec=manifest.to_proto()))


def _show(item: Any) -> None:
    from falctl.output import console

    console().print(f"{item.kind} {item.name}: would be {item.outcome}" + (f", {item.rollout}" if item.rollout else ""))
    for change in item.changes:
        typer.echo(f"  {change.field}: {change.before or '-'} → {change.after or '-'}")
    for start in item.starts:
        if start.node_id:
            ready = f", ready in {start.ready_ms / 1000:.1f} s" if start.ready_ms >= 0 else ""
            typer.echo(f"  + a runner of {start.app} on {start.node_name or start.node_id} ({start.gpus} GPUs{ready})")
        else:
            typer.echo(f"  ? a runner of {start.app} would wait: {start.reason}")
    for verb, runners in (("drained", item.drains), ("stopped", item.stops)):
        for runner in runners:
            typer.echo(f"  - {runner} would be {verb}")
    if item.cost_micros_per_hour:
        typer.echo(f"  cost per hour: {item.cost_micros_per_hour / 1_000_000:+.4f} USD")
    for warning in item.warnings:
        typer.echo(f"warning: {warning}", err=True)


__all__ = ["plan"]
