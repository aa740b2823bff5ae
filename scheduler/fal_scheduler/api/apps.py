"""Apps: apply, plan, scale, delete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fal_contract.errors import Code, FalError, not_found
from fal_contract.ids import check_customer, team_of
from fal_contract.manifest import AppManifest, spec_digest
from fal_contract.v1 import cluster_pb2, state_pb2
from fal_scheduler.api.paging import page
from fal_scheduler.api.views import app_view, placement_view
from fal_scheduler.codec_spec import scale_from_pb, spec_from_pb
from fal_scheduler.core.events import ApplyApp, DeleteApp, ScaleApp
from fal_scheduler.core.explain import why_pending
from fal_scheduler.core.model_commands import check_image, check_models
from fal_scheduler.core.place import Ask
from fal_scheduler.core.records import App, ModelState, Spec
from fal_scheduler.core.secrets import check_secrets
from fal_scheduler.core.state import Pending, State
from fal_scheduler.leadership import Leadership


async def apply_app(leader: Leadership, request: cluster_pb2.ApplyAppRequest, actor: str) -> cluster_pb2.ApplyAppReply:
    """Make a revision and let it run, in one commit. Raises INVALID, NOT_FOUND (model), CONFLICT."""
    message = _checked(request)
    spec = spec_from_pb(message)
    before = _current(leader.view, request.id)
    expected = request.expected_generation if request.HasField("expected_generation") else None
    reply = await leader.engine.submit(
        ApplyApp(request.id, spec, spec_digest(message), expected, actor, request.reset_scale)
    )
    state = leader.view
    mine = [state.runners[runner_id] for runner_id in state.runners_by_app.get(request.id, ())]
    # It looks at every node, and has nothing to tell where each runner has found one.
    found = None if mine and all(runner.node for runner in mine) else _why_pending(state, request.id, spec)
    return _reply(state, request.id, spec, before, reply.outcome, found)


def plan_app(leader: Leadership, request: cluster_pb2.ApplyAppRequest) -> cluster_pb2.ApplyAppReply:
    """What `apply_app` would do; changes nothing. Raises what it would raise."""
    state = leader.view
    spec = spec_from_pb(_checked(request))
    before = _current(state, request.id)
    app = state.apps.get(request.id)
    generation = app.generation if app is not None else 0
    if request.HasField("expected_generation") and request.expected_generation != generation:
        raise FalError(
            Code.CONFLICT,
            f"app {request.id!r} has generation {generation}, not {request.expected_generation}",
            remedy="Read it again; somebody changed it.",
        )
    check_models(state, spec)
    check_image(state, spec)
    check_secrets(state, team_of(request.id), spec)
    outcome = "created" if before is None else "unchanged" if before == spec else "changed"
    return _reply(state, request.id, spec, before, outcome, _why_pending(state, request.id, spec))


def _checked(request: cluster_pb2.ApplyAppRequest) -> state_pb2.AppSpec:
    """The spec, checked as strictly as a manifest file and brought to its canonical form."""
    return AppManifest.from_proto(check_customer(request.id, field="team"), request.spec).to_proto()


def _current(state: State, app_id: str) -> Spec | None:
    app = state.apps.get(app_id)
    return state.revision_of(app).spec if app is not None and not app.deleting else None


def _why_pending(state: State, app_id: str, spec: Spec) -> Pending:
    return why_pending(state, spec, Ask(app_id, team_of(app_id)))


def _reply(
    state: State, app_id: str, spec: Spec, before: Spec | None, outcome: str, found: Pending | None
) -> cluster_pb2.ApplyAppReply:
    """`found` is None where every runner has its place."""
    app = state.apps.get(app_id)
    return cluster_pb2.ApplyAppReply(
        app=app_view(state, app) if app is not None else None,
        outcome=outcome,
        changes=changes_of(before, spec),
        placement=placement_view(found) if found is not None else None,
        warnings=list(_warnings(state, app, spec, found)),
    )


def _warnings(state: State, app: App | None, spec: Spec, found: Pending | None) -> Iterator[str]:
    scaling = state.scaling_of(app) if app is not None else spec.scaling
    if not scaling.max_concurrency:
        yield "max_concurrency is 0: no runner starts until it is raised (`falctl app scale`)"
    elif not max(scaling.min_concurrency, scaling.concurrency_buffer):
        yield "min_concurrency is 0: the first request starts a runner, and waits for it"
    if scaling.max_concurrency and found is not None and not found.feasible:
        yield f"no runner can be placed now: {found.reason}"
    for name in (spec.model, *spec.loras):
        model = state.models.get(name)
        if model is not None and model.state is ModelState.REGISTERED:
            yield f"nobody has attested model {name} yet: runners stage it and start once its content is known"
    if app is not None and app.scale is not None:
        yield "scaling values set at run time stay in force; `falctl app apply --reset-scale` forgets them"


def changes_of(before: Any, after: Any) -> list[cluster_pb2.FieldChange]:
    """Fields of two dataclasses that differ, in order of path; nothing for a new one."""
    if before is None:
        return []
    old, new = dict(_flat(asdict(before))), dict(_flat(asdict(after)))
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return [cluster_pb2.FieldChange(field=path, before=old.get(path, ""), after=new.get(path, "")) for path in paths]


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{above}{key}.")
        else:
            yield f"{above}{key}", ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)


def list_apps(leader: Leadership, request: cluster_pb2.ListAppsRequest) -> cluster_pb2.ListAppsReply:
    """A page of a team's apps, or of all, in order of id."""
    state = leader.view
    keys = [(i,) for i in sorted(state.apps) if request.team in ("", team_of(i))]
    views, following = page(
        keys, lambda key: app_view(state, state.apps[key[0]]), limit=request.limit, after=request.after
    )
    return cluster_pb2.ListAppsReply(apps=views, next=following, total=len(keys))


def get_app(leader: Leadership, request: cluster_pb2.GetAppRequest) -> cluster_pb2.AppView:
    """One app."""
    return app_view(leader.view, _app(leader.view, request.id))


async def scale_app(leader: Leadership, request: cluster_pb2.ScaleAppRequest, actor: str) -> cluster_pb2.AppView:
    """Set scaling values at run time. Raises INVALID, NOT_FOUND."""
    check_customer(request.id, field="id")
    await leader.engine.submit(ScaleApp(request.id, scale_from_pb(request.scale), request.reset, actor))
    return app_view(leader.view, _app(leader.view, request.id))


async def delete_app(
    leader: Leadership, request: cluster_pb2.DeleteAppRequest, actor: str
) -> cluster_pb2.DeleteAppReply:
    """Stop an app's runners, then forget it. Raises NOT_FOUND."""
    runners = len(leader.view.runners_by_app.get(request.id, ()))
    await leader.engine.submit(DeleteApp(request.id, actor))
    return cluster_pb2.DeleteAppReply(runners=runners)


def _app(state: State, app_id: str) -> App:
    app = state.apps.get(app_id)
    if app is None:
        raise not_found("app", app_id, remedy="List apps with `falctl app list`.")
    return app


__all__ = ["apply_app", "changes_of", "delete_app", "get_app", "list_apps", "plan_app", "scale_app"]
