"""Plans: what applying manifests would do, by the production core on a copy of the state."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import check_customer
from fal_contract.manifest import AppManifest, PoolManifest, spec_digest
from fal_contract.v1 import cluster_pb2
from fal_scheduler.api.apps import changes_of
from fal_scheduler.codec_nodes import pool_from_pb
from fal_scheduler.codec_spec import spec_from_pb
from fal_scheduler.core.dry_run import Effects, dry_run, packed, unpacked
from fal_scheduler.core.events import ApplyApp, ApplyPool, Moment
from fal_scheduler.core.ready_at import NEVER_MS
from fal_scheduler.core.state import State
from fal_scheduler.leadership import Leadership

ITEMS_MAX: Final = 256
NODES_MAX: Final = 5000  # a copy of a larger state would hold up everybody for too long


async def plan(leader: Leadership, request: cluster_pb2.PlanRequest) -> cluster_pb2.PlanReply:
    """What would become of each manifest. Raises what applying it would raise; INVALID where nothing is asked."""
    if not 0 < len(request.items) <= ITEMS_MAX:
        raise invalid("items", len(request.items), "is out of bounds", remedy=f"Give 1 to {ITEMS_MAX} manifests.")
    state = leader.view
    if len(state.nodes) > NODES_MAX:
        what = f"the cluster has {len(state.nodes)} nodes; plans are made of up to {NODES_MAX}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="`falctl app plan -f FILE` looks at one app.")
    commands = [_command(item) for item in request.items]
    copy = packed(state)
    moment = Moment(leader.clock.monotonic_s(), leader.clock.wall_s())

    def run() -> tuple[State, list[Effects], list[list[cluster_pb2.FieldChange]]]:
        planned = unpacked(copy)
        found, changes = [], []
        for command in commands:  # one after the other: each builds on those before
            changes.append(_changes(planned, command))
            found += dry_run(planned, [command], moment)
        return planned, found, changes

    planned, found, changes = await asyncio.to_thread(run)
    reply = cluster_pb2.PlanReply()
    for command, effects, differing in zip(commands, found, changes, strict=True):
        _told(reply.items.add(), planned, command, effects, differing)
    return reply


def _command(item: cluster_pb2.PlanItem) -> ApplyApp | ApplyPool:
    match item.WhichOneof("kind"):
        case "pool":
            pool = PoolManifest.from_proto(item.pool.pool).to_proto()
            expected = item.pool.expected_generation if item.pool.HasField("expected_generation") else None
            return ApplyPool(pool_from_pb(pool), expected)
        case "app":
            message = AppManifest.from_proto(check_customer(item.app.id, field="team"), item.app.spec).to_proto()
            expected = item.app.expected_generation if item.app.HasField("expected_generation") else None
            return ApplyApp(item.app.id, spec_from_pb(message), spec_digest(message), expected)
    raise invalid("items", "nothing", "is neither an app nor a pool", remedy="Give manifests.")


def _changes(state: State, command: ApplyApp | ApplyPool) -> list[cluster_pb2.FieldChange]:
    before: Any
    if isinstance(command, ApplyPool):
        before, after = state.pools.get(command.pool.name), command.pool
        return [one for one in changes_of(before, after) if one.field not in ("generation", "lost_declared_at_s")]
    app = state.apps.get(command.id)
    before = state.revision_of(app).spec if app is not None and not app.deleting else None
    return changes_of(before, command.spec)


def _told(
    item: cluster_pb2.PlannedItem,
    state: State,
    command: ApplyApp | ApplyPool,
    effects: Effects,
    changes: list[cluster_pb2.FieldChange],
) -> None:
    item.kind = "pool" if isinstance(command, ApplyPool) else "app"
    item.name = command.pool.name if isinstance(command, ApplyPool) else command.id
    item.outcome, item.rollout = effects.outcome, effects.rollout
    item.changes.extend(changes if effects.outcome == "changed" else ())
    item.drains.extend(effects.drains)
    item.stops.extend(effects.stops)
    item.cost_micros_per_hour = effects.cost_micros_per_hour
    for start in effects.starts:
        node = state.nodes.get(start.node_id)
        item.starts.add(
            app=start.app,
            node_id=start.node_id,
            node_name=node.name if node is not None else "",
            gpus=start.gpus,
            ready_ms=start.ready_ms if start.ready_ms < NEVER_MS else -1,
            reason=start.reason,
        )
    if state.hold_all:
        item.warnings.append(f"nothing starts or stops by itself: {state.hold_all}")


__all__ = ["plan"]
