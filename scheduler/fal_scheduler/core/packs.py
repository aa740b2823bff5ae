"""Images, from the wish for one to the model that stands for it, or to why there is none; and the end of models.

Pure. An image is packed by a build task (`core.builds`) on one node, which everybody else then gets it from. Packing is
idempotent, so a task whose node is lost goes on with another node, a few times; a task that failed by its own work has
failed. A name's content never changes: it is removed first, which nothing that uses it allows.
"""

from __future__ import annotations

from dataclasses import replace

from fal_contract.errors import Code, FalError, not_found
from fal_contract.ids import team_of
from fal_contract.limits import BUILDS_MAX, IMAGE_FIRST_PIECES_MAX, IMAGE_REPLICAS
from fal_contract.pieces import piece_bytes_of
from fal_scheduler.core import builds
from fal_scheduler.core.events import Reply
from fal_scheduler.core.model_commands import in_use, users
from fal_scheduler.core.pack_events import AccessTold, PackCommand, PackImage, PutImage, RemoveModel
from fal_scheduler.core.records import App, BuildTask, Model, ModelState, Wish
from fal_scheduler.core.secrets import check_secret
from fal_scheduler.core.state import State
from fal_scheduler.core.work import Work

NAMESPACE = "image"  # of every task that packs one
USERS_NAMED_MAX = 3


def command(work: Work, event: PackCommand) -> Reply:
    """Do one of this module's commands."""
    match event:
        case PackImage():
            return _pack(work, event)
        case PutImage():
            return _put(work, event)
        case RemoveModel():
            return _remove(work, event)


def pack_of(state: State, image: str) -> tuple[App, BuildTask] | None:
    """The task that packs an image now."""
    return next(((app, task) for app, task in builds.builds(state) if task.image == image), None)


def _pack(work: Work, event: PackImage) -> Reply:
    state, task = work.state, event.spec.build
    assert task is not None, "the API makes it"
    have = state.models.get(task.image)
    if have is not None:
        _check_same(state, have, task)
        return Reply("unchanged", have.id)
    packing = pack_of(state, task.image)
    if packing is not None:
        app, other = packing
        if (other.source, other.platform) != (task.source, task.platform):
            raise FalError(
                Code.CONFLICT,
                f"image {task.image!r} is being packed from {other.source} ({other.platform})",
                remedy="Wait for that, or end it with `falctl image rm`.",
                field="source",
            )
        runner = builds.runner_of(state, app)
        return Reply("packing", runner.id if runner is not None else "")
    if sum(1 for _ in builds.builds(state)) >= BUILDS_MAX:
        raise FalError(Code.BUSY, f"{BUILDS_MAX} builds run already", remedy="Try again when some have ended.")
    if task.auth_secret:
        check_secret(state, f"{team_of(task.image)}/{task.auth_secret}", field="auth_secret")
    runner = builds.begin(work, event.spec, "pack", event.actor)
    work.log("IMAGE_PACKING", task.image, f"{runner.id} packs it from {task.source}", runner=runner.id)
    return Reply("created", runner.id)


def _check_same(state: State, have: Model, task: BuildTask) -> None:
    """Raise ALREADY_EXISTS unless the image that is there is the one that is asked for."""
    facts = have.image
    if have.withdrawn:
        what = f"image {have.id!r} was {have.state.name.lower()}: {have.reason}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Add another image under another name.", field="id")
    if have.kind == "image" and facts is not None and facts.platform == task.platform:
        pinned = task.source.rpartition("@")[2]
        if facts.source == task.source or facts.digest == pinned:
            return
    apps = users(state, have.id)
    if apps:
        remedy = f"Add it under another name; {_named(apps)} uses this one."
    else:
        remedy = "Add it under another name, or remove this one first: `falctl image rm`."
    source = f"image from {facts.source}" if facts is not None else f"{have.kind} from {have.uri}"
    what = f"{have.id!r} exists with other content (an {source})" if facts is not None else f"{have.id!r} is a {source}"
    raise FalError(Code.ALREADY_EXISTS, what, remedy=remedy, field="id")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - USERS_NAMED_MAX} more" if len(names) > USERS_NAMED_MAX else ""
    return ", ".join(names[:USERS_NAMED_MAX]) + more


def _put(work: Work, event: PutImage) -> Reply:
    state, model = work.state, event.model
    runner, app, task = builds.task_of(state, event.runner)
    if not task.image or task.image != model.id or model.image is None:
        raise FalError(Code.FAILED_PRECONDITION, f"{runner.id} does not pack {model.id}", remedy="Report this.")
    have = state.models.get(model.id)
    if have is not None:  # pushed under the same name meanwhile
        raise FalError(
            Code.ALREADY_EXISTS,
            f"{model.id!r} was registered while it was packed",
            remedy="Use another name.",
            field="id",
        )
    if withdrawn := state.catalog.withdrawn_because(model.artifact_id):
        raise FalError(
            Code.INVALID, f"its content was withdrawn: {withdrawn}", remedy="Add another image.", field="source"
        )
    work.put(replace(model, created_at_s=work.moment.wall_s), None)
    by = state.revision_of(app).created_by
    work.put(Wish(model.id, "replicas", IMAGE_REPLICAS, created_by=by, created_at_s=work.moment.wall_s), None)
    state.build_failures.pop(builds.slot_of(task), None)
    builds.finish(work, app)
    text = f"{model.bytes} bytes from {model.image.source}, {model.image.digest}, packed by {runner.node}"
    work.log("IMAGE_ADDED", model.id, text, node=runner.node, manifest=model.manifest_digest)
    return Reply("created", model.id)


def _remove(work: Work, event: RemoveModel) -> Reply:
    state = work.state
    packing = pack_of(state, event.id)
    failed = state.build_failures.pop((NAMESPACE, event.id), None)
    if packing is not None:
        builds.finish(work, packing[0])
        work.log("IMAGE_CANCELLED", event.id, "the task that packs it is ended")
    model = state.models.get(event.id)
    if model is None:
        if packing is None and failed is None:
            raise not_found("image or model", event.id, remedy="List images with `falctl image list`.")
        return Reply("cancelled" if packing is not None else "removed", event.id)
    _check_unused(state, model)
    for wish in state.catalog.wishes_of(model.id):
        if work.full:
            return Reply("more", model.id)
        work.drop(wish)
    work.drop(model)
    work.log("MODEL_REMOVED", model.id, f"the {model.kind} is forgotten; nodes let its files go")
    return Reply("removed", model.id)


def _check_unused(state: State, model: Model) -> None:
    if model.kind == "cache":
        what = f"{model.id!r} holds an entry of the compile cache"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Use `falctl cache evict`.", field="id")
    if model.state is ModelState.REVOKED:
        what = f"{model.id!r} was withdrawn, which nodes that are off must still hear"
        raise FalError(
            Code.FAILED_PRECONDITION, what, remedy="`falctl weights gc` forgets it when all have.", field="id"
        )
    apps = users(state, model.id)
    if apps:
        what = f"{model.kind} {model.id!r} is used by {_named(apps)}"
        remedy = f"Delete these apps, or apply them with another {model.kind}, first."
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy, field="id")
    if model.id in in_use(state):
        what = f"runners of an older revision still use {model.kind} {model.id!r}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Wait until they have ended.", field="id")


def note_access(work: Work, node_id: str, told: AccessTold) -> None:
    """Keep what a recorded start has read, once for an image, to be fetched first from then on.

    Believed of a node that runs this image now; numbers that cannot be are left out.
    """
    state = work.state
    runner = state.runners.get(told.runner)
    revision = state.revisions.get((runner.app, runner.revision)) if runner is not None else None
    image = state.models.get(revision.spec.image) if revision is not None else None
    if runner is None or runner.node != node_id or image is None or image.artifact_id != told.artifact_id:
        return
    if image.image is None or image.image.first_pieces:
        return
    most = -(-image.bytes // piece_bytes_of(image.kind, image.bytes)) + image.files  # a file's last piece is shorter
    known = dict.fromkeys(piece for piece in told.pieces[:IMAGE_FIRST_PIECES_MAX] if 0 <= piece < most)
    if not known:
        return
    work.put(replace(image, image=replace(image.image, first_pieces=tuple(known))), image)
    work.log("IMAGE_ORDERED", image.id, f"{len(known)} pieces are fetched first, as a start on {node_id} read them")


__all__ = ["NAMESPACE", "command", "note_access", "pack_of"]
