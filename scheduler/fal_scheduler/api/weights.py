"""Models: checkpoints and LoRAs."""

from __future__ import annotations

from fal_contract.errors import FalError, not_found
from fal_contract.v1 import cluster_pb2, state_pb2
from fal_scheduler.api.views import model_view
from fal_scheduler.core.records import Model
from fal_scheduler.leadership import Leadership


async def add_model(leader: Leadership, request: cluster_pb2.AddModelRequest, actor: str) -> cluster_pb2.ModelView:
    """Register a model; small ones are ATTESTED when this returns. Raises INVALID, ALREADY_EXISTS."""
    await leader.models.add(request.id, request.uri, kind=request.kind, revision=request.revision, actor=actor)
    return _with_files(leader, leader.view.models[request.id])


def list_models(leader: Leadership, request: cluster_pb2.ListModelsRequest) -> cluster_pb2.ListModelsReply:
    """A team's models, or all, in order of id; without their files."""
    state = leader.view
    chosen = [i for i in sorted(state.models) if request.team in ("", i.split("/", 1)[0])]
    return cluster_pb2.ListModelsReply(models=[model_view(state, state.models[i]) for i in chosen])


def get_model(leader: Leadership, request: cluster_pb2.GetModelRequest) -> cluster_pb2.ModelView:
    """One model with its files."""
    model = leader.view.models.get(request.id)
    if model is None:
        raise not_found("model", request.id, remedy="List models with `falctl weights list`.")
    return _with_files(leader, model)


def _with_files(leader: Leadership, model: Model) -> cluster_pb2.ModelView:
    files: list[state_pb2.ModelFile] = []
    if model.manifest_digest:
        try:
            files = list(leader.manifests.get(model.manifest_digest).files)
        except FalError as error:  # the record stands; say what is missing instead of hiding it
            view = model_view(leader.view, model)
            view.model.reason = str(error)
            return view
    return model_view(leader.view, model, files)
