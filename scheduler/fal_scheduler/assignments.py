"""Builds what a node is told of a runner: its record, its revision's spec, its models' manifests.

A model that is registered only is told with its listing: its node stages it and starts nothing before it may.
Called by `sessions` for runners whose assignment is durable. Specs and artifacts are built once per revision and
model; they are shared between messages, so nobody may change them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Protocol

from fal_contract.cache_key import CLUSTER, namespace_of
from fal_contract.errors import Code, FalError
from fal_contract.ids import team_of
from fal_contract.limits import MANIFEST_EMBEDDED_BYTES_MAX
from fal_contract.v1 import agent_pb2, state_pb2
from fal_scheduler.codec import residency_to_pb
from fal_scheduler.codec_spec import spec_to_pb
from fal_scheduler.core.bindings import shared
from fal_scheduler.core.records import CacheEntry, Goal, Model, ModelState, Runner, Spec
from fal_scheduler.core.state import State

_CACHED_MAX: Final = 512


class ManifestSource(Protocol):
    """Where manifests are (`manifest_desk.ManifestDesk`)."""

    def get(self, artifact_id: str) -> state_pb2.ModelManifest: ...


class AssignmentBuilder:
    """Assignments of one leader."""

    def __init__(self, manifests: ManifestSource) -> None:
        self._manifests = manifests
        self._specs: OrderedDict[tuple[str, int, str], state_pb2.AppSpec] = OrderedDict()
        self._artifacts: OrderedDict[tuple[str, str, str, bool, bool, int], agent_pb2.Artifact] = OrderedDict()

    def build(self, state: State, runner: Runner) -> agent_pb2.Assignment:
        """The message. Raises what stands in the way of a manifest (NOT_FOUND, CORRUPT, FAILED_PRECONDITION).

        A runner that is to end needs no models: its assignment can always be built.
        """
        assert runner.assignment is not None, f"{runner.id} has no assignment"
        message = agent_pb2.Assignment(
            id=runner.assignment.id,
            term=runner.assignment.term,
            runner_id=runner.id,
            goal=int(runner.goal),  # type: ignore[arg-type]  # the numbers are the wire's
            goal_reason=runner.goal_reason,
            app=runner.app,
            revision=runner.revision,
            share_group=runner.share_group,
            gpus=runner.gpus,
            inventory_generation=runner.assignment.inventory_generation,
            gpu_milli=runner.gpu_milli,
        )
        revision = state.revisions.get((runner.app, runner.revision))
        if revision is None:  # an adopted orphan of a forgotten revision: it can be stopped, not started
            return message
        message.spec.CopyFrom(self._spec(state, runner))
        if (scaling := state.scaling_for(runner)) is not None:  # may be set at run time
            message.spec.scaling.request_timeout_s = scaling.request_timeout_s
        if runner.goal is Goal.RUN:
            names = dict.fromkeys((*revision.spec.artifacts, *(one.model for one in runner.residencies)))
            for name in names:
                message.artifacts.append(self._artifact(state, name, revision.spec))
            if shared(runner):
                message.residencies.extend(residency_to_pb(one) for one in runner.residencies)
            team = team_of(runner.app)
            for key in revision.spec.compile_caches:
                if (entry := entry_for(state, team, key)) is not None:
                    message.artifacts.append(self._cached(state.models[entry.model], entry))
        return message

    def _spec(self, state: State, runner: Runner) -> state_pb2.AppSpec:
        revision = state.revisions[runner.app, runner.revision]
        key = (runner.app, runner.revision, revision.digest)
        spec = self._specs.get(key)
        if spec is None:
            spec = self._specs[key] = spec_to_pb(revision.spec)
            if len(self._specs) > _CACHED_MAX:
                self._specs.popitem(last=False)
        return spec

    def _cached(self, model: Model, entry: CacheEntry) -> agent_pb2.Artifact:
        """An entry is no condition of a start: where its manifest is not here, the node asks for it itself."""
        try:
            return entry_message(model, entry, self._manifests.get(model.artifact_id))
        except FalError:
            return entry_message(model, entry)

    def _artifact(self, state: State, name: str, spec: Spec) -> agent_pb2.Artifact:
        model = state.models.get(name)
        if model is None:
            raise FalError(Code.NOT_FOUND, f"model {name} is not registered", remedy="Register it again.")
        if model.withdrawn or not model.artifact_id:
            raise _not_usable(model)
        ordered = len(model.image.first_pieces) if model.image is not None else 0  # they are set once
        stream, provisional = spec.stream_weights, spec.allow_provisional
        key = (model.id, model.artifact_id, model.manifest_digest, stream, provisional, ordered)
        artifact = self._artifacts.get(key)
        if artifact is None:
            artifact = self._artifacts[key] = artifact_message(model, self._manifests.get(model.artifact_id), spec)
            if len(self._artifacts) > _CACHED_MAX:
                self._artifacts.popitem(last=False)
        return artifact


def entry_for(state: State, team: str, key: str) -> CacheEntry | None:
    """The entry that runners of `team` get for a key: their own, else the cluster's, never another team's."""
    for namespace in (namespace_of(team), CLUSTER):
        entry = state.catalog.cache_entries.get((namespace, key))
        if entry is None:
            continue
        model = state.models.get(entry.model)
        if model is not None and not model.withdrawn and model.manifest_digest == entry.manifest_digest:
            return entry
    return None


def artifact_message(model: Model, manifest: state_pb2.ModelManifest, spec: Spec | None = None) -> agent_pb2.Artifact:
    """What a node is told of a model: with its manifest where that is small, else by id and digest only.

    An image is always read while it arrives, the pieces first that a recorded start has read.
    """
    image = model.kind == "image"
    return agent_pb2.Artifact(
        model=model.id,
        kind=model.kind,
        uri=model.resolved_uri or model.uri,
        manifest_digest=model.manifest_digest,
        bytes=model.bytes,
        manifest=manifest if manifest.ByteSize() <= MANIFEST_EMBEDDED_BYTES_MAX else None,
        artifact_id=model.artifact_id,
        stream=image or (spec is not None and spec.stream_weights),
        allow_provisional=not image and spec is not None and spec.allow_provisional,
        first_pieces=model.image.first_pieces if model.image is not None else (),
    )


def entry_message(
    model: Model, entry: CacheEntry, manifest: state_pb2.ModelManifest | None = None
) -> agent_pb2.Artifact:
    """What a node is told of an entry of the compile cache: what it needs to prove whose it is."""
    message = artifact_message(model, manifest or state_pb2.ModelManifest())
    if manifest is None:
        message.ClearField("manifest")
    message.namespace, message.cache_key, message.entry_signature = entry.namespace, entry.key, entry.signature
    return message


def _not_usable(model: Model) -> FalError:
    if model.withdrawn:
        word = "refused" if model.state is ModelState.REFUSED else "withdrawn"
        what = f"model {model.id} was {word}: {model.reason}"
        return FalError(Code.FAILED_PRECONDITION, what, remedy="Apply the app with another model.")
    return FalError(
        Code.FAILED_PRECONDITION,
        f"model {model.id} was registered with an earlier release and is being read again",
        remedy="Wait; `falctl weights show` tells the state.",
    )


__all__ = ["AssignmentBuilder", "ManifestSource", "artifact_message", "entry_for", "entry_message"]
