"""`falctl gpu`: devices of all nodes; one taken out, given back, cut."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import typer

from falctl.context import GLOBALS, listed, unary
from falctl.nodes import node_request
from falctl.pools import JsonFlag

group = typer.Typer(help="GPUs of all nodes.", no_args_is_help=True)

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Node, by id or name.")]
GpuArgument = Annotated[str, typer.Argument(metavar="GPU", help="Its id, the beginning of it, or its index.")]
# A diagnose with a reset before it takes its time; the node's own limit ends it sooner.
_PATIENCE_S: Final = 320.0
_PART: Final = re.compile(r"(?:(\d{1,2})x)?(\S+)")
_SHORT: Final = {"NVLINK": "NV", "PCIE_SWITCH": "PIX", "PCIE_HOST": "PHB", "SYSTEM": "SYS"}


@group.command("list")
def list_gpus(
    free: Annotated[bool, typer.Option("--free", help="Only those that no runner holds.")] = False,
    sick: Annotated[bool, typer.Option("--sick", help="Only those that are not healthy.")] = False,
    json: JsonFlag = False,
) -> None:
    """All GPUs, with their health and who holds them."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table

    rows = _rows(pb.ListNodesRequest())
    rows = [row for row in rows if (not free or row["free"]) and (not sick or row["health"] != "OK")]
    if json:
        print_json("gpus", rows)
        return
    print_table(
        ("GPU", "NODE", "POOL", "MODEL", "MEMORY", "°C", "HEALTH", "RUNNER"),
        (
            (
                row["id"], row["node_name"], row["pool"], f"{row['model']} {row['mig_profile']}".strip(),
                format_bytes(row["memory_bytes"]), str(row["temperature_c"]), health_text(row),
                holders_text(row) or ("free" if row["free"] else "-"),
            )
            for row in rows
        ),
        empty="No GPUs match.",
    )  # fmt: skip


def _rows(request: Any) -> list[dict[str, Any]]:
    """One for each GPU of the nodes asked for, with who holds it."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import to_json

    rows: list[dict[str, Any]] = []
    holders = _holders(listed("ListRunners", pb.ListRunnersRequest(), "runners"))
    for view in listed("ListNodes", request, "nodes"):
        idle = set(view.gpus_free)
        for gpu in view.inventory.gpus:
            row = {**to_json(gpu), "node": view.node.id, "node_name": view.node.name, "pool": view.node.pool}
            held = holders.get((view.node.id, gpu.id), [])
            # `runner`: the first, as this said before several could share one.
            shares = {one.id: one.gpu_milli / 1000 if one.gpu_milli else 1.0 for one in held}
            row |= {"free": gpu.id in idle, "runner": next(iter(shares), ""), "runners": list(shares)}
            rows.append(row | {"shares": shares})
    return rows


def _holders(runners: Any) -> dict[tuple[str, str], list[Any]]:
    held: dict[tuple[str, str], list[Any]] = {}
    for view in runners:
        for gpu in view.runner.gpus:
            held.setdefault((view.runner.node, gpu), []).append(view.runner)
    return held


def holders_text(row: dict[str, Any]) -> str:
    """Who holds it; those that share it with their share: `default/a-1 (0.5)`."""
    return ", ".join(id_ if share == 1.0 else f"{id_} ({share:g})" for id_, share in row["shares"].items())


def health_text(row: dict[str, Any]) -> str:
    """`OK`, or what is wrong: `QUARANTINED (reset): XID 48 …`."""
    word = str(row["health_state"]).upper() or row["health"]
    kind = f" ({row['health_class']})" if row["health_class"] else ""
    return f"{word}{kind}" + (f": {row['health_reason']}" if row["health_reason"] else "")


@group.command("show")
def show(node: NodeArgument, gpu: GpuArgument, json: JsonFlag = False) -> None:
    """One GPU: what it is, how it is, who holds it."""
    from datetime import datetime

    from fal_contract.units import format_bytes
    from falctl.output import print_facts, print_json

    row = _named(_rows(node_request(node)), node, gpu)
    if json:
        print_json("gpu", row)
        return
    print_facts(
        [
            ("GPU", row["id"]),
            ("node", f"{row['node_name']} ({row['node']}), pool {row['pool']}"),
            ("index", str(row["index"])),
            ("model", f"{row['model']} ({row['product']})"),
            ("memory", f"{format_bytes(row['memory_used_bytes'])} of {format_bytes(row['memory_bytes'])} in use"),
            ("instance", f"{row['mig_profile']} of {row['parent_id']}" if row["parent_id"] else ""),
            ("health", health_text(row)),
            ("since", f"{datetime.fromtimestamp(row['health_since_s']):%F %T}" if row["health_since_s"] else ""),
            ("diagnoses", f"{row['diagnoses']} by itself" if row["diagnoses"] else ""),
            ("ECC", f"{row['ecc_uncorrected']} uncorrected since the last reset"),
            ("now", f"{row['temperature_c']} °C, {row['power_w']} W"),
            ("place", f"PCI {row['pci_bus_id']}" + (f", NUMA {row['numa_node']}" if row["numa_node"] >= 0 else "")),
            ("links", ", ".join(f"{link['count']} {link['kind']} to {link['peer_id']}" for link in row["links"])),
            ("runners", holders_text(row) or ("free" if row["free"] else "none, and not free")),
        ]
    )


def _named(rows: list[dict[str, Any]], node: str, name: str) -> dict[str, Any]:
    """The row of a GPU by id, beginning or index. NOT_FOUND, INVALID."""
    from fal_contract.errors import invalid, not_found

    exact = [row for row in rows if row["id"] == name or (name.isdecimal() and row["index"] == int(name))]
    found = exact or [row for row in rows if name and row["id"].startswith(name)]
    if not found:
        remedy = f"Node {node} has {', '.join(row['id'] for row in rows[:8]) or 'told of none'}."
        raise not_found("GPU", name, remedy=remedy)
    if len(found) > 1:
        remedy = f"Name one of {', '.join(row['id'] for row in found[:8])}."
        raise invalid("gpu", name, f"names {len(found)} GPUs of node {node}", remedy=remedy)
    return found[0]


@group.command("topo")
def topo(node: NodeArgument, json: JsonFlag = False) -> None:
    """How the GPUs of a node are joined: NVLinks (NV with their number), PCIe switch, host bridge, between sockets."""
    from falctl.output import print_json, print_table

    rows = _rows(node_request(node))
    joined = {row["id"]: {link["peer_id"]: link for link in row["links"]} for row in rows}
    if json:
        shown = [{name: row[name] for name in ("id", "index", "model", "numa_node", "links")} for row in rows]
        print_json("topology", shown)
        return
    print_table(
        ("GPU", "MODEL", "NUMA", *(f"#{row['index']}" for row in rows)),
        (
            (
                f"#{row['index']} {row['id']}", row["model"], str(row["numa_node"]) if row["numa_node"] >= 0 else "-",
                *(_joint(joined[row["id"]].get(other["id"]), row is other) for other in rows),
            )
            for row in rows
        ),
        empty="The node has told of no GPUs.",
    )  # fmt: skip


def _joint(link: dict[str, Any] | None, same: bool) -> str:
    if same or link is None:
        return "X" if same else "-"
    word = _SHORT.get(link["kind"], link["kind"])
    return f"{word}{link['count']}" if link["kind"] == "NVLINK" else word


@group.command("quarantine")
def quarantine(
    node: NodeArgument,
    gpu: GpuArgument,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")],
    json: JsonFlag = False,
) -> None:
    """Take one GPU out: nothing new is placed on it, its runners are replaced elsewhere, then drained."""
    from fal_contract.errors import invalid
    from fal_contract.v1 import cluster_pb2 as pb

    if not reason.strip():
        raise invalid("--reason", reason, "says nothing", remedy="Say why, for others.")
    reply = unary("QuarantineGpu", pb.QuarantineGpuRequest(node=node, gpu=gpu, reason=reason))
    _tell(reply, f"GPU {reply.gpu} of {node} is quarantined", json)


@group.command("release")
def release(
    node: NodeArgument,
    gpu: GpuArgument,
    force: Annotated[bool, typer.Option("--force", help="Do not look at it first.")] = False,
    json: JsonFlag = False,
) -> None:
    """Give one GPU back: its node resets it where its fault asks for that, and looks at it first."""
    from fal_contract.v1 import cluster_pb2 as pb

    GLOBALS.timeout_s = max(GLOBALS.timeout_s, _PATIENCE_S)
    reply = unary("ReleaseGpu", pb.ReleaseGpuRequest(node=node, gpu=gpu, force=force))
    _tell(reply, f"GPU {reply.gpu} of {node} may be used again", json)


@group.command("mig")
def mig(
    node: NodeArgument,
    gpu: GpuArgument,
    layout: Annotated[str, typer.Option("--layout", help="Its instances, such as 3x1g.10gb+2g.20gb.")] = "",
    off: Annotated[bool, typer.Option("--off", help="Make it whole again.")] = False,
    json: JsonFlag = False,
) -> None:
    """Cut an idle GPU into MIG instances, or make it whole again; what was there before goes."""
    from fal_contract.errors import invalid
    from fal_contract.v1 import cluster_pb2 as pb

    if bool(layout) == off:
        remedy = "Give --layout 3x1g.10gb+2g.20gb, or --off."
        raise invalid("--layout", layout, "and --off exclude each other, and one is needed", remedy=remedy)
    GLOBALS.timeout_s = max(GLOBALS.timeout_s, _PATIENCE_S)
    reply = unary("SetMig", pb.SetMigRequest(node=node, gpu=gpu, layout=parse_layout(layout)))
    _tell(reply, f"GPU {reply.gpu} of {node} is {'whole' if off else 'cut into ' + layout}", json)


def parse_layout(text: str) -> list[str]:
    """`3x1g.10gb+2g.20gb` → its profiles, one each; the node knows which there are. INVALID."""
    from fal_contract.errors import invalid
    from fal_contract.limits import GPU_MIG_INSTANCES_MAX

    profiles: list[str] = []
    for part in text.split("+") if text else ():
        match = _PART.fullmatch(part.strip())
        count = int(match[1] or 1) if match else 0
        if match is None or not 1 <= count <= GPU_MIG_INSTANCES_MAX:
            remedy = "Write COUNTxPROFILE joined by +, such as 3x1g.10gb+2g.20gb."
            raise invalid("--layout", text, f"is no layout: {part!r}", remedy=remedy)
        profiles += [match[2]] * count
    return profiles


def _tell(reply: Any, done: str, json: bool) -> None:
    from falctl.output import console, print_json, to_json

    if json:
        print_json("gpu", to_json(reply))
        return
    for line in reply.lines:
        console().print(line)
    console().print(done)
    if reply.runners:
        console().print(f"its runners go elsewhere: {', '.join(reply.runners)}")
