"""Which apps may share a runner, what each needs loaded in it, and which it serves now. Pure.

Apps share only where an operator said so (`share_group`), within one team, and where their containers would be the
same but for the model: `engine_of` is what must be equal. A *binding* is an app's place in a runner, a *residency* a
model or LoRA in its worker. An app is served by a runner once all that its binding needs is told as loaded.
Read by `sharing`, `scaling`, `reconcile`, routes and invariants; changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fal_scheduler.core.records import Residency, Runner
from fal_scheduler.core.spec_records import PlacementRules, RolloutPolicy, Scaling, Spec
from fal_scheduler.core.state import State

LOADED: Final = "loaded"
FAILED: Final = "failed"


def shareable(spec: Spec) -> bool:
    """Whether its runners may serve other apps, too."""
    return spec.share_group != "" and spec.build is None


def engine_of(spec: Spec) -> Spec:
    """The spec without what runners of one engine may differ in: models, how many, how they are rolled out."""
    kept = spec.scaling
    scaling = Scaling(
        max_multiplexing=kept.max_multiplexing,
        request_timeout_s=kept.request_timeout_s,
        startup_timeout_s=kept.startup_timeout_s,
    )
    return replace(spec, model="", loras=(), scaling=scaling, rollout=RolloutPolicy())


def same_engine(one: Spec, other: Spec) -> bool:
    """Whether containers of both would be the same. Rules about other apps are kept by placement, so by no swap."""
    ruled = PlacementRules()
    if one.placement.anti_affinity != ruled.anti_affinity or one.placement.affinity != ruled.affinity:
        return False
    return shareable(one) and engine_of(one) == engine_of(other)


def residencies_of(state: State, spec: Spec) -> tuple[Residency, ...]:
    """What a runner of `spec` loads; the id of one is what it is. Digests are empty before they are attested."""

    def digest(name: str) -> str:
        model = state.models.get(name)
        return model.manifest_digest if model is not None else ""

    if not spec.model:
        return ()
    if not shareable(spec):
        return (Residency("main", spec.model, digest(spec.model)),)
    loras = tuple(Residency(f"{one}@{spec.model}", one, digest(one), spec.model) for one in spec.loras)
    return (Residency(spec.model, spec.model, digest(spec.model)), *loras)


def needs_of(state: State, runner: Runner, app_id: str) -> tuple[str, ...]:
    """Ids of the residencies that an app's binding needs in a runner of a share group."""
    revision = state.revisions.get((app_id, runner.revision_for(app_id)))
    if revision is None:
        return ()
    return tuple(one.id for one in residencies_of(state, revision.spec))


def shared(runner: Runner) -> bool:
    """Whether it is a runner of a share group that an operator named; ids of apps have a slash, such names none."""
    return "/" not in runner.share_group


def serves_app(state: State, runner: Runner, app_id: str) -> bool:
    """Whether requests of an app may be sent to it, as far as its node told: ready, and what it needs is loaded."""
    status = state.status_of(runner)
    if status is None or not status.serves:
        return False
    if not shared(runner):
        return True
    told = {one.id: one.state for one in status.residents}
    if not told:  # not told yet, or by an older agent: what it began with is there
        return runner.bindings[0].app == app_id
    return all(told.get(id_) == LOADED for id_ in needs_of(state, runner, app_id))


def served_apps(state: State, runner: Runner) -> tuple[str, ...]:
    """Every app that requests may be sent to it for."""
    return tuple(app_id for app_id in runner.apps if serves_app(state, runner, app_id))


def failure_of(state: State, runner: Runner, app_id: str) -> str:
    """Why what an app needs cannot be loaded in a runner; empty: nothing is told."""
    status = state.status_of(runner)
    if status is None or not status.residents:
        return ""
    needs = needs_of(state, runner, app_id)
    return next(
        (one.reason or "it did not load" for one in status.residents if one.state == FAILED and one.id in needs), ""
    )


__all__ = [
    "LOADED",
    "engine_of",
    "failure_of",
    "needs_of",
    "residencies_of",
    "same_engine",
    "served_apps",
    "serves_app",
    "shareable",
    "shared",
]
