"""The route table: where each runner is that requests may be sent to, as gateways are told it.

Follows the engine's view, one runner at a time. UNKNOWN runners keep their routes and slots: their node is silent to
us, and may well be reached by gateways. Must not be changed by anything but `refresh`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fal_contract.v1 import serving_pb2
from fal_scheduler import wire
from fal_scheduler.core.bindings import served_apps, shared
from fal_scheduler.core.records import Runner, RunnerState
from fal_scheduler.core.serving import serves
from fal_scheduler.core.slots import SlotRunner
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health


class RouteTable:
    """Routes by runner id."""

    def __init__(self) -> None:
        self._routes: dict[str, serving_pb2.Route] = {}

    def refresh(self, state: State, runner_id: str) -> bool:
        """Work one route out anew; True when it changed."""
        runner = state.runners.get(runner_id)
        apps = served_apps(state, runner) if runner is not None and serves(state, runner) else ()
        route = _route(state, runner, apps) if runner is not None and apps else None
        if route == self._routes.get(runner_id):
            return False
        if route is None:
            del self._routes[runner_id]
        else:
            self._routes[runner_id] = route
        return True

    def get(self, runner_id: str) -> serving_pb2.Route | None:
        """The route; do not change it."""
        return self._routes.get(runner_id)

    def slots(self, runner_id: str) -> SlotRunner | None:
        """The runner as the slot book sees it."""
        route = self._routes.get(runner_id)
        if route is None:
            return None
        others = tuple(one.app for one in route.shared if one.app != route.app)
        return SlotRunner(runner_id, route.app, route.node_id, route.max_multiplexing, tuple(route.resident), others)

    def all(self, apps: Collection[str]) -> list[serving_pb2.Route]:
        """Routes of these apps (none named: all), in order of runner id."""
        return [self._routes[i] for i in sorted(self._routes) if not apps or any_of(apps, self._routes[i])]

    def __len__(self) -> int:
        return len(self._routes)


def apps_of(route: serving_pb2.Route) -> list[str]:
    """Every app that it serves."""
    return [one.app for one in route.shared] or [route.app]


def any_of(apps: Collection[str], route: serving_pb2.Route) -> bool:
    """Whether it serves one of these apps."""
    return any(app in apps for app in apps_of(route))


def _route(state: State, runner: Runner, apps: Sequence[str]) -> serving_pb2.Route:
    live = state.live[runner.node]
    status = live.statuses[runner.id]
    revision = state.revisions.get((runner.app, runner.revision))
    scaling = state.scaling_for(runner)
    # IDLE and RUNNING alternate with every request; a gateway has no use for the difference.
    silent = live.health in (Health.UNKNOWN, Health.LOST)
    phase = RunnerState.UNKNOWN if silent else RunnerState.IDLE
    return serving_pb2.Route(
        runner_id=runner.id,
        app=apps[0],
        node_id=runner.node,
        endpoints=[wire.endpoint_to(endpoint) for endpoint in live.endpoints],
        state=int(phase),  # type: ignore[arg-type]  # the numbers are the wire's
        max_multiplexing=max(1, status.max_multiplexing or (scaling.max_multiplexing if scaling else 1)),
        resident=[residency.model for residency in status.residencies or runner.residencies],
        request_timeout_s=scaling.request_timeout_s if scaling else 0.0,
        any_path=revision is not None and revision.spec.own_server,
        shared=_shared(state, runner, apps) if shared(runner) else (),
    )


def _shared(state: State, runner: Runner, apps: Sequence[str]) -> list[serving_pb2.SharedApp]:
    models = {one.id: one.model for one in runner.residencies}
    bound = {one.app: models.get(one.residency, "") for one in runner.bindings}
    return [serving_pb2.SharedApp(app=app, model=bound[app]) for app in apps]


__all__ = ["RouteTable", "any_of", "apps_of"]
