"""`falctl node`: machines, their cordons, and the tokens with which they join."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from fal_contract.errors import not_found
from falctl.context import listed, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Machines with an agent.", no_args_is_help=True)
_FEATURES: Final = ("images", "pack", "egress", "device-attach")
token = typer.Typer(help="Tokens with which machines join a pool.", no_args_is_help=True)
group.add_typer(token, name="token")


@group.command("list")
def list_nodes(
    pool: Annotated[str, typer.Option(help="Only this pool.")] = "",
    json: JsonFlag = False,
) -> None:
    """All nodes with what they told."""
    from fal_contract.units import format_duration
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = listed("ListNodes", pb.ListNodesRequest(pool=pool), "nodes")
    if json:
        print_json("nodes", [to_json(view) for view in views])
        return
    print_table(
        ("NODE", "NAME", "POOL", "HEALTH", "GPUS", "FREE", "RUNNERS", "HEARD"),
        (
            (
                view.node.id, view.node.name, view.node.pool, health_text(view), gpus_text(view.inventory.gpus),
                str(len(view.gpus_free)), str(len(view.runners)),
                "never" if view.heard_age_s < 0 else format_duration(view.heard_age_s),
            )
            for view in views
        ),
        empty="No nodes. Make a join token: falctl node token create --pool POOL",
    )  # fmt: skip


def health_text(view: Any) -> str:
    """Health as one word, with a cordon beside it."""
    return f"{view.health}, cordoned" if view.node.cordoned else str(view.health)


def gpus_text(gpus: Any) -> str:
    """`2 × H100-80GB, 1 × L4-24GB`."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.model] = counts.get(gpu.model, 0) + 1
    return ", ".join(f"{count} × {model}" for model, count in sorted(counts.items())) or "-"


def node_request(node: str) -> Any:
    """For one node, by id or name. NOT_FOUND where it is empty, which would ask for all of them."""
    from fal_contract.v1 import cluster_pb2 as pb

    if not node:
        raise not_found("node", node, remedy="List nodes with `falctl node list`.")
    return pb.ListNodesRequest(node=node)


@group.command("show")
def show(node: str, json: JsonFlag = False) -> None:
    """One node, by id or name."""
    from fal_contract.units import format_bytes, format_duration
    from falctl.output import print_facts, print_json, to_json

    view = unary("ListNodes", node_request(node)).nodes[0]
    if json:
        print_json("node", to_json(view))
        return
    inventory = view.inventory
    print_facts(
        [
            ("node", view.node.id),
            ("name", view.node.name),
            ("pool", view.node.pool),
            ("health", health_text(view)),
            ("reason", view.reason),
            ("cordon", view.node.cordon_reason),
            ("heard", "never" if view.heard_age_s < 0 else f"{format_duration(view.heard_age_s)} ago"),
            ("GPUs", gpus_text(inventory.gpus)),
            ("free", f"{len(view.gpus_free)} GPUs"),
            ("driver", inventory.driver_version),
            ("CPU", f"{inventory.cpu_milli / 1000:g} cores" if inventory.cpu_milli else ""),
            ("memory", format_bytes(inventory.memory_bytes) if inventory.memory_bytes else ""),
            ("containers", containers_text(view.capabilities)),
            ("features", ", ".join(view.capabilities.features)),
            *((f"no {name}", why) for name, why in lacking(view.capabilities)),
            ("addresses", ", ".join(f"{e.network}={e.host}:{e.port}" for e in view.endpoints)),
            ("paths", ", ".join(f"{gateway}: {path}" for gateway, path in sorted(view.paths.items()))),
            ("labels", ", ".join(f"{k}={v}" for k, v in sorted(view.labels.items()))),
            ("runners", ", ".join(view.runners)),
            ("agent", view.software),
        ]
    )


def containers_text(capabilities: Any) -> str:
    """Driver, runtime and whether it isolates."""
    if not capabilities.driver:
        return ""
    kept = "isolated" if capabilities.isolates else "NOT isolated"
    users = ", user namespaces" if capabilities.user_namespaces else ""
    return (
        f"{capabilities.driver} ({capabilities.runtime or 'no runtime'}), {kept}{users}, cgroup {capabilities.cgroup}"
    )


def lacking(capabilities: Any) -> list[tuple[str, str]]:
    """Features that were tried and do not work, with the reason."""
    tried = (name for name in _FEATURES if name in capabilities.details and name not in capabilities.features)
    return [(name, capabilities.details[name]) for name in tried]


def _cordon(node: str, *, cordon: bool, reason: str, json: bool) -> None:
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("CordonNode", pb.CordonNodeRequest(node=node, cordon=cordon, reason=reason))
    if json:
        print_json("node", to_json(view))
    else:
        console().print(f"node {view.node.name} ({view.node.id}) {'cordoned' if cordon else 'uncordoned'}")


@group.command("cordon")
def cordon(
    node: str,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")] = "",
    json: JsonFlag = False,
) -> None:
    """Place nothing new on a node; what runs there goes on."""
    _cordon(node, cordon=True, reason=reason, json=json)


@group.command("uncordon")
def uncordon(node: str, json: JsonFlag = False) -> None:
    """Allow new placements again."""
    _cordon(node, cordon=False, reason="", json=json)


@group.command("revoke")
def revoke(
    node: str,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")] = "",
    json: JsonFlag = False,
) -> None:
    """Refuse a node's certificates and cut its streams; its containers are not touched."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("RevokeNode", pb.RevokeNodeRequest(node=node, reason=reason))
    if json:
        print_json("node", to_json(view))
    else:
        console().print(f"node {view.node.name} ({view.node.id}) revoked")


@token.command("create")
def token_create(
    pool: Annotated[str, typer.Option(help="Pool that machines join with it.")],
    ttl: Annotated[str, typer.Option(help="How long it is good for: 90s, 15m, 1h, 2d.")] = "1h",
    uses: Annotated[int, typer.Option(help="How many machines may join.", min=1, max=10_000)] = 1,
    json: JsonFlag = False,
) -> None:
    """Make a join token; it is shown this once."""
    from fal_contract.units import format_duration, parse_duration_s
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    ttl_s = parse_duration_s(ttl, field="--ttl")
    reply = unary("CreateToken", pb.CreateTokenRequest(pool=pool, ttl_s=ttl_s, uses=uses))
    if json:
        print_json("token", {"token": reply.token, **to_json(reply.view)})
        return
    console().print(reply.token)
    plural = "machine" if uses == 1 else "machines"
    typer.echo(f"good for {uses} {plural} within {format_duration(ttl_s)}; it is not shown again", err=True)


@token.command("list")
def token_list(json: JsonFlag = False) -> None:
    """All tokens, without their secrets."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListTokens", pb.ListTokensRequest()).tokens
    if json:
        print_json("tokens", [to_json(view) for view in views])
        return
    print_table(
        ("TOKEN", "POOL", "STATE", "USES LEFT", "BY"),
        ((view.id, view.pool, view.state, str(view.uses_left), view.created_by) for view in views),
        empty="No tokens.",
    )


@token.command("revoke")
def token_revoke(token_id: Annotated[str, typer.Argument(metavar="TOKEN")], json: JsonFlag = False) -> None:
    """Refuse a token from now on (its public part is enough)."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    public = token_id.split(".")[1] if token_id.count(".") >= 2 else token_id
    view = unary("RevokeToken", pb.RevokeTokenRequest(id=public))
    if json:
        print_json("token", to_json(view))
    else:
        console().print(f"token {view.id} revoked")
