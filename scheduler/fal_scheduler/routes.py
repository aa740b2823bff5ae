"""The route table: where each runner is that requests may be sent to, as gateways are told it.

Follows the engine's view, one runner at a time. UNKNOWN runners keep their routes and slots: their node is silent to
us, and may well be reached by gateways. Must not be changed by anything but `refresh`.
"""

from __future__ import annotations

from collections.abc import Collection

from fal_contract.v1 import serving_pb2
from fal_scheduler import wire
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
        route = _route(state, runner) if runner is not None and serves(state, runner) else None
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
        return SlotRunner(runner_id, route.app, route.node_id, route.max_multiplexing, tuple(route.resident))

    def all(self, apps: Collection[str]) -> list[serving_pb2.Route]:
        """Routes of these apps (none named: all), in order of runner id."""
        return [self._routes[i] for i in sorted(self._routes) if not apps or self._routes[i].app in apps]

    def __len__(self) -> int:
        return len(self._routes)


def _route(state: State, runner: Runner) -> serving_pb2.Route:
    live = state.live[runner.node]
    status = live.statuses[runner.id]
    revision = state.revisions.get((runner.app, runner.revision))
    scaling = state.scaling_for(runner)
    # IDLE and RUNNING alternate with every request; a gateway has no use for the difference.
    silent = live.health in (Health.UNKNOWN, Health.LOST)
    phase = RunnerState.UNKNOWN if silent else RunnerState.IDLE
    return serving_pb2.Route(
        runner_id=runner.id,
        app=runner.app,
        node_id=runner.node,
        endpoints=[wire.endpoint_to(endpoint) for endpoint in live.endpoints],
        state=int(phase),  # type: ignore[arg-type]  # the numbers are the wire's
        max_multiplexing=max(1, status.max_multiplexing or (scaling.max_multiplexing if scaling else 1)),
        resident=[residency.model for residency in status.residencies or runner.residencies],
        request_timeout_s=scaling.request_timeout_s if scaling else 0.0,
        any_path=revision is not None and revision.spec.own_server,
    )


__all__ = ["RouteTable"]
