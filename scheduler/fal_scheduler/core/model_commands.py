"""What operators and the registrar command about models and wishes, as changes. Like `core.commands`.

Pure. A model is REGISTERED, then ATTESTED or REFUSED, and REVOKED from any of these; only a refused one is registered
anew. Runners of a withdrawn model are stopped by `reconcile`, which this module points at the apps concerned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isfinite

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.limits import NODES_MAX, WISH_TTL_MAX_S, WISHES_PER_MODEL_MAX
from fal_scheduler.core.events import Reply
from fal_scheduler.core.model_events import (
    AddModel,
    AttestModel,
    CollectModels,
    IdentifyModel,
    RefuseModel,
    RevokeModel,
    StageModel,
    UnstageModel,
)
from fal_scheduler.core.records import HOST_IMAGE, Goal, Model, ModelState, Spec, Wish
from fal_scheduler.core.state import State
from fal_scheduler.core.work import CHANGES_PER_STEP_MAX, Work

TIERS = ("disk", "memory")
RUNNERS_NAMED_MAX = 5
REASON_CHARS_MAX = 256


def add_model(work: Work, event: AddModel) -> Reply:
    """Register a model, or register a refused one anew."""
    model, have = event.model, work.state.models.get(event.model.id)
    withdrawn = work.state.catalog.withdrawn_because(model.artifact_id) if model.artifact_id else ""
    if have is not None and have.state is ModelState.REVOKED:
        raise _revoked(have.id, have.reason)
    if withdrawn:
        raise _revoked(work.state.models_by_artifact[model.artifact_id][-1], withdrawn)
    unfinished = have is not None and _unfinished_push(work, have, model)
    if have is not None and have.state is not ModelState.REFUSED and not unfinished:
        if not _same(have, model):
            raise FalError(
                Code.ALREADY_EXISTS,
                f"model {model.id!r} exists with other content (from {have.resolved_uri or have.uri})",
                remedy="Use another name; a model's content never changes.",
                field="id",
            )
        return Reply("unchanged", model.id)
    work.put(replace(model, created_at_s=work.moment.wall_s), have)
    _model_settled(work, model.id)
    what = ", in the place of an upload that was not finished" if unfinished else ""
    work.log("MODEL_ADDED", model.id, f"registered from {model.resolved_uri or model.uri}{what}")
    return Reply("created", model.id)


def _unfinished_push(work: Work, have: Model, model: Model) -> bool:
    """Whether an upload takes the place of one that never ended: nobody else can finish it."""
    if have.state is not ModelState.REGISTERED or not (have.uri.startswith("push:") and model.uri == have.uri):
        return False
    return have.artifact_id != model.artifact_id and not _runners_of(work.state, have.id)


def _same(have: Model, model: Model) -> bool:
    """Whether a second registration means what the first did."""
    if (have.kind, have.uri, have.revision) != (model.kind, model.uri, model.revision):
        return False
    if have.manifest_digest and model.manifest_digest:
        return have.manifest_digest == model.manifest_digest
    if have.state is ModelState.ATTESTED and have.attestation == "read":
        return True  # a folder: the registrar has compared the digests
    return not (have.artifact_id and model.artifact_id) or have.artifact_id == model.artifact_id


def _revoked(id_: str, reason: str) -> FalError:
    return FalError(
        Code.FAILED_PRECONDITION,
        f"model {id_!r} was withdrawn: {reason}",
        remedy="Register other files under another name; what was withdrawn never comes back.",
        field="id",
    )


def attest_model(work: Work, event: AttestModel) -> Reply:
    """Freeze a model's digests."""
    model = _model(work.state, event.id)
    if model.state is ModelState.ATTESTED and model.manifest_digest == event.manifest_digest:
        return Reply("unchanged", model.id)
    if model.state is not ModelState.REGISTERED:
        raise FalError(
            Code.FAILED_PRECONDITION, f"model {model.id!r} is {model.state.name}", remedy="Register it anew."
        )
    after = replace(
        model,
        state=ModelState.ATTESTED,
        manifest_digest=event.manifest_digest,
        bytes=event.bytes,
        files=event.files,
        attestation=event.attestation,
        attested_by=event.attested_by,
    )
    work.put(after, model)
    _model_settled(work, model.id)
    work.log("MODEL_ATTESTED", model.id, f"manifest {event.manifest_digest}", by=event.attested_by)
    return Reply("changed", model.id)


def refuse_model(work: Work, event: RefuseModel) -> Reply:
    """A model's content was not what it was said to be. What is attested stays: nobody reads anything else."""
    model = _model(work.state, event.id)
    if model.state is ModelState.REFUSED:
        return Reply("unchanged", model.id)
    if model.state is not ModelState.REGISTERED:
        raise FalError(
            Code.FAILED_PRECONDITION, f"model {model.id!r} is {model.state.name}", remedy="Nothing needs to be done."
        )
    work.put(replace(model, state=ModelState.REFUSED, reason=event.reason), model)
    opened = _runners_of(work.state, model.id, provisional=True)
    _withdrawn(work, model.id)
    work.log("MODEL_REFUSED", model.id, event.reason)
    if opened:
        more = f" and {len(opened) - RUNNERS_NAMED_MAX} more" if len(opened) > RUNNERS_NAMED_MAX else ""
        named = ", ".join(opened[:RUNNERS_NAMED_MAX]) + more
        work.log("ATTESTATION_FAILED", model.id, f"{event.reason}; stopped, as they may have read it: {named}")
    else:
        work.log("ATTESTATION_FAILED", model.id, f"{event.reason}; no runner could read it")
    return Reply("changed", model.id)


def identify_model(work: Work, event: IdentifyModel) -> Reply:
    """Complete a record of the first release."""
    model = _model(work.state, event.id)
    if model.artifact_id:
        return Reply("unchanged", model.id)
    attested = model.state is ModelState.ATTESTED
    after = replace(
        model,
        artifact_id=event.artifact_id,
        resolved_uri=event.resolved_uri,
        attestation="read" if attested else "",
        attested_by="scheduler" if attested else "",
    )
    work.put(after, model)
    return Reply("changed", model.id)


def revoke_model(work: Work, event: RevokeModel) -> Reply:
    """Withdraw a model for good. Its wishes end; `reconcile` stops its runners."""
    model = _model(work.state, event.id)
    if model.state is ModelState.REVOKED:
        return Reply("unchanged", model.id)
    if len(event.reason) > REASON_CHARS_MAX or not event.reason.isprintable():
        raise invalid("reason", event.reason[:80], "is no text of one line", remedy=f"At most {REASON_CHARS_MAX}.")
    reason = event.reason or f"by {event.actor or 'an operator'}"
    work.put(replace(model, state=ModelState.REVOKED, reason=reason), model)
    for wish in work.state.catalog.wishes_of(model.id):
        if not work.full:  # what is left ends with `weights gc`; nobody stages a revoked model
            work.drop(wish)
    runners = len(_runners_of(work.state, model.id))
    _withdrawn(work, model.id)
    work.log("MODEL_REVOKED", model.id, f"{reason}; {runners} runners are stopped")
    return Reply("changed", model.id, lines=(f"{runners} runners",))


def stage_model(work: Work, event: StageModel) -> Reply:
    """Make or change a wish. Raises INVALID, NOT_FOUND or FAILED_PRECONDITION, naming the field."""
    state, wish = work.state, event.wish
    model = _model(state, wish.model)
    if model.withdrawn:
        word = "refused" if model.state is ModelState.REFUSED else "withdrawn"
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"model {model.id!r} was {word}: {model.reason}",
            remedy="Register the right content, then stage that.",
            field="id",
        )
    target = _target(state, wish)
    have = state.wishes.get(model.id, {}).get(target)
    if have is None and len(state.wishes.get(model.id, {})) >= WISHES_PER_MODEL_MAX:
        raise FalError(
            Code.BUSY,
            f"model {model.id!r} has {WISHES_PER_MODEL_MAX} wishes",
            remedy="Name a pool instead of its nodes, or take some back with `falctl weights unstage`.",
        )
    after = replace(wish, target=target, created_by=event.actor, created_at_s=work.moment.wall_s)
    work.put(after, have)
    how_long = "until it is taken back" if not after.expires_at_s else "for a while"
    work.log("MODEL_WISHED", model.id, f"{_target_text(after)}, {after.tier}, {how_long}", target=target)
    return Reply("created" if have is None else "changed", model.id)


def _target(state: State, wish: Wish) -> str:
    """The checked target, with a node's id in the place of its name."""
    if wish.tier not in TIERS:
        raise invalid("tier", wish.tier, "is no tier", remedy="Use disk or memory.")
    if wish.target == "replicas":
        if not 1 <= wish.replicas <= NODES_MAX:
            raise invalid("replicas", wish.replicas, "is out of bounds", remedy=f"Use 1 to {NODES_MAX}.")
        return wish.target
    if wish.replicas:
        raise invalid("replicas", wish.replicas, f"is given beside {wish.target!r}", remedy="Give one of both.")
    kind, slash, name = wish.target.partition("/")
    if kind == "pool" and slash:
        if name not in state.pools:
            raise not_found("pool", name, remedy="List pools with `falctl pool list`.")
        return wish.target
    if kind == "node" and slash:
        node = state.find_node(name)
        if node is None or node.revoked:
            raise not_found("node", name, remedy="List nodes with `falctl node list`; use the id where names repeat.")
        return f"node/{node.id}"
    raise invalid("target", wish.target, "names no place", remedy="Use pool/NAME, node/NAME or a number of replicas.")


def _target_text(wish: Wish) -> str:
    return f"{wish.replicas} nodes" if wish.target == "replicas" else wish.target


def check_ttl(ttl_s: float) -> None:
    """Raise INVALID unless a wish may last so long; 0: until it is taken back."""
    if not isfinite(ttl_s) or not 0.0 <= ttl_s <= WISH_TTL_MAX_S:
        raise invalid("ttl_s", ttl_s, "is out of bounds", remedy=f"Use 0 (no end) to {WISH_TTL_MAX_S:.0f} seconds.")


def unstage_model(work: Work, event: UnstageModel) -> Reply:
    """Take wishes back."""
    state = work.state
    model = _model(state, event.id)
    wishes = state.catalog.wishes_of(model.id)
    if event.target:
        target = event.target
        if target.startswith("node/") and (node := state.find_node(target.removeprefix("node/"))) is not None:
            target = f"node/{node.id}"
        wishes = [wish for wish in wishes if wish.target == target]
        if not wishes:
            raise FalError(
                Code.NOT_FOUND,
                f"nobody wished {model.id!r} to {event.target!r}",
                remedy="`falctl weights show` lists its wishes.",
                field="target",
            )
    for wish in wishes:
        if work.full:
            break
        work.drop(wish)
        work.log("MODEL_WISH_ENDED", model.id, f"{_target_text(wish)}: taken back", target=wish.target)
    return Reply("done", model.id, lines=tuple(wish.target for wish in wishes))


def in_use(state: State) -> set[str]:
    """Models that an app's current revision names, or one that a runner serves."""
    found: set[str] = set()
    for app in state.apps.values():
        found.update(state.revision_of(app).spec.artifacts)
    for served in {(one.app, one.revision) for runner in state.runners.values() for one in runner.bindings}:
        revision = state.revisions.get(served)
        if revision is not None:
            found.update(revision.spec.artifacts)
    return found


def collect_models(work: Work, event: CollectModels) -> Reply:
    """Forget withdrawn models that are not in use; what does not fit in one step is for the next call.

    `Reply.lines`: ids of models that went.
    """
    gone: list[str] = []
    used = in_use(work.state)
    for wish in [wish for wish in work.state.catalog.all_wishes() if wish.ended(work.moment.wall_s)]:
        if not work.full:
            work.drop(wish)
            work.log("MODEL_WISH_ENDED", wish.model, f"{_target_text(wish)}: its time is over", target=wish.target)
    for id_ in event.models[:CHANGES_PER_STEP_MAX]:
        model = work.state.models.get(id_)
        if model is None or work.full or not model.withdrawn or id_ in used:
            continue
        for wish in work.state.catalog.wishes_of(id_):
            if not work.full:
                work.drop(wish)
        if id_ not in work.state.wishes and not work.full:
            work.drop(model)
            work.log("MODEL_FORGOTTEN", id_, f"it was {model.state.name.lower()}, and no app names it")
            gone.append(id_)
    return Reply("done", "", lines=tuple(gone))


def check_models(state: State, spec: Spec) -> None:
    """Whether an app with this spec may be applied: its models are registered and not withdrawn."""
    named = [("model", spec.model)] if spec.model else []
    named += [(f"loras[{at}]", lora) for at, lora in enumerate(spec.loras)]
    for field, name in named:
        model = state.models.get(name)
        if model is None:
            raise FalError(
                Code.NOT_FOUND,
                f"{field} = {name!r} is not registered",
                remedy=f"Register it with `falctl weights add {name.split('/', 1)[-1]} URI`.",
                field=field,
            )
        if model.withdrawn:
            word = "refused" if model.state is ModelState.REFUSED else "withdrawn"
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"{field} = {name!r} was {word}: {model.reason}",
                remedy="Register the right content under another name.",
                field=field,
            )


def check_image(state: State, spec: Spec) -> None:
    """Whether an app with this spec may be applied: its image is known whole, and not withdrawn."""
    if spec.image == HOST_IMAGE:
        return
    name, short = spec.image, spec.image.split("/", 1)[-1]
    image = state.models.get(name)
    if image is None:
        remedy = f"Add it with `falctl image add {short} docker://REGISTRY/REPO:TAG`."
        raise FalError(Code.NOT_FOUND, f"image = {name!r} is not there", remedy=remedy, field="image")
    if image.kind != "image":
        remedy = "Name an image; `falctl image list` tells which there are."
        raise invalid("image", name, f"is a {image.kind}, not an image", remedy=remedy)
    if image.withdrawn:
        word = "refused" if image.state is ModelState.REFUSED else "withdrawn"
        what = f"image = {name!r} was {word}: {image.reason}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Add another image under another name.", field="image")
    if image.state is not ModelState.ATTESTED:
        what = f"image = {name!r} is not whole yet"
        remedy = f"Wait until it is; `falctl image show {short}` tells how far it is."
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=remedy, field="image")


def users(state: State, model_id: str) -> list[str]:
    """Apps whose current revision names it, in order of id."""
    return sorted(app.id for app in state.apps.values() if model_id in state.revision_of(app).spec.artifacts)


def _runners_of(state: State, model_id: str, *, provisional: bool = False) -> list[str]:
    """Runners on nodes that are to run with it, in order of id; with `provisional` those that read what nobody has
    attested."""
    found = []
    for runner in state.runners.values():
        if runner.goal is not Goal.RUN or not runner.node:
            continue
        revisions = (state.revisions.get((one.app, one.revision)) for one in runner.bindings)
        specs = [revision.spec for revision in revisions if revision is not None]
        if any(model_id in spec.artifacts and (spec.allow_provisional or not provisional) for spec in specs):
            found.append(runner.id)
    return sorted(found)


def _withdrawn(work: Work, model_id: str) -> None:
    """`reconcile` looks at every app with a runner or a revision that names it: an operator's word, so at once."""
    state = work.state
    apps: Iterable[str] = {
        *users(state, model_id),
        *(app_id for runner_id in _runners_of(state, model_id) for app_id in state.runners[runner_id].apps),
    }
    for app_id in sorted(apps):
        if app_id in state.apps:
            state.dirty[app_id] = None
            state.asked[app_id] = None
    _model_settled(work, model_id)


def _model_settled(work: Work, model_id: str) -> None:
    """Runners that wait for this model are placed, or told anew why not, at once."""
    state = work.state
    for app_id in state.waiting:
        app = state.apps.get(app_id)
        if app is not None and model_id in state.revision_of(app).spec.artifacts:
            state.pending.pop((app_id, app.revision), None)
            state.dirty[app_id] = None


def _model(state: State, id_: str) -> Model:
    model = state.models.get(id_)
    if model is None:
        raise not_found("model", id_, remedy="List models with `falctl weights list`.")
    return model


__all__ = [
    "TIERS",
    "add_model",
    "attest_model",
    "check_image",
    "check_models",
    "check_ttl",
    "collect_models",
    "identify_model",
    "in_use",
    "refuse_model",
    "revoke_model",
    "stage_model",
    "unstage_model",
    "users",
]
