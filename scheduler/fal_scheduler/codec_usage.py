"""Usage between records and messages, field by field. Used by `codec` and by the API."""

from __future__ import annotations

from fal_contract.v1 import state_pb2 as pb
from fal_scheduler.core.usage_records import Usage, UsageDay, UsageRow


def usage_to_pb(usage: Usage) -> pb.Usage:
    """What a container used, for the wire."""
    return pb.Usage(
        assignment=usage.assignment,
        app=usage.app,
        revision=usage.revision,
        runner=usage.runner,
        pool=usage.pool,
        node=usage.node,
        machine_type=usage.machine_type,
        gpus=usage.gpus,
        gpu_milli=usage.gpu_milli,
        started_at_s=usage.started_at_s,
        until_s=usage.until_s,
        gpu_ms=usage.gpu_ms,
        busy_gpu_ms=usage.busy_gpu_ms,
        served=usage.served,
        price_micros=usage.price_micros,
        ended=usage.ended,
    )


def usage_from_pb(usage: pb.Usage) -> Usage:
    """What a container used, from the wire."""
    return Usage(
        usage.assignment,
        usage.app,
        usage.revision,
        usage.runner,
        usage.pool,
        usage.node,
        usage.machine_type,
        usage.gpus,
        usage.gpu_milli,
        usage.started_at_s,
        usage.until_s,
        usage.gpu_ms,
        usage.busy_gpu_ms,
        usage.served,
        usage.price_micros,
        usage.ended,
    )


def usage_row_to_pb(row: UsageRow) -> pb.UsageRow:
    """A sum, for the wire."""
    return pb.UsageRow(
        app=row.app,
        pool=row.pool,
        machine_type=row.machine_type,
        gpu_ms=row.gpu_ms,
        busy_gpu_ms=row.busy_gpu_ms,
        served=row.served,
        cost_micros=row.cost_micros,
        runners=row.runners,
    )


def usage_day_to_pb(day: UsageDay) -> pb.UsageDay:
    """A day's sums, for the wire."""
    return pb.UsageDay(day=day.day, part=day.part, rows=[usage_row_to_pb(row) for row in day.rows])


def usage_day_from_pb(day: pb.UsageDay) -> UsageDay:
    """A day's sums, from the wire."""
    rows = (
        UsageRow(
            row.app,
            row.pool,
            row.machine_type,
            row.gpu_ms,
            row.busy_gpu_ms,
            row.served,
            row.cost_micros,
            row.runners,
        )
        for row in day.rows
    )
    return UsageDay(day.day, day.part, tuple(rows))
