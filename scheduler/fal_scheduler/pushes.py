"""Uploads from an operator's machine: `BeginPush` names nodes that take them, `EndPush` attests what has arrived.

The operator hashes a folder, so the content is known before a byte moves: the artifact id names it, and its manifest is
signed at once, so that nodes check every piece that they take. The model stays REGISTERED until a node has all of it;
whoever pushes other content under the name before that replaces it. Wishes for the chosen nodes make them take part;
they end by themselves, so what is never finished goes away again.

The scheduler carries no byte: it gives the caller tickets for the nodes' bulk ports. An edge of one leader.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fal_contract.artifact import Artifact, from_manifest, listing_id
from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.ids import check_name
from fal_contract.limits import PUSH_CALLER_CHARS, PUSH_REPLICAS, PUSH_TARGETS_MAX, PUSH_WISH_S
from fal_contract.pieces import BLAKE3_BYTES, piece_bytes_of
from fal_contract.ticket import TICKET_TTL_S
from fal_contract.v1 import agent_pb2, cluster_pb2, weights_pb2
from fal_scheduler.core.model_events import AddModel, StageModel
from fal_scheduler.core.push_targets import PushNode, push_targets
from fal_scheduler.core.records import Model, ModelState, Wish
from fal_scheduler.leadership import Leadership
from fal_scheduler.pushed_image import pushed_image
from fal_scheduler.registry import refuse_pickle

KINDS: Final = ("model", "lora", "image")


async def begin(leader: Leadership, request: cluster_pb2.BeginPushRequest, actor: str) -> cluster_pb2.BeginPushReply:
    """Register what is pushed and name who takes it. Again with the same content: go on.

    Raises INVALID naming the field, ALREADY_EXISTS (other content), FAILED_PRECONDITION (withdrawn), NOT_FOUND (pool),
    UNAVAILABLE (no node can take it now), NO_CAPACITY (none is large enough).
    """
    artifact = await asyncio.to_thread(_checked, request)
    withdrawn = leader.models.withdrawn_twin(artifact)
    if withdrawn:
        raise FalError(Code.FAILED_PRECONDITION, withdrawn, remedy="Push another model.", field="id")
    if request.pool and request.pool not in leader.view.pools:
        raise not_found("pool", request.pool, remedy="List pools with `falctl pool list`.")
    _check_known(leader, artifact)
    model = Model(
        request.id, artifact.kind, artifact.uri, bytes=artifact.bytes_total, files=len(artifact.files),
        artifact_id=artifact.id, resolved_uri=artifact.uri, allow_pickle=request.allow_pickle,
        image=pushed_image(request.image, artifact) if artifact.kind == "image" else None,
    )  # fmt: skip
    await leader.models.keep_pushed(artifact)  # first: a node with an older wish for the name asks for it at once
    await leader.engine.submit(AddModel(model, actor))
    caller = f"{actor}+{artifact.id[:PUSH_CALLER_CHARS]}"
    reply = cluster_pb2.BeginPushReply(artifact_id=artifact.id, caller=caller)
    if _ready(leader, artifact.id):
        reply.present = True
        return reply
    for node_id in _targets(leader, request, artifact):
        await _wish(leader, Wish(request.id, f"node/{node_id}", 0, "disk", _wish_end_s(leader)), actor)
        reply.targets.append(_member(leader, node_id, caller, artifact.id))
    return reply


async def end(leader: Leadership, request: cluster_pb2.EndPushRequest, actor: str) -> None:
    """Attest what a node has all of, and wish it on two nodes until somebody takes the wish back.

    Raises NOT_FOUND, CONFLICT (something else was pushed meanwhile), FAILED_PRECONDITION (withdrawn), UNAVAILABLE (no
    node has told that it has all of it; try again).
    """
    model = leader.view.models.get(request.id)
    if model is None:
        raise not_found("model", request.id, remedy="Push it again.")
    if model.artifact_id != request.artifact_id or not model.uri.startswith("push:"):
        raise FalError(
            Code.CONFLICT,
            f"model {model.id!r} is other content by now: somebody else pushed it",
            remedy="Use another name, or push again.",
            field="artifact_id",
        )
    if model.state is ModelState.REGISTERED:
        if not _ready(leader, model.artifact_id):
            raise FalError(
                Code.UNAVAILABLE, f"no node has told that it has all of {model.id} yet", remedy="Try again in a moment."
            )
        artifact = leader.models.desk.artifact_of(model.artifact_id)
        await leader.models.attest_pushed(artifact, actor)
        model = leader.view.models[request.id]
    if model.state is not ModelState.ATTESTED:
        what = f"model {model.id!r} is {model.state.name}: {model.reason}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Push other content under another name.", field="id")
    await _wish(leader, Wish(model.id, "replicas", PUSH_REPLICAS, "disk"), actor)


# --- inside -----------------------------------------------------------------------------------------------------------


def _checked(request: cluster_pb2.BeginPushRequest) -> Artifact:
    """The artifact that is pushed, unsigned. INVALID naming the field. Takes a second for 100,000 pieces."""
    team, slash, name = request.id.partition("/")
    check_name(team, field="id")
    check_name(name if slash else "", field="id")
    if request.kind not in KINDS:
        raise invalid("kind", request.kind, "cannot be pushed", remedy=f"Use one of {', '.join(KINDS)}.")
    manifest = request.manifest
    if request.HasField("image") != (request.kind == "image"):
        raise invalid("image", request.kind, "and an image's facts belong together", remedy="Use `falctl image add`.")
    if manifest.signature:
        raise invalid("signature", "…", "is the scheduler's to make", remedy="Push with a released `falctl`.")
    for file in manifest.files:
        if not request.allow_pickle:
            refuse_pickle(file.path)
        if file.version or len(file.sha256) != BLAKE3_BYTES:
            raise invalid("sha256", file.path, "is missing", remedy="Push with a released `falctl`.")
    artifact = from_manifest(manifest)
    if not artifact.bytes_total:
        raise invalid("files", len(artifact.files), "hold no byte", remedy="Name the folder that holds the model.")
    uri = f"push://{request.id}"
    told = (artifact.kind, artifact.uri, artifact.piece_bytes, artifact.id, artifact.attested)
    meant = (request.kind, uri, piece_bytes_of(request.kind, artifact.bytes_total), listing_id(uri, artifact.files))
    if told != (*meant, True):
        raise invalid("manifest", artifact.id[:12], "is not that of this push", remedy="Use this release's `falctl`.")
    return artifact


def _check_known(leader: Leadership, artifact: Artifact) -> None:
    """Digests that nodes have begun to check by do not change: SHA-256 alone names the artifact."""
    if artifact.id not in leader.view.models_by_artifact:
        return
    try:
        known = leader.models.desk.artifact_of(artifact.id)
    except FalError:
        return  # lost with another scheduler's disk
    if known.hashes is not None and known.hashes != artifact.hashes:
        raise FalError(
            Code.CONFLICT,
            f"the digests of pieces of artifact {artifact.id[:12]} are not those of the first push",
            remedy="One of both machines reads wrongly; check its memory and disk.",
            field="manifest",
        )


def _targets(leader: Leadership, request: cluster_pb2.BeginPushRequest, artifact: Artifact) -> tuple[str, ...]:
    state, table = leader.view, leader.caches.table
    nodes = []
    for record in state.nodes.values():
        cache = table.node(record.id)
        if cache is None or record.revoked:
            continue
        holding = cache.holdings.get(artifact.id)
        nodes.append(
            PushNode(
                node_id=record.id,
                pool=record.pool,
                dialled=bool(cache.endpoints),
                open=leader.caches.connected(record.id) and not record.cordoned,
                bytes_max=cache.room.disk_bytes_max,
                bytes_used=cache.room.disk_bytes_used,
                bytes_held=holding.bytes_disk if holding is not None else 0,
                complete=holding is not None and holding.complete,
            )
        )
    avoid = frozenset(request.avoid)
    found = push_targets(nodes, artifact.bytes_total, pool=request.pool, avoid=avoid, count=PUSH_TARGETS_MAX)
    if not found.nodes:
        code = Code.NO_CAPACITY if found.full else Code.UNAVAILABLE
        remedy = "Give the nodes larger caches." if found.full else "See `falctl node list`."
        raise FalError(code, f"{request.id} cannot be pushed: {found.why}", remedy=remedy)
    return found.nodes


def _ready(leader: Leadership, artifact_id: str) -> bool:
    """Whether a node that has a session has told that all of it is there, checked and durable."""
    holders = leader.caches.table.holders(artifact_id)
    return any(holding.ready and leader.caches.connected(node_id) for node_id, holding in holders.items())


def _wish_end_s(leader: Leadership) -> float:
    return leader.clock.wall_s() + PUSH_WISH_S


async def _wish(leader: Leadership, wish: Wish, actor: str) -> None:
    """Unless somebody wishes at least as much there."""
    for have in leader.view.catalog.wishes_of(wish.model):
        late_s = wish.expires_at_s - PUSH_WISH_S / 2  # not renewed at every call
        longer = not have.expires_at_s or (wish.expires_at_s and have.expires_at_s > late_s)
        if have.target == wish.target and have.replicas >= wish.replicas and longer:
            return
    await leader.engine.submit(StageModel(wish, actor))


def _member(leader: Leadership, node_id: str, caller: str, artifact_id: str) -> weights_pb2.SwarmMember:
    """A target as the caller dials it: at all its addresses, always with TLS."""
    cache = leader.caches.table.node(node_id)
    assert cache is not None, "it was chosen a moment ago"
    pool = leader.view.pools.get(leader.view.nodes[node_id].pool)
    expires_s = float(int(leader.clock.wall_s() + TICKET_TTL_S))
    return weights_pb2.SwarmMember(
        node_id=node_id,
        endpoints=[agent_pb2.Endpoint(network=x.network, host=x.host, port=x.port) for x in cache.endpoints],
        pool=pool.name if pool is not None else "",
        region=pool.region if pool is not None else "",
        ticket=leader.caches.office.ticket(
            server=node_id, caller=caller, artifact_id=artifact_id, expires_s=expires_s, wall_s=leader.clock.wall_s()
        ),
        ticket_expires_s=expires_s,
        tls=True,
    )


__all__ = ["KINDS", "begin", "end"]
