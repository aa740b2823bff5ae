"""Pools, nodes and quotas between records and messages, field by field. Used by `codec` and by the APIs."""

from __future__ import annotations

from fal_contract.v1 import state_pb2 as pb
from fal_scheduler.core.records import Drain, Node, Pool, Quota


def pool_to_pb(pool: Pool) -> pb.Pool:
    """A pool for the wire."""
    return pb.Pool(
        name=pool.name,
        cloud=pool.cloud,
        region=pool.region,
        zone=pool.zone,
        gpu_hour_price_micros=pool.gpu_hour_price_micros,
        egress_gib_price_micros=pool.egress_gib_price_micros,
        networks=pool.networks,
        spot=pool.spot,
        cache_bytes=pool.cache_bytes,
        trusted_network=pool.trusted_network,
        labels=pool.labels,
        generation=pool.generation,
        allow_host_network=pool.allow_host_network,
        reclaim_per_hour_ppm=pool.reclaim_per_hour_ppm,
        lost_declared_at_s=pool.lost_declared_at_s,
    )


def pool_from_pb(pool: pb.Pool) -> Pool:
    """A pool from the wire."""
    return Pool(
        name=pool.name,
        cloud=pool.cloud,
        region=pool.region,
        zone=pool.zone,
        gpu_hour_price_micros=pool.gpu_hour_price_micros,
        egress_gib_price_micros=pool.egress_gib_price_micros,
        networks=tuple(pool.networks),
        spot=pool.spot,
        cache_bytes=pool.cache_bytes,
        trusted_network=pool.trusted_network,
        labels=dict(pool.labels),
        generation=pool.generation,
        allow_host_network=pool.allow_host_network,
        reclaim_per_hour_ppm=pool.reclaim_per_hour_ppm,
        lost_declared_at_s=pool.lost_declared_at_s,
    )


def node_to_pb(node: Node) -> pb.Node:
    """A node for the wire."""
    return pb.Node(
        id=node.id,
        name=node.name,
        pool=node.pool,
        cordoned=node.cordoned,
        cordon_reason=node.cordon_reason,
        labels=node.labels,
        joined_at_s=node.joined_at_s,
        token_id=node.token_id,
        revoked=node.revoked,
        drain=_drain_to_pb(node.drain) if node.drain is not None else None,
        quarantined_gpus=node.quarantined_gpus,
    )


def _drain_to_pb(drain: Drain) -> pb.Drain:
    return pb.Drain(
        kind=drain.kind,
        reason=drain.reason,
        began_at_s=drain.began_at_s,
        deadline_at_s=drain.deadline_at_s,
        force=drain.force,
        keep_cordoned=drain.keep_cordoned,
        created_by=drain.created_by,
        boot_id=drain.boot_id,
        notice=drain.notice,
        notice_reason=drain.notice_reason,
        notice_at_s=drain.notice_at_s,
    )


def _drain_from_pb(drain: pb.Drain) -> Drain:
    return Drain(
        drain.kind,
        drain.reason,
        drain.began_at_s,
        drain.deadline_at_s,
        drain.force,
        drain.keep_cordoned,
        drain.created_by,
        drain.boot_id,
        drain.notice,
        drain.notice_reason,
        drain.notice_at_s,
    )


def node_from_pb(node: pb.Node) -> Node:
    """A node from the wire."""
    return Node(
        id=node.id,
        name=node.name,
        pool=node.pool,
        cordoned=node.cordoned,
        cordon_reason=node.cordon_reason,
        labels=dict(node.labels),
        joined_at_s=node.joined_at_s,
        token_id=node.token_id,
        revoked=node.revoked,
        drain=_drain_from_pb(node.drain) if node.HasField("drain") else None,
        quarantined_gpus=dict(node.quarantined_gpus),
    )


def quota_to_pb(quota: Quota) -> pb.Quota:
    """A quota for the wire."""
    return pb.Quota(
        team=quota.team, gpu_milli=quota.gpu_milli, no_borrowing=not quota.borrow, generation=quota.generation
    )


def quota_from_pb(quota: pb.Quota) -> Quota:
    """A quota from the wire."""
    return Quota(quota.team, quota.gpu_milli, not quota.no_borrowing, quota.generation)
