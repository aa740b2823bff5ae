"""Models: checkpoints and LoRAs, their wishes, and what withdraws or forgets them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from fal_contract.errors import FalError, invalid, not_found
from fal_contract.limits import MODELS_LISTED_DEFAULT, MODELS_LISTED_MAX
from fal_contract.v1 import cluster_pb2, state_pb2
from fal_scheduler.codec_weights import fill_model, fill_model_briefly, wish_to_pb
from fal_scheduler.core.model_commands import check_ttl, in_use, users
from fal_scheduler.core.model_events import (
    CollectModels,
    RevokeModel,
    StageModel,
    UnstageModel,
)
from fal_scheduler.core.records import Model, ModelState, Wish
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership

COLLECTED_AT_ONCE_MAX = 50  # models in one commit
BLOB_GRACE_S = 600.0  # a manifest is written a moment before the store names it


async def add_model(leader: Leadership, request: cluster_pb2.AddModelRequest, actor: str) -> cluster_pb2.ModelView:
    """Register a model; small folders are ATTESTED when this returns. Raises INVALID, ALREADY_EXISTS, the origin's."""
    await leader.models.add(
        request.id,
        request.uri,
        kind=request.kind,
        revision=request.revision,
        actor=actor,
        allow_pickle=request.allow_pickle,
    )
    return _with_files(leader, leader.view.models[request.id])


def list_models(leader: Leadership, request: cluster_pb2.ListModelsRequest) -> cluster_pb2.ListModelsReply:
    """A page of a team's models, or of all, in order of id; without their files. Raises INVALID."""
    limit = request.limit or MODELS_LISTED_DEFAULT
    if limit > MODELS_LISTED_MAX:
        raise invalid("limit", limit, "is too many for one answer", remedy=f"At most {MODELS_LISTED_MAX} a page.")
    page, following, total = leader.view.catalog.page(
        team=request.team, kind=request.kind, prefix=request.prefix, after=request.after, limit=limit
    )
    named = _users_of(leader.view)
    reply = cluster_pb2.ListModelsReply(next=following, total=total)
    fill = fill_model_briefly if request.brief else fill_model
    for model in page:
        view = reply.models.add()
        fill(view.model, model)
        _add_facts(view, leader, model, named.get(model.id, ()))
    return reply


def _users_of(state: State) -> Mapping[str, list[str]]:
    """Apps by the models that their current revision names."""
    found: dict[str, list[str]] = {}
    for app_id in sorted(state.apps):
        for name in dict.fromkeys(state.revision_of(state.apps[app_id]).spec.artifacts):
            found.setdefault(name, []).append(app_id)
    return found


def get_model(leader: Leadership, request: cluster_pb2.GetModelRequest) -> cluster_pb2.ModelView:
    """One model with its files."""
    return _with_files(leader, model_named(leader, request.id))


def model_named(leader: Leadership, id_: str) -> Model:
    """A model by id. Raises NOT_FOUND."""
    model = leader.view.models.get(id_)
    if model is None:
        raise not_found("model", id_, remedy="List models with `falctl weights list`.")
    return model


def model_view(leader: Leadership, model: Model) -> cluster_pb2.ModelView:
    """A model, the apps whose current revision names it, its wishes and how many nodes have it."""
    view = cluster_pb2.ModelView()
    fill_model(view.model, model)
    _add_facts(view, leader, model, users(leader.view, model.id))
    return view


def _add_facts(view: cluster_pb2.ModelView, leader: Leadership, model: Model, apps: Sequence[str]) -> None:
    ready, staging = leader.models.counts(model.artifact_id)
    if ready or staging:
        view.nodes_ready, view.nodes_staging = ready, staging
    if apps:
        view.apps.extend(apps)
    if model.id in leader.view.wishes:
        view.wishes.extend(_wishes(leader.view, model.id))


def _wishes(state: State, model_id: str) -> list[state_pb2.Wish]:
    return [wish_to_pb(wish) for wish in state.catalog.wishes_of(model_id)]


def _with_files(leader: Leadership, model: Model) -> cluster_pb2.ModelView:
    view = model_view(leader, model)
    if not model.artifact_id:
        return view
    try:
        artifact = leader.models.desk.artifact_of(model.artifact_id)
    except FalError as error:  # the record stands; say what is missing instead of hiding it
        view.model.reason = view.model.reason or str(error)
        return view
    view.files.extend(
        state_pb2.ModelFile(path=x.path, bytes=x.size_bytes, sha256=x.sha256, version=x.version) for x in artifact.files
    )
    view.pieces, view.piece_bytes = len(artifact.layout), artifact.piece_bytes
    return view


# --- wishes -----------------------------------------------------------------------------------------------------------


async def stage_model(
    leader: Leadership, request: cluster_pb2.StageModelRequest, actor: str
) -> cluster_pb2.StageModelReply:
    """Wish a model somewhere. Raises INVALID, NOT_FOUND, FAILED_PRECONDITION."""
    check_ttl(request.ttl_s)
    expires_at_s = leader.clock.wall_s() + request.ttl_s if request.ttl_s else 0.0
    wish = Wish(request.id, request.target, request.replicas, request.tier or "disk", expires_at_s)
    await leader.engine.submit(StageModel(wish, actor))
    return _staged(leader, request.id)


async def unstage_model(
    leader: Leadership, request: cluster_pb2.UnstageModelRequest, actor: str
) -> cluster_pb2.StageModelReply:
    """Take wishes back; what is on the nodes stays until its room is needed."""
    await leader.engine.submit(UnstageModel(request.id, request.target, actor))
    return _staged(leader, request.id)


def _staged(leader: Leadership, model_id: str) -> cluster_pb2.StageModelReply:
    return cluster_pb2.StageModelReply(wishes=_wishes(leader.view, model_id), nodes=_wished_nodes(leader, model_id))


def _wished_nodes(leader: Leadership, model_id: str) -> list[str]:
    """Names of the nodes that should have it; of a number of replicas only who chooses them can tell."""
    if leader.models.wished_nodes is not None:
        return list(leader.models.wished_nodes(model_id))
    state, now_s = leader.view, leader.clock.wall_s()
    targets = {wish.target for wish in state.catalog.wishes_of(model_id) if not wish.ended(now_s)}
    nodes = [node for node in state.nodes.values() if not node.revoked]
    return sorted(node.name for node in nodes if f"node/{node.id}" in targets or f"pool/{node.pool}" in targets)


# --- the end of a model -----------------------------------------------------------------------------------------------


async def revoke_model(
    leader: Leadership, request: cluster_pb2.RevokeModelRequest, actor: str
) -> cluster_pb2.ModelView:
    """Withdraw a model for good; durable when this returns, nodes that are off learn it when they are back."""
    await leader.engine.submit(RevokeModel(request.id, request.reason, actor))
    return model_view(leader, leader.view.models[request.id])


async def collect_models(
    leader: Leadership, request: cluster_pb2.CollectModelsRequest, actor: str
) -> cluster_pb2.CollectModelsReply:
    """Forget models that were revoked or refused, that no app names and no node has; wishes that ended; and manifests
    that nothing names.

    Revoked ones are remembered while the cache of any node is out of reach: it may have them, and must be told.
    """
    state = leader.view
    now_s = leader.clock.wall_s()
    used = in_use(state)
    wishes = [wish_to_pb(wish) for wish in state.catalog.all_wishes() if wish.ended(now_s)]
    forgotten = (ModelState.REFUSED, ModelState.REVOKED) if _all_heard(leader) else (ModelState.REFUSED,)
    withdrawn = [model for model in state.models.values() if model.state in forgotten and model.id not in used]
    chosen = [model.id for model in withdrawn if not any(leader.models.counts(model.artifact_id))]
    old_s = now_s - BLOB_GRACE_S
    if request.dry_run:
        named = _named_blobs(state, leaving=frozenset(chosen))
        blobs = await asyncio.to_thread(leader.manifests.names, older_than_s=old_s)
        return cluster_pb2.CollectModelsReply(models=sorted(chosen), wishes=wishes, blobs=len(blobs - named))
    gone: list[str] = []
    for some in _slices(chosen) if chosen else iter([()]):
        reply = await leader.engine.submit(CollectModels(some, actor))
        gone += reply.lines
    unnamed = (await asyncio.to_thread(leader.manifests.names, older_than_s=old_s)) - _named_blobs(leader.view)
    for name in sorted(unnamed):
        await asyncio.to_thread(leader.manifests.drop, name)
    return cluster_pb2.CollectModelsReply(models=sorted(gone), wishes=wishes, blobs=len(unnamed))


def _all_heard(leader: Leadership) -> bool:
    """Whether every node has told what its cache holds."""
    return all(node.revoked or leader.caches.connected(node.id) for node in leader.view.nodes.values())


def _slices(ids: Sequence[str]) -> Iterator[tuple[str, ...]]:
    rest = iter(ids)
    while some := tuple(islice(rest, COLLECTED_AT_ONCE_MAX)):
        yield some


def _named_blobs(state: State, leaving: frozenset[str] = frozenset()) -> set[str]:
    """Files that must stay: of every model, and those of the first release's that are not read anew yet."""
    named: set[str] = set()
    for model in state.models.values():
        if model.id not in leaving:
            named.update((model.artifact_id, model.manifest_digest))
    named.update(entry.manifest_digest for entry in state.catalog.cache_entries.values())
    return named


__all__ = [
    "add_model",
    "collect_models",
    "get_model",
    "list_models",
    "model_named",
    "model_view",
    "revoke_model",
    "stage_model",
    "unstage_model",
]
