"""Between the wire of weight caches and the core's values. Nothing is decided here but what names an artifact."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from sys import intern

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import CACHED_ARTIFACTS_PER_NODE_MAX
from fal_contract.model_manifest import check_digest
from fal_contract.v1 import agent_pb2, fsd_pb2, weights_pb2
from fal_scheduler.core.catalog import Catalog
from fal_scheduler.core.records import Model
from fal_scheduler.core.residency import Holding, Room
from fal_scheduler.core.told import Endpoint

_CAPABILITIES_MAX = 32
_TEXT_CHARS_MAX = 200  # of what a node says that holds an artifact up


def hello_in(message: weights_pb2.CacheUp, peer_name: str) -> weights_pb2.CacheHello:
    """The Hello of the node with that certificate. Raises INVALID, PERMISSION_DENIED."""
    if message.WhichOneof("kind") != "hello":
        raise invalid("kind", message.WhichOneof("kind"), "came before CacheHello", remedy="Send CacheHello first.")
    if message.hello.node_id != peer_name:
        raise FalError(
            Code.PERMISSION_DENIED,
            f"the CacheHello is node {message.hello.node_id!r}'s, the certificate {peer_name!r}'s",
            remedy="Use the identity that this node was given when it joined.",
            field="node_id",
        )
    return message.hello


def artifact_of(model: Model) -> str:
    """What names a model's artifact: its id, or its digest where a first release registered it."""
    return model.artifact_id or model.manifest_digest


def id_in(told: fsd_pb2.CachedArtifact, catalog: Catalog) -> str:
    """What names an artifact that a node told; a cache of the first release knows the digest only."""
    if told.artifact_id:
        return check_digest(told.artifact_id, field="artifact_id")
    check_digest(told.manifest_digest)
    models = catalog.by_digest.get(told.manifest_digest, ())
    return artifact_of(catalog.models[models[0]]) if models else told.manifest_digest


def holdings_in(artifacts: Iterable[fsd_pb2.CachedArtifact], catalog: Catalog) -> list[Holding]:
    """As the table keeps them. Raises INVALID for an id that is none."""
    return [_holding(one, catalog) for one in artifacts]


def _holding(told: fsd_pb2.CachedArtifact, catalog: Catalog) -> Holding:
    size = told.bytes
    return Holding(
        artifact_id=intern(id_in(told, catalog)),
        bytes=size,
        bytes_disk=size if told.bytes_disk == size else told.bytes_disk,  # one object: there are many
        bytes_memory=size if told.bytes_memory == size else told.bytes_memory,
        ready=told.ready,
        wanted=told.wanted,
        manifest_digest=intern(told.manifest_digest),
        model=intern(told.model[:_TEXT_CHARS_MAX]),
        kind=intern(told.kind[:_TEXT_CHARS_MAX]),
        rate_bytes_s=told.rate_bytes_s,
        bytes_from_origin=size if told.bytes_from_origin == size else told.bytes_from_origin,
        bytes_from_peers=size if told.bytes_from_peers == size else told.bytes_from_peers,
        waits_for=told.waits_for[:_TEXT_CHARS_MAX],
        pinned_by=tuple(told.pinned_by[:16]),
    )


def holding_out(holding: Holding) -> fsd_pb2.CachedArtifact:
    """For operators."""
    return fsd_pb2.CachedArtifact(
        manifest_digest=holding.manifest_digest,
        model=holding.model,
        bytes=holding.bytes,
        ready=holding.ready,
        pinned_by=holding.pinned_by,
        artifact_id=holding.artifact_id,
        bytes_disk=holding.bytes_disk,
        bytes_memory=holding.bytes_memory,
        kind=holding.kind,
        wanted=holding.wanted,
        rate_bytes_s=holding.rate_bytes_s,
        bytes_from_origin=holding.bytes_from_origin,
        bytes_from_peers=holding.bytes_from_peers,
        waits_for=holding.waits_for,
    )


def room_in(status: fsd_pb2.CacheStatus) -> Room:
    """What is free and taken."""
    return Room(status.disk_bytes_max, status.disk_bytes_used, status.memory_bytes_max, status.memory_bytes_used)


def rates_in(links: Iterable[weights_pb2.LinkRate]) -> Mapping[str, int]:
    """Bytes per second by source."""
    return {link.source[:_TEXT_CHARS_MAX]: link.rate_bytes_s for link in links}


def peers_in(told: Iterable[str], nodes: Container[str]) -> list[str]:
    """Node ids, of nodes that there are: a node that lies fills no memory."""
    return [node_id for node_id in told if node_id in nodes]


def manifests_in(told: Sequence[str]) -> Sequence[str]:
    """Ids of manifests that a node keeps, not more than it may have artifacts."""
    return told[:CACHED_ARTIFACTS_PER_NODE_MAX]


def capabilities_in(status: fsd_pb2.CacheStatus) -> dict[str, str]:
    """What works on a node, in a few words."""
    some = sorted(status.capabilities.items())[:_CAPABILITIES_MAX]
    return {name[:_TEXT_CHARS_MAX]: said[:_TEXT_CHARS_MAX] for name, said in some}


def endpoints_in(endpoints: Iterable[agent_pb2.Endpoint]) -> tuple[Endpoint, ...]:
    """At most eight; a machine has one address a network."""
    return tuple(Endpoint(intern(x.network), x.host, x.port) for x in list(endpoints)[:8])


__all__ = [
    "artifact_of",
    "capabilities_in",
    "endpoints_in",
    "hello_in",
    "holding_out",
    "holdings_in",
    "id_in",
    "manifests_in",
    "peers_in",
    "rates_in",
    "room_in",
]
