"""`falctl weights stage` and its kin: where a model should be whatever runs, and what goes from where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import owned, unary
from falctl.pools import JsonFlag
from falctl.weights import group, wish_texts

To = Annotated[str, typer.Option("--to", help="pool/NAME or node/NAME.")]
Replicas = Annotated[int, typer.Option("--replicas", help="So many nodes, wherever there is most room.", min=0)]
Tier = Annotated[str, typer.Option("--tier", help="disk or memory.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow until it is there.")]
Within = Annotated[str, typer.Option("--within", help="How long to follow: 90s, 15m, 6h.")]
Nodes = Annotated[list[str] | None, typer.Option("--node", help="Only this node; repeatable.")]


@group.command("stage")
def stage(
    name: str,
    to: To = "",
    replicas: Replicas = 0,
    tier: Tier = "disk",
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is kept: 2h, 7d; 0: until it is taken back.")] = "1d",
    watch: Watch = False,
    within: Within = "6h",
    json: JsonFlag = False,
) -> None:
    """Bring a model to nodes before anything needs it, and keep it there for a while (`pin` keeps it for good)."""
    _wish(name, to, replicas, tier, ttl, watch=watch, within=within, json=json)


@group.command("pin")
def pin(
    name: str,
    to: To = "",
    replicas: Replicas = 0,
    tier: Tier = "disk",
    watch: Watch = False,
    within: Within = "6h",
    json: JsonFlag = False,
) -> None:
    """Bring a model to nodes and keep it there until `unpin`: `stage` without an end."""
    _wish(name, to, replicas, tier, "0", watch=watch, within=within, json=json)


def _wish(name: str, to: str, replicas: int, tier: str, ttl: str, *, watch: bool, within: str, json: bool) -> None:
    from fal_contract.errors import invalid
    from fal_contract.units import parse_duration_s
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    ttl_s, within_s = parse_duration_s(ttl, field="--ttl"), parse_duration_s(within, field="--within")
    if watch and json:
        raise invalid("--json", True, "does not go with --watch", remedy="Use `falctl weights where NAME --json`.")
    request = pb.StageModelRequest(
        id=owned(name, field="NAME"), target=target_of(to, replicas), replicas=replicas, tier=tier, ttl_s=ttl_s
    )
    reply = unary("StageModel", request)
    if json:
        print_json("staged", to_json(reply))
        return
    _tell(request.id, reply)
    if watch:
        from falctl.weights_where import follow

        follow(request.id, list(reply.nodes), timeout_s=within_s)
    elif not reply.nodes:
        console().print("no node is meant by it now")


def target_of(to: str, replicas: int) -> str:
    """`--to` or `--replicas`, exactly one of them."""
    from fal_contract.errors import invalid

    if to and replicas:
        raise invalid("--replicas", replicas, "is given beside --to", remedy="Give one of both.")
    if not to and not replicas:
        raise invalid("--to", "", "is missing", remedy="Name pool/NAME or node/NAME, or give --replicas N.")
    if to and to.partition("/")[0] not in ("pool", "node"):
        raise invalid("--to", to, "names no place", remedy="Use pool/NAME or node/NAME.")
    return to or "replicas"


def _tell(model: str, reply: Any) -> None:
    from falctl.output import console

    for text in wish_texts(reply.wishes):
        console().print(f"{model}: {text}")
    if not reply.wishes:
        console().print(f"{model}: nobody wishes it anywhere; what nodes have goes when its room is needed")


@group.command("unstage")
def unstage(
    name: str,
    to: Annotated[str, typer.Option("--to", help="As it was staged: pool/NAME or node/NAME; else all.")] = "",
    replicas: Annotated[bool, typer.Option("--replicas", help="The wish for a number of nodes.")] = False,
    json: JsonFlag = False,
) -> None:
    """Take wishes back. What is on the nodes stays until its room is needed; `evict` removes it now."""
    from fal_contract.errors import invalid
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, to_json

    if to and replicas:
        raise invalid("--replicas", True, "is given beside --to", remedy="Give one of both.")
    target = target_of(to, 0) if to else "replicas" if replicas else ""
    request = pb.UnstageModelRequest(id=owned(name, field="NAME"), target=target)
    reply = unary("UnstageModel", request)
    if json:
        print_json("staged", to_json(reply))
    else:
        _tell(request.id, reply)


@group.command("unpin")
def unpin(
    name: str,
    to: Annotated[str, typer.Option("--to", help="As it was pinned: pool/NAME or node/NAME; else all.")] = "",
    replicas: Annotated[bool, typer.Option("--replicas", help="The pin on a number of nodes.")] = False,
    json: JsonFlag = False,
) -> None:
    """End a pin: the same as `unstage`. Pins of runners are their node's and end with them."""
    unstage(name, to=to, replicas=replicas, json=json)


@group.command("evict")
def evict(name: str, node: Nodes = None, json: JsonFlag = False) -> None:
    """Remove a model from nodes where no runner has it pinned or open and no wish keeps it."""
    _on_nodes("EvictModel", name, node, "told to let it go", json=json)


@group.command("verify")
def verify(name: str, node: Nodes = None, json: JsonFlag = False) -> None:
    """Let nodes read a model again, compare every piece, and repair it from peers; events tell what was found."""
    _on_nodes("VerifyModel", name, node, "told to read it again", json=json)


def _on_nodes(method: str, name: str, nodes: list[str] | None, done: str, *, json: bool) -> None:
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    reply = unary(method, pb.EvictModelRequest(id=owned(name, field="NAME"), nodes=nodes or []))
    if json:
        print_json("told", to_json(reply))
    elif reply.nodes:
        console().print(f"{done}: {', '.join(reply.nodes)}")
    else:
        console().print("no node has it")
