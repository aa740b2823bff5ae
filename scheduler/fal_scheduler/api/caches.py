"""Where models are, and what operators ask of the nodes' caches; manifests for the caches themselves."""

from __future__ import annotations

from collections.abc import Sequence

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.v1 import cluster_pb2, state_pb2, weights_pb2
from fal_scheduler.api.weights import model_named
from fal_scheduler.cache_wire import artifact_of, holding_out
from fal_scheduler.core.records import Model, Node
from fal_scheduler.leadership import Leadership

NODES_NAMED_MAX = 1000  # in one request


def where_model(leader: Leadership, request: cluster_pb2.WhereModelRequest) -> cluster_pb2.WhereModelReply:
    """Nodes that have some of a model, or all nodes, with what each would take to have it. Raises NOT_FOUND."""
    model = model_named(leader, request.id)
    holders = leader.caches.table.holders(artifact_of(model))
    readiness = leader.caches.readiness(model)
    memory = {wish.tier for wish in leader.view.catalog.wishes_of(model.id)} == {"memory"}
    shown = []
    for node in leader.view.nodes.values():
        if node.revoked or (not request.all and node.id not in holders):
            continue
        eta = readiness.of(node.id, memory=memory)
        pool = leader.view.pools.get(node.pool)
        view = cluster_pb2.ModelOnNode(
            node_id=node.id,
            node=node.name,
            pool=node.pool,
            region=pool.region if pool is not None else "",
            ready_in_s=eta.ready_in_ms / 1000 if eta.ready_in_ms >= 0 else -1.0,
            because=_because(leader, node, eta.because),
        )
        if node.id in holders:
            view.cached.CopyFrom(holding_out(holders[node.id]))
        shown.append(view)
    shown.sort(key=lambda one: (one.ready_in_s < 0, one.ready_in_s, one.node))
    return cluster_pb2.WhereModelReply(
        nodes=shown,
        bytes_from_origin=leader.caches.counts(artifact_of(model)).bytes_from_origin,
        bytes_total=model.bytes,
    )


def _because(leader: Leadership, node: Node, why: str) -> str:
    cache = leader.caches.table.node(node.id)
    return f"{why}; its session has ended" if cache is not None and cache.stale else why


def evict_model(leader: Leadership, request: cluster_pb2.EvictModelRequest) -> cluster_pb2.EvictModelReply:
    """Ask caches to let go of a model; what is pinned, open or wished stays. Raises NOT_FOUND, FAILED_PRECONDITION."""
    model = model_named(leader, request.id)
    nodes = _holders(leader, model, request.nodes)
    wished = set(leader.caches.nodes_wished(model.id))
    kept = [node.name for node in nodes if node.id in wished]
    if kept:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"model {model.id} is wished on {', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}",
            remedy="Take the wish back first with `falctl weights unstage`, else it comes again.",
        )
    told = set(leader.caches.evict(artifact_of(model), [node.id for node in nodes], "an operator evicted it"))
    return cluster_pb2.EvictModelReply(nodes=sorted(node.name for node in nodes if node.id in told))


def verify_model(leader: Leadership, request: cluster_pb2.EvictModelRequest) -> cluster_pb2.EvictModelReply:
    """Ask caches to read a model again, compare and repair. Raises NOT_FOUND, FAILED_PRECONDITION."""
    model = model_named(leader, request.id)
    nodes = _holders(leader, model, request.nodes)
    told = set(leader.caches.verify(artifact_of(model), [node.id for node in nodes]))
    return cluster_pb2.EvictModelReply(nodes=sorted(node.name for node in nodes if node.id in told))


def _holders(leader: Leadership, model: Model, names: Sequence[str]) -> list[Node]:
    """Nodes that have some of it: those that are named, or all. A named one that has none of it is an error."""
    if len(names) > NODES_NAMED_MAX:
        raise invalid("nodes", len(names), "are too many", remedy=f"Name at most {NODES_NAMED_MAX}, or none for all.")
    holders = leader.caches.table.holders(artifact_of(model))
    if not names:
        return [leader.view.nodes[node_id] for node_id in sorted(holders) if node_id in leader.view.nodes]
    chosen = {}
    for name in names:
        node = leader.view.find_node(name)
        if node is None:
            raise not_found("node", name, remedy="List nodes with `falctl node list`.")
        if node.id not in holders:
            what = f"node {node.name} has nothing of model {model.id}"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="`falctl weights where` tells who has it.")
        chosen[node.id] = node
    return list(chosen.values())


def get_manifest(leader: Leadership, request: weights_pb2.GetManifestRequest) -> state_pb2.ModelManifest:
    """A manifest by artifact id or digest, for any node. Raises NOT_FOUND.

    Every node may read every manifest: it names files and digests only. The bytes are what is protected, by tickets of
    the swarms that a node belongs to, and a container sees the models of its own app only.
    """
    return leader.models.manifest_of(request.id)


__all__ = ["evict_model", "get_manifest", "verify_model", "where_model"]
