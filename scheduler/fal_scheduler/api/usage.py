"""Usage: sums and single containers, from the ledger and from what nodes tell now."""

from __future__ import annotations

from typing import Final

from fal_contract.errors import invalid
from fal_contract.ids import team_of
from fal_contract.v1 import cluster_pb2
from fal_scheduler.codec_usage import usage_row_to_pb, usage_to_pb
from fal_scheduler.core import usage
from fal_scheduler.leadership import Leadership

DETAILS_PER_PAGE_MAX: Final = 5000


def get_usage(leader: Leadership, request: cluster_pb2.GetUsageRequest) -> cluster_pb2.GetUsageReply:
    """Between two moments. Raises INVALID where they are no interval."""
    now_s, wall_s = leader.clock.monotonic_s(), leader.clock.wall_s()
    until_s = min(request.until_s or wall_s, wall_s)
    if not 0.0 <= request.since_s < until_s:
        remedy = "Give a moment in the past that is before the other."
        raise invalid("since", request.since_s, "is not before the end", remedy=remedy)
    state, reply = leader.view, cluster_pb2.GetUsageReply(until_s=until_s)
    if not request.details:
        found = usage.rows(state, since_s=request.since_s, until_s=until_s, now_s=now_s, wall_s=wall_s)
        reply.rows.extend(usage_row_to_pb(row) for row in found if request.team in ("", team_of(row.app)))
        return reply
    present = {one.assignment: one for one in usage.running(state, now_s, wall_s)}
    details = {**state.usage, **present}
    chosen = [
        details[key]
        for key in sorted(details)
        if key > request.after
        and request.team in ("", team_of(details[key].app))
        and usage.between(details[key], request.since_s, until_s) is not None
    ]
    reply.usages.extend(usage_to_pb(one) for one in chosen[:DETAILS_PER_PAGE_MAX])
    reply.more = len(chosen) > DETAILS_PER_PAGE_MAX
    return reply


__all__ = ["DETAILS_PER_PAGE_MAX", "get_usage"]
