"""`falctl pool`: groups of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from falctl.context import unary

group = typer.Typer(help="Groups of nodes: cloud, region, failure domain, price.", no_args_is_help=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object under a noun, nothing else.")]


@group.command("apply")
def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="Pool manifest, TOML or YAML.")],
    json: JsonFlag = False,
) -> None:
    """Make or change a pool."""
    from fal_contract.manifest import PoolManifest, read_manifest
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    manifest = read_manifest(PoolManifest, file)
    reply = unary("ApplyPool", pb.ApplyPoolRequest(pool=manifest.to_proto()))
    if json:
        print_json("pool", {**to_json(reply.pool), "outcome": reply.outcome})
    else:
        console().print(f"pool {reply.pool.name} {reply.outcome}")


@group.command("list")
def list_pools(json: JsonFlag = False) -> None:
    """All pools."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListPools", pb.ListPoolsRequest()).pools
    if json:
        print_json("pools", [to_json(view) for view in views])
        return
    print_table(
        ("POOL", "CLOUD", "REGION", "ZONE", "NODES", "GPUS", "FREE", "$/GPU-H"),
        (
            (
                view.pool.name, view.pool.cloud, view.pool.region, view.pool.zone or view.pool.name,
                f"{view.nodes_ready}/{view.nodes}", str(view.gpus), str(view.gpus_free),
                f"{view.pool.gpu_hour_price_micros / 1e6:.2f}",
            )
            for view in views
        ),
        empty="No pools. Make one: falctl pool apply -f pool.toml",
    )  # fmt: skip


@group.command("show")
def show(name: str, json: JsonFlag = False) -> None:
    """One pool."""
    from fal_contract.errors import not_found
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_facts, print_json, to_json

    views: list[Any] = [v for v in unary("ListPools", pb.ListPoolsRequest()).pools if v.pool.name == name]
    if not views:
        raise not_found("pool", name, remedy="See `falctl pool list`.")
    view = views[0]
    if json:
        print_json("pool", to_json(view))
        return
    pool = view.pool
    print_facts(
        [
            ("pool", pool.name),
            ("cloud", pool.cloud),
            ("region", pool.region),
            ("zone", pool.zone or pool.name),
            ("nodes", f"{view.nodes_ready} ready of {view.nodes}"),
            ("GPUs", f"{view.gpus_free} free of {view.gpus}"),
            ("price", f"{pool.gpu_hour_price_micros / 1e6:.2f} $ per GPU hour"),
            ("egress", f"{pool.egress_gib_price_micros / 1e6:.3f} $ per GiB"),
            ("networks", ", ".join(pool.networks)),
            ("spot", "yes" if pool.spot else "no"),
            ("trusted", "yes" if pool.trusted_network else "no"),
            ("labels", ", ".join(f"{k}={v}" for k, v in sorted(pool.labels.items()))),
        ]
    )
