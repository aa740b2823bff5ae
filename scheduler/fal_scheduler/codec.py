"""Records and their bytes in the store: `fal.v1.Record`, one a key.

A record of a newer version than ours is refused (VERSION_MISMATCH), one that cannot be read or stands under another's
key is refused (CORRUPT); both errors name the key. Called by the engine at loading and at each commit, and for specs
by the APIs. Must not decide anything; everything is copied field by field, and a property test holds the round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2 as pb
from fal_scheduler.codec_nodes import (
    node_from_pb,
    node_to_pb,
    pool_from_pb,
    pool_to_pb,
    quota_from_pb,
    quota_to_pb,
)
from fal_scheduler.codec_spec import scale_from_pb, scale_to_pb, spec_from_pb, spec_to_pb
from fal_scheduler.codec_usage import usage_day_from_pb, usage_day_to_pb, usage_from_pb, usage_to_pb
from fal_scheduler.codec_weights import (
    cache_entry_from_pb,
    cache_entry_to_pb,
    model_from_pb,
    model_to_pb,
    wish_from_pb,
    wish_to_pb,
)
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    CacheEntry,
    Goal,
    Meta,
    Model,
    Node,
    Pool,
    Quota,
    Record,
    Residency,
    Revision,
    Revocation,
    Rollout,
    Runner,
    Secret,
    Suspicion,
    Usage,
    UsageDay,
    Wish,
    key_of,
)
from fal_scheduler.core.tokens import JoinToken

RECORD_VERSION: Final = 1


def encode(record: Record) -> bytes:
    """A record as the store keeps it."""
    match record:
        case Runner():
            message = pb.Record(version=RECORD_VERSION, runner=runner_to_pb(record))
        case App():
            message = pb.Record(version=RECORD_VERSION, app=app_to_pb(record))
        case Revision():
            message = pb.Record(version=RECORD_VERSION, revision=revision_to_pb(record))
        case Node():
            message = pb.Record(version=RECORD_VERSION, node=node_to_pb(record))
        case Pool():
            message = pb.Record(version=RECORD_VERSION, pool=pool_to_pb(record))
        case Model():
            message = pb.Record(version=RECORD_VERSION, model=model_to_pb(record))
        case Wish():
            message = pb.Record(version=RECORD_VERSION, wish=wish_to_pb(record))
        case CacheEntry():
            message = pb.Record(version=RECORD_VERSION, cache_entry=cache_entry_to_pb(record))
        case Secret():
            message = pb.Record(version=RECORD_VERSION, secret=_secret_to_pb(record))
        case JoinToken():
            message = pb.Record(version=RECORD_VERSION, token=_token_to_pb(record))
        case Revocation():
            message = pb.Record(version=RECORD_VERSION, revocation=_revocation_to_pb(record))
        case Quota():
            message = pb.Record(version=RECORD_VERSION, quota=quota_to_pb(record))
        case Usage():
            message = pb.Record(version=RECORD_VERSION, usage=usage_to_pb(record))
        case UsageDay():
            message = pb.Record(version=RECORD_VERSION, usage_day=usage_day_to_pb(record))
        case Learnt():
            message = pb.Record(version=RECORD_VERSION, learnt=_learnt_to_pb(record))
        case Meta():
            message = pb.Record(version=RECORD_VERSION, meta=_meta_to_pb(record))
    return message.SerializeToString()


def decode(key: str, value: bytes) -> Record:
    """The record under `key`. Raises VERSION_MISMATCH or CORRUPT, naming the key."""
    try:
        message = pb.Record.FromString(value)
    except DecodeError as error:
        raise _corrupt(key, "cannot be read") from error
    if message.version > RECORD_VERSION:
        raise FalError(
            Code.VERSION_MISMATCH,
            f"record {key!r} is of version {message.version}, this scheduler reads up to {RECORD_VERSION}",
            remedy="Start the newer scheduler that wrote it; nothing was changed.",
        )
    kind = message.WhichOneof("kind")
    if kind is None or message.version == 0:
        raise _corrupt(key, "names no kind or no version")
    try:
        record = _DECODE[kind](message)
        expected = key_of(record)
    except (ValueError, IndexError) as error:
        raise _corrupt(key, f"holds a value that is none ({error})") from error
    if expected != key:
        raise _corrupt(key, f"holds the record of {expected!r}")
    return record


def _corrupt(key: str, why: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"record {key!r} {why}",
        remedy="Restore the store from a copy; nothing was changed.",
    )


def _learnt_to_pb(learnt: Learnt) -> pb.Learnt:
    entries = [pb.LearntEntry(key=key, numbers=numbers) for key, numbers in learnt.entries]
    return pb.Learnt(shard=learnt.shard, saved_at_s=learnt.saved_at_s, entries=entries)


def _learnt_from_pb(learnt: pb.Learnt) -> Learnt:
    entries = tuple((entry.key, tuple(entry.numbers)) for entry in learnt.entries)
    return Learnt(learnt.shard, learnt.saved_at_s, entries)


def _secret_to_pb(secret: Secret) -> pb.Secret:
    return pb.Secret(
        id=secret.id,
        sealed=secret.sealed,
        generation=secret.generation,
        created_at_s=secret.created_at_s,
        updated_at_s=secret.updated_at_s,
        updated_by=secret.updated_by,
        bytes=secret.bytes,
    )


def _secret_from_pb(secret: pb.Secret) -> Secret:
    return Secret(
        secret.id,
        secret.sealed,
        secret.generation,
        secret.created_at_s,
        secret.updated_at_s,
        secret.updated_by,
        secret.bytes,
    )


def _meta_to_pb(meta: Meta) -> pb.Meta:
    message = pb.Meta(
        cluster_id=meta.cluster_id,
        epoch=meta.epoch,
        incarnation=meta.incarnation,
        created_at_s=meta.created_at_s,
        accepted_clusters=meta.accepted_clusters,
    )
    if (found := meta.suspicion) is not None:
        message.suspicion.CopyFrom(
            pb.Suspicion(
                reason=found.reason,
                store_revision=found.store_revision,
                revision_seen=found.revision_seen,
                epoch_seen=found.epoch_seen,
                noticed_at_s=found.noticed_at_s,
            )
        )
    return message


def _meta_from_pb(meta: pb.Meta) -> Meta:
    return Meta(
        cluster_id=meta.cluster_id,
        epoch=meta.epoch,
        incarnation=meta.incarnation,
        created_at_s=meta.created_at_s,
        accepted_clusters=tuple(meta.accepted_clusters),
        suspicion=_suspicion_from_pb(meta.suspicion) if meta.HasField("suspicion") else None,
    )


def _suspicion_from_pb(found: pb.Suspicion) -> Suspicion:
    return Suspicion(found.reason, found.store_revision, found.revision_seen, found.epoch_seen, found.noticed_at_s)


def _token_to_pb(token: JoinToken) -> pb.JoinToken:
    return pb.JoinToken(
        id=token.id,
        secret_sha256=token.secret_sha256,
        pool=token.pool,
        expires_at_s=token.expires_at_s,
        uses_left=token.uses_left,
        revoked=token.revoked,
        created_by=token.created_by,
        created_at_s=token.created_at_s,
    )


def _token_from_pb(token: pb.JoinToken) -> JoinToken:
    return JoinToken(
        id=token.id,
        secret_sha256=token.secret_sha256,
        pool=token.pool,
        expires_at_s=token.expires_at_s,
        uses_left=token.uses_left,
        revoked=token.revoked,
        created_by=token.created_by,
        created_at_s=token.created_at_s,
    )


def _revocation_to_pb(revocation: Revocation) -> pb.Revocation:
    return pb.Revocation(
        serial=revocation.serial,
        subject=revocation.subject,
        revoked_at_s=revocation.revoked_at_s,
        reason=revocation.reason,
    )


def _revocation_from_pb(revocation: pb.Revocation) -> Revocation:
    return Revocation(revocation.serial, revocation.subject, revocation.revoked_at_s, revocation.reason)


def app_to_pb(app: App) -> pb.App:
    """An app for the wire."""
    message = pb.App(
        id=app.id,
        revision=app.revision,
        generation=app.generation,
        deleting=app.deleting,
        created_at_s=app.created_at_s,
    )
    if app.scale is not None:
        message.scale.CopyFrom(scale_to_pb(app.scale))
    if (rollout := app.rollout) is not None:
        message.rollout.CopyFrom(
            pb.Rollout(
                from_revision=rollout.from_revision,
                to_revision=rollout.to_revision,
                phase=rollout.phase,
                paused=rollout.paused,
                reason=rollout.reason,
                began_at_s=rollout.began_at_s,
                phase_at_s=rollout.phase_at_s,
                failures=rollout.failures,
                canary_perc=rollout.canary_perc,
                progress_at_s=rollout.progress_at_s,
            )
        )
    return message


def _app_from_pb(app: pb.App) -> App:
    scale = scale_from_pb(app.scale) if app.HasField("scale") else None
    rollout = _rollout_from_pb(app.rollout) if app.HasField("rollout") else None
    return App(app.id, app.revision, scale, app.generation, app.deleting, app.created_at_s, rollout)


def _rollout_from_pb(rollout: pb.Rollout) -> Rollout:
    return Rollout(
        rollout.from_revision,
        rollout.to_revision,
        rollout.phase,
        rollout.paused,
        rollout.reason,
        rollout.began_at_s,
        rollout.phase_at_s,
        rollout.failures,
        rollout.canary_perc,
        rollout.progress_at_s,
    )


def revision_to_pb(revision: Revision) -> pb.Revision:
    """A revision for the wire."""
    return pb.Revision(
        app=revision.app,
        number=revision.number,
        spec=spec_to_pb(revision.spec),
        digest=revision.digest,
        created_at_s=revision.created_at_s,
        created_by=revision.created_by,
    )


def _revision_from_pb(revision: pb.Revision) -> Revision:
    return Revision(
        revision.app,
        revision.number,
        spec_from_pb(revision.spec),
        revision.digest,
        revision.created_at_s,
        revision.created_by,
    )


def runner_to_pb(runner: Runner) -> pb.Runner:
    """A runner for the wire."""
    assignment = runner.assignment
    return pb.Runner(
        id=runner.id,
        share_group=runner.share_group,
        node=runner.node,
        gpus=runner.gpus,
        assignment=pb.AssignmentRef(
            id=assignment.id, term=assignment.term, inventory_generation=assignment.inventory_generation
        )
        if assignment is not None
        else None,
        residencies=[residency_to_pb(one) for one in runner.residencies],
        bindings=[pb.Binding(app=one.app, revision=one.revision, residency=one.residency) for one in runner.bindings],
        created_at_s=runner.created_at_s,
        goal=pb.Goal.ValueType(runner.goal),
        goal_reason=runner.goal_reason,
        memory_bytes=runner.memory_bytes,
        cpu_milli=runner.cpu_milli,
        gpu_milli=runner.gpu_milli,
        priority=runner.priority,
    )


def residency_to_pb(one: Residency) -> pb.Residency:
    """A model in a runner for the wire."""
    return pb.Residency(id=one.id, model=one.model, manifest_digest=one.manifest_digest, base=one.base)


def _runner_from_pb(runner: pb.Runner) -> Runner:
    if not runner.bindings:
        raise ValueError("a runner without a binding")
    return Runner(
        id=runner.id,
        share_group=runner.share_group,
        bindings=tuple(Binding(one.app, one.revision, one.residency) for one in runner.bindings),
        created_at_s=runner.created_at_s,
        node=runner.node,
        gpus=tuple(runner.gpus),
        assignment=AssignmentRef(runner.assignment.id, runner.assignment.term, runner.assignment.inventory_generation)
        if runner.HasField("assignment")
        else None,
        residencies=tuple(Residency(one.id, one.model, one.manifest_digest, one.base) for one in runner.residencies),
        goal=Goal(runner.goal),
        goal_reason=runner.goal_reason,
        memory_bytes=runner.memory_bytes,
        cpu_milli=runner.cpu_milli,
        gpu_milli=runner.gpu_milli,
        priority=runner.priority,
    )


_DECODE: Final[dict[str, Callable[[pb.Record], Record]]] = {
    "meta": lambda message: _meta_from_pb(message.meta),
    "pool": lambda message: pool_from_pb(message.pool),
    "node": lambda message: node_from_pb(message.node),
    "token": lambda message: _token_from_pb(message.token),
    "revocation": lambda message: _revocation_from_pb(message.revocation),
    "app": lambda message: _app_from_pb(message.app),
    "revision": lambda message: _revision_from_pb(message.revision),
    "model": lambda message: model_from_pb(message.model),
    "wish": lambda message: wish_from_pb(message.wish),
    "cache_entry": lambda message: cache_entry_from_pb(message.cache_entry),
    "runner": lambda message: _runner_from_pb(message.runner),
    "quota": lambda message: quota_from_pb(message.quota),
    "usage": lambda message: usage_from_pb(message.usage),
    "usage_day": lambda message: usage_day_from_pb(message.usage_day),
    "secret": lambda message: _secret_from_pb(message.secret),
    "learnt": lambda message: _learnt_from_pb(message.learnt),
}
