"""Images: added by a task that packs them, listed with those tasks, removed. Reading costs what is listed."""

from __future__ import annotations

import hashlib
from math import isfinite

from fal_contract.errors import invalid, not_found
from fal_contract.ids import check_customer, check_name
from fal_contract.limits import (
    IMAGE_BYTES_MAX,
    IMAGE_BYTES_MAX_DEFAULT,
    IMAGE_PACK_MEMORY_BYTES,
    IMAGE_PACK_TIMEOUT_MAX_S,
    IMAGE_PACK_TIMEOUT_S,
    IMAGE_PACK_TRIES_MAX,
    MODELS_LISTED_MAX,
)
from fal_contract.v1 import cluster_pb2
from fal_scheduler.cache_wire import artifact_of
from fal_scheduler.codec_weights import fill_model
from fal_scheduler.core.builds import builds, runner_of
from fal_scheduler.core.image_source import check_platform, check_source
from fal_scheduler.core.model_commands import users
from fal_scheduler.core.pack_events import PackImage, RemoveModel
from fal_scheduler.core.packs import NAMESPACE, pack_of
from fal_scheduler.core.records import HOST_IMAGE, App, BuildTask, Model, ModelState, Resources, Scaling, Spec
from fal_scheduler.core.views import runner_phase
from fal_scheduler.leadership import Leadership

PACK_CPU_MILLI = 1000
PACK_PIDS_MAX = 512
POOLS_MAX = 64
_STATES = {
    ModelState.REGISTERED: "registered",
    ModelState.ATTESTED: "ready",
    ModelState.REFUSED: "refused",
    ModelState.REVOKED: "revoked",
}


async def add_image(leader: Leadership, request: cluster_pb2.AddImageRequest, actor: str) -> cluster_pb2.ImageView:
    """Have an image packed, unless the name is there or being packed. INVALID, ALREADY_EXISTS, CONFLICT, BUSY."""
    await leader.engine.submit(PackImage(_spec(leader, request), actor))
    return _found(leader, request.id)


def _spec(leader: Leadership, request: cluster_pb2.AddImageRequest) -> Spec:
    """The task: our packer in our image, with the node's network, because it speaks with a registry."""
    id_ = _checked_id(request.id)
    source, platform = check_source(request.source), check_platform(request.platform)
    if request.auth_secret:
        check_name(request.auth_secret, field="auth_secret")
    if request.bytes_max > IMAGE_BYTES_MAX:
        raise invalid("bytes_max", request.bytes_max, "is out of bounds", remedy=f"At most {IMAGE_BYTES_MAX}.")
    timeout_s = request.timeout_s or IMAGE_PACK_TIMEOUT_S
    if not isfinite(timeout_s) or not 1.0 <= timeout_s <= IMAGE_PACK_TIMEOUT_MAX_S:
        remedy = f"Use 1 to {IMAGE_PACK_TIMEOUT_MAX_S:.0f} seconds."
        raise invalid("timeout_s", timeout_s, "is out of bounds", remedy=remedy)
    if len(request.pools) > POOLS_MAX:
        raise invalid("pools", len(request.pools), "are too many", remedy=f"Name at most {POOLS_MAX}.")
    for pool in request.pools:
        if pool not in leader.view.pools:
            raise invalid("pools", pool[:80], "is no pool", remedy="List them with `falctl pool list`.")
    task = BuildTask(
        NAMESPACE,
        hashlib.sha256(f"fal-pack 1\n{id_}\n{source}\n{platform}\n".encode()).hexdigest(),
        request.bytes_max or IMAGE_BYTES_MAX_DEFAULT,
        image=id_,
        source=source,
        auth_secret=request.auth_secret,
        platform=platform,
    )
    return Spec(
        image=HOST_IMAGE,
        pools=tuple(request.pools),
        resources=Resources(PACK_CPU_MILLI, IMAGE_PACK_MEMORY_BYTES, pids_max=PACK_PIDS_MAX),
        network="host",
        scaling=Scaling(min_concurrency=1, max_concurrency=1, startup_timeout_s=timeout_s),
        build=task,
    )


def _checked_id(id_: str) -> str:
    team, slash, name = id_.partition("/")
    check_name(team, field="id")
    check_name(name if slash else "", field="id")
    if name == HOST_IMAGE:
        raise invalid("id", id_, "would hide the node's own system", remedy="Use another name.")
    return check_customer(id_, field="id")


def get_image(leader: Leadership, request: cluster_pb2.GetImageRequest) -> cluster_pb2.ImageView:
    """An image, or what packs it, or why it could not be packed. NOT_FOUND."""
    return _found(leader, request.id)


def list_images(leader: Leadership, request: cluster_pb2.ListImagesRequest) -> cluster_pb2.ListImagesReply:
    """Images of a team, or all, in order of id; also those that are being packed, or could not be."""
    state = leader.view
    page, _, _ = state.catalog.page(team=request.team, kind="image", limit=MODELS_LISTED_MAX)
    found = {model.id for model in page}
    found.update(task.image for _, task in builds(state) if task.image)
    found.update(key for namespace, key in state.build_failures if namespace == NAMESPACE)
    chosen = sorted(id_ for id_ in found if request.team in ("", id_.partition("/")[0]))
    views = (_view(leader, id_) for id_ in chosen)
    return cluster_pb2.ListImagesReply(images=[view for view in views if view is not None])


async def remove_model(
    leader: Leadership, request: cluster_pb2.RemoveModelRequest, actor: str
) -> cluster_pb2.RemoveModelReply:
    """Forget a model or image that nothing uses; end what packs it. NOT_FOUND, FAILED_PRECONDITION."""
    check_customer(request.id, field="id")
    model = leader.view.models.get(request.id)
    outcome = "more"
    while outcome == "more":
        outcome = (await leader.engine.submit(RemoveModel(request.id, actor))).outcome
    reply = cluster_pb2.RemoveModelReply(id=request.id, outcome=outcome)
    if model is not None and not leader.view.models_by_artifact.get(model.artifact_id):
        holders = sorted(leader.caches.table.holders(artifact_of(model)))
        told = leader.caches.evict(artifact_of(model), holders, f"{model.kind} {model.id} was removed")
        reply.nodes.extend(sorted(leader.view.nodes[node_id].name for node_id in told))
    return reply


def _found(leader: Leadership, id_: str) -> cluster_pb2.ImageView:
    view = _view(leader, id_)
    if view is None:
        raise not_found("image", id_, remedy="List images with `falctl image list`.")
    return view


def _view(leader: Leadership, id_: str) -> cluster_pb2.ImageView | None:
    state = leader.view
    model, packing = state.models.get(id_), pack_of(state, id_)
    view = cluster_pb2.ImageView(id=id_)
    if model is not None and model.kind == "image":
        _fill(view, leader, model)
    elif packing is not None:
        _fill_packing(view, leader, *packing)
    elif (failure := state.build_failures.get((NAMESPACE, id_))) is not None:
        view.state, view.reason, view.runner = "failed", failure.reason, failure.runner
        view.log_tail.extend(failure.lines)
    else:
        return None
    return view


def _fill(view: cluster_pb2.ImageView, leader: Leadership, model: Model) -> None:
    fill_model(view.model, model)
    view.state, view.reason = _STATES[model.state], model.reason
    view.apps.extend(users(leader.view, model.id))
    view.nodes_ready, view.nodes_staging = leader.models.counts(model.artifact_id)


def _fill_packing(view: cluster_pb2.ImageView, leader: Leadership, app: App, task: BuildTask) -> None:
    state = leader.view
    view.state = "packing"
    runner = runner_of(state, app)
    if runner is None:
        return
    view.runner = runner.id
    phase, node = runner_phase(state, runner), state.nodes.get(runner.node)
    words = [phase.reason or phase.state.name.lower()]
    if node is not None and node.name not in words[0]:
        words.append(f"on {node.name}")
    if app.generation > 1:
        words.append(f"(try {app.generation} of {IMAGE_PACK_TRIES_MAX})")
    view.reason = " ".join(words)
    if (status := state.status_of(runner)) is not None:
        view.log_tail.extend(status.log_tail)


__all__ = ["add_image", "get_image", "list_images", "remove_model"]
