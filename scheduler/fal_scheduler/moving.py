"""Filling a store from a snapshot or from another store, while no scheduler leads on it.

Invariants: the store that is filled is led by us meanwhile, so that nobody else commits to it; it carries a mark until
its last commit, which writes the cluster's record, so that a move that was cut is never taken for a store; the source
is only read, until all but that commit are done, and is marked before it: at no moment may two stores be led on. A move
that was cut between both is finished by doing it again. The cluster's epoch rises and its incarnation is new: nodes
follow the filled store without a doubt, and hold back what an old copy of it would ask (pitfall 24). No container is
told anything here.

Called by the offline verbs. Blocks on small files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Final

from google.protobuf.message import DecodeError

from fal_contract import snapshot_file
from fal_contract.errors import Code, FalError
from fal_contract.ids import random_suffix
from fal_contract.limits import COMMIT_BYTES_MAX, COMMIT_OPERATIONS_MAX, STORE_LEASE_TTL_S
from fal_contract.v1 import state_pb2
from fal_scheduler.blobs import ManifestBlobs, check_manifest
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.codec import decode, encode
from fal_scheduler.core.records import META_KEY, Meta
from fal_scheduler.store.interface import Guard, Store, Write
from fal_scheduler.store_mark import MARK_KEY, UNFINISHED, check_mark, moved, moved_to

CAMPAIGN_WAIT_S: Final = STORE_LEASE_TTL_S + 3.0  # a leader that was killed is named as long as its lease runs
_HOLDER: Final = "offline"


@dataclass(frozen=True, slots=True)
class Filled:
    """What a store has been filled with."""

    cluster_id: str
    epoch: int
    incarnation: str
    records: int
    term: int
    manifests: int = 0


async def restore(
    store: Store, file: Path, *, ca: CertificateAuthority, blobs: Path, force: bool, wait_s: float = CAMPAIGN_WAIT_S
) -> Filled:
    """Fill `store` with a snapshot, and `blobs` with its manifests. The store is opened and closed here.

    Raises CORRUPT, VERSION_MISMATCH, NOT_FOUND (the file), FAILED_PRECONDITION (another cluster's, not empty, led).
    """
    head = await asyncio.to_thread(snapshot_file.check, file)
    if head["cluster_id"] != ca.cluster_id:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"{file} is of cluster {head['cluster_id']}, the CA here of {ca.cluster_id}",
            remedy="Restore it beside the identity folder of its own cluster.",
        )
    records = await asyncio.to_thread(lambda: dict(_records(file)))
    if len(records) != head["records"]:
        raise FalError(
            Code.CORRUPT, f"{file} has {len(records)} records, not {head['records']}", remedy="Use another one."
        )
    async with _led(store, wait_s, term_min=int(head["term"]) + 1) as guard:
        filled = await _fill(store, guard, records, force=force)
    kept = await asyncio.to_thread(_keep_manifests, file, ManifestBlobs(blobs, ca.public_key), ca)
    return replace(filled, manifests=kept)


async def migrate(source: Store, target: Store, *, where: str, force: bool, wait_s: float = CAMPAIGN_WAIT_S) -> Filled:
    """Move all records from one store to another; the source is marked. Both are opened and closed here.

    `where`: what the source says of the target from now on. A source that says so already is moved again, if the target
    is still unfinished. Raises FAILED_PRECONDITION (one is led, the target is not empty), what the stores raise.
    """
    async with _led(source, wait_s) as from_:
        records = dict((await source.load()).records)
        cut = moved_to(records.get(MARK_KEY, b"")) == where
        if not cut:
            check_mark(records)
        if META_KEY not in records:
            raise FalError(
                Code.FAILED_PRECONDITION, "the store to move holds no cluster", remedy="Name the right data folder."
            )
        async with _led(target, wait_s, term_min=from_.term + 1) as to:
            if cut and (await target.load()).records.get(MARK_KEY) != UNFINISHED:
                check_mark(records)  # that one is complete, or another store by now
            records.pop(MARK_KEY, None)
            leave = partial(source.commit, from_, [Write(MARK_KEY, moved(where))])
            return await _fill(target, to, records, force=force, before_last=leave)


@asynccontextmanager
async def _led(store: Store, wait_s: float, *, term_min: int = 0) -> AsyncIterator[Guard]:
    """The store, open and led by us, so that no scheduler can be; FAILED_PRECONDITION where one is."""
    await store.open()
    try:
        try:
            async with asyncio.timeout(wait_s):
                guard = await store.campaign(_HOLDER, term_min=term_min)
        except TimeoutError:
            leader = (await store.roster()).leader
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"a scheduler leads on the {store.name} store{f': {leader}' if leader else ''}",
                remedy="Stop all schedulers first; what runs on the nodes goes on serving.",
            ) from None
        try:
            yield guard
        finally:
            await store.resign(guard)
    finally:
        await store.close()


async def _fill(
    store: Store,
    guard: Guard,
    records: Mapping[str, bytes],
    *,
    force: bool,
    before_last: Callable[[], Awaitable[object]] | None = None,
) -> Filled:
    """Replace what is in the store; `before_last` is done when only the commit that makes it valid is left."""
    present = (await store.load()).records
    old = _meta_of(present)
    if present and not force and not moved_to(present.get(MARK_KEY, b"")) and present.get(MARK_KEY) != UNFINISHED:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"the {store.name} store is not empty: it has {len(present)} records"
            + (f" of cluster {old.cluster_id}" if old is not None else ""),
            remedy="Name an empty store, or replace what is there with --force.",
        )
    meta = _meta_of(records)
    if meta is None:
        raise FalError(Code.CORRUPT, "there is no cluster's record in it", remedy="Use another snapshot.")
    for key, value in records.items():  # all of it can be read, or nothing is changed
        decode(key, value)
    epoch = max(meta.epoch, old.epoch if old is not None and old.cluster_id == meta.cluster_id else 0) + 1
    meta = replace(meta, epoch=epoch, incarnation=random_suffix(SystemRandom(), 16), suspicion=None)
    await store.commit(guard, [Write(MARK_KEY, UNFINISHED)])
    stale = (Write(key, None) for key in present if key not in records and key != MARK_KEY)
    for batch in _batches((*stale, *(Write(key, value) for key, value in records.items() if key != META_KEY))):
        await store.commit(guard, batch)
    if before_last is not None:
        await before_last()
    await store.commit(guard, [Write(META_KEY, encode(meta)), Write(MARK_KEY, None)])
    return Filled(meta.cluster_id, meta.epoch, meta.incarnation, len(records), guard.term)


def _batches(writes: Iterable[Write]) -> Iterator[list[Write]]:
    """As few commits as the store's bounds allow."""
    batch: list[Write] = []
    size = 0
    for write in writes:
        more = len(write.key.encode()) + len(write.value or b"")
        if batch and (len(batch) == COMMIT_OPERATIONS_MAX or size + more > COMMIT_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(write)
        size += more
    if batch:
        yield batch


def _meta_of(records: Mapping[str, bytes]) -> Meta | None:
    value = records.get(META_KEY)
    if value is None:
        return None
    meta = decode(META_KEY, value)
    assert isinstance(meta, Meta), "its key says so"
    return meta


def _records(file: Path) -> Iterator[tuple[str, bytes]]:
    for kind, key, value in snapshot_file.entries(file):
        if kind == snapshot_file.RECORD:
            yield key, value


def _keep_manifests(file: Path, blobs: ManifestBlobs, ca: CertificateAuthority) -> int:
    """Those that prove themselves and are not here in full; how many were written."""
    kept = 0
    for kind, id_, value in snapshot_file.entries(file):
        if kind != snapshot_file.MANIFEST:
            continue
        try:
            artifact = check_manifest(state_pb2.ModelManifest.FromString(value), id_, ca.public_key)
        except (DecodeError, FalError):
            continue
        if not (blobs.has(id_) and (not artifact.attested or blobs.artifact(id_).attested)):
            blobs.put(artifact)
            kept += 1
    return kept


__all__ = ["Filled", "migrate", "restore"]
