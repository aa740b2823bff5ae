"""What is here or on its way, as the agent and the scheduler see it. Pure but for reading transfers' counters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from fal_contract.v1 import fsd_pb2
from fal_fsd.disk.store import CachedRecord
from fal_fsd.transfer import Phase, Transfer

_FIELD_BYTES: Final = 6  # of the message around it


def artifacts(
    records: Iterable[CachedRecord], active: Mapping[str, Transfer], bytes_locked: Callable[[str], int]
) -> list[fsd_pb2.CachedArtifact]:
    """One an artifact, in the records' order."""
    return [_view(record, active.get(record.id), bytes_locked(record.id)) for record in records]


def that_fit(told: Iterable[fsd_pb2.CachedArtifact], bytes_max: int) -> tuple[list[fsd_pb2.CachedArtifact], list[str]]:
    """As many as one message of so many bytes holds, those that somebody uses first; artifact ids of the others."""
    first: list[fsd_pb2.CachedArtifact] = []
    rest: list[str] = []
    for view in sorted(told, key=lambda view: (not view.pinned_by, not view.wanted, not view.ready)):
        bytes_max -= view.ByteSize() + _FIELD_BYTES
        first.append(view) if bytes_max >= 0 else rest.append(view.artifact_id)
    return first, rest


def _view(record: CachedRecord, transfer: Transfer | None, bytes_memory: int) -> fsd_pb2.CachedArtifact:
    told = fsd_pb2.CachedArtifact(
        manifest_digest=record.manifest_digest,
        model=record.models[0] if record.models else "",
        bytes=record.bytes_total,
        ready=record.ready,
        pinned_by=record.pinned_by,
        artifact_id=record.id,
        bytes_disk=record.bytes_disk,
        bytes_memory=bytes_memory,
        kind=record.kind,
        bytes_from_origin=record.bytes_from_origin,
        bytes_from_peers=record.bytes_from_peers,
    )
    if transfer is not None and not record.ready:
        told.wanted = transfer.phase is not Phase.FAILED
        told.bytes_disk = transfer.tally.bytes_done
        told.rate_bytes_s = transfer.tally.rate_bytes_s
        told.bytes_from_origin = transfer.tally.bytes_from_origin
        told.bytes_from_peers = transfer.tally.bytes_from_peers
        told.waits_for = transfer.waits_for
    return told


__all__ = ["artifacts", "that_fit"]
