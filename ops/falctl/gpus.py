"""`falctl gpu`: devices of all nodes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import unary
from falctl.pools import JsonFlag

group = typer.Typer(help="GPUs of all nodes.", no_args_is_help=True)


@group.command("list")
def list_gpus(
    free: Annotated[bool, typer.Option("--free", help="Only those that no runner holds.")] = False,
    sick: Annotated[bool, typer.Option("--sick", help="Only those that are not healthy.")] = False,
    json: JsonFlag = False,
) -> None:
    """All GPUs, with their health and who holds them."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    rows: list[dict[str, Any]] = []
    holders = _holders(unary("ListRunners", pb.ListRunnersRequest()).runners)
    for view in unary("ListNodes", pb.ListNodesRequest()).nodes:
        idle = set(view.gpus_free)
        for gpu in view.inventory.gpus:
            row = {**to_json(gpu), "node": view.node.id, "node_name": view.node.name, "pool": view.node.pool}
            row |= {"free": gpu.id in idle, "runner": holders.get((view.node.id, gpu.id), "")}
            if (not free or row["free"]) and (not sick or row["health"] != "OK"):
                rows.append(row)
    if json:
        print_json("gpus", rows)
        return
    print_table(
        ("GPU", "NODE", "POOL", "MODEL", "MEMORY", "°C", "HEALTH", "RUNNER"),
        (
            (
                row["id"], row["node_name"], row["pool"], f"{row['model']} {row['mig_profile']}".strip(),
                format_bytes(row["memory_bytes"]), str(row["temperature_c"]),
                row["health"] + (f": {row['health_reason']}" if row["health_reason"] else ""),
                row["runner"] or ("free" if row["free"] else "-"),
            )
            for row in rows
        ),
        empty="No GPUs match.",
    )  # fmt: skip


def _holders(runners: Any) -> dict[tuple[str, str], str]:
    return {(view.runner.node, gpu): view.runner.id for view in runners for gpu in view.runner.gpus}
