"""Build tasks of the compile cache, from the wish for an entry to the entry, or to why there is none.

Pure. A build task is an app of the scheduler's own team with one revision and one runner, made in one commit, so its
records are what lets one build a key run, also under the next leader. It runs once: whatever ends it ends the task
(`ended`, `end_of_task`), and a task never comes back by itself; only one that packs an image (`core.packs`) gets
another runner where its node failed it. Only output of such a runner becomes an entry, and an entry never changes.
Failures are leader-local and bounded; namespaces are bounded, the oldest entries go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fal_contract.errors import Code, FalError, not_found
from fal_contract.ids import SYSTEM_TEAM
from fal_contract.limits import (
    BUILD_WAIT_MAX_S,
    BUILDS_MAX,
    CACHE_NAMESPACE_BYTES_MAX,
    CACHE_NAMESPACE_ENTRIES_MAX,
    IMAGE_PACK_TRIES_MAX,
)
from fal_scheduler.core.build_events import (
    BuildCache,
    BuildCommand,
    BuildEnded,
    EvictCacheEntry,
    FailBuild,
    PutCacheEntry,
    TrimCache,
)
from fal_scheduler.core.events import Reply
from fal_scheduler.core.records import App, Binding, BuildTask, CacheEntry, Goal, Revision, Runner, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.told import BuildFailure, RunnerStatus
from fal_scheduler.core.work import Work

FAILURES_KEPT_MAX = 256
_SAID = "error: "
_EVICTED_AT_ONCE_MAX = 16  # each is an entry, its model and perhaps wishes


def command(work: Work, event: BuildCommand) -> Reply:
    """Do one of this module's commands."""
    match event:
        case BuildCache():
            return _build(work, event)
        case PutCacheEntry():
            return _put(work, event)
        case FailBuild():
            return _fail_build(work, event)
        case TrimCache():
            return _trim(work, event)
        case EvictCacheEntry():
            return _evict_one(work, event)


# --- tasks ------------------------------------------------------------------------------------------------------------


def _build(work: Work, event: BuildCache) -> Reply:
    state, task = work.state, event.spec.build
    assert task is not None, "the API makes it"
    entry = state.catalog.cache_entries.get((task.namespace, task.key))
    if entry is not None:
        return Reply("unchanged", entry.model)
    running = runner_of_build(state, task.namespace, task.key)
    if running is not None:
        return Reply("building", running.id)
    if sum(1 for _ in builds(state)) >= BUILDS_MAX:
        raise FalError(Code.BUSY, f"{BUILDS_MAX} builds run already", remedy="Try again when some have ended.")
    runner = begin(work, event.spec, "build", event.actor)
    work.log("CACHE_BUILDING", task.key, f"{runner.id} builds it for namespace {task.namespace}", runner=runner.id)
    return Reply("created", runner.id)


def begin(work: Work, spec: Spec, word: str, actor: str) -> Runner:
    """Make a task's app, revision and runner. `spec.build` must be set; `word` begins the app's name."""
    task = spec.build
    assert task is not None
    app_id = f"{SYSTEM_TEAM}/{word}-{task.key[:12]}-{work.ids.suffix()}"
    work.put(Revision(app_id, 1, spec, task.key, work.moment.wall_s, actor), None)
    work.put(App(app_id, 1, created_at_s=work.moment.wall_s), None)
    work.state.build_failures.pop(slot_of(task), None)
    return _new_runner(work, app_id)


def _new_runner(work: Work, app_id: str) -> Runner:
    runner = Runner(f"{app_id}-{work.ids.suffix()}", app_id, (Binding(app_id, 1),), work.moment.wall_s)
    work.put(runner, None)
    return runner


def slot_of(task: BuildTask) -> tuple[str, str]:
    """What one task at a time makes: (namespace, key) of an entry, ("image", its id) of an image."""
    return (task.namespace, task.image or task.key)


def builds(state: State) -> Iterator[tuple[App, BuildTask]]:
    """Build tasks that are not over."""
    for app_id, task in state.catalog.builds.items():
        app = state.apps.get(app_id)
        if app is not None and not app.deleting:
            yield app, task


def runner_of_build(state: State, namespace: str, key: str) -> Runner | None:
    """The runner that builds this entry now."""
    for app, task in builds(state):
        if (task.namespace, task.key) == (namespace, key):
            return runner_of(state, app)
    return None


def runner_of(state: State, app: App) -> Runner | None:
    """A task's runner: the one that is to run, where an earlier one on a lost node is yet to end."""
    found = [state.runners[id_] for id_ in state.runners_by_app.get(app.id, ())]
    return max(found, key=lambda runner: (runner.goal is Goal.RUN, runner.created_at_s), default=None)


def ended(work: Work, runner: Runner, status: RunnerStatus) -> bool:
    """A runner's container is gone. True: it was a build task's, and what follows from it was done here."""
    state = work.state
    task, app = state.catalog.builds.get(runner.app), state.apps.get(runner.app)
    if task is None or app is None or app.deleting:
        return False
    if runner.goal is Goal.RUN and status.output and status.exit_code == 0:
        work.emit(BuildEnded(runner.id))  # told again with every Hello until the answer is durable
        return True
    if runner is not runner_of(state, app):  # another has taken its place
        work.drop(runner)
        return True
    if runner.goal is not Goal.RUN:
        why = runner.goal_reason or "it was stopped"
    else:
        why = status.reason or (f"exit code {status.exit_code}" if status.exit_code is not None else "it ended")
        if task.image and status.log_tail and status.log_tail[-1].startswith(_SAID):  # the packer's last words
            why = status.log_tail[-1].removeprefix(_SAID)
        if status.exit_code is None and _again(work, app, task, f"{runner.node}: {why}"):
            work.drop(runner)
            return True
    work.drop(runner)
    _failed(work, app, task, why, runner.id, status.log_tail)
    return True


def end_of_task(work: Work, app: App, task: BuildTask) -> bool:
    """Whether a task is over for a reason that nobody told: its runner is gone, its node lost, or no node came."""
    state = work.state
    runner = runner_of(state, app)
    if runner is None:
        why = "its runner is gone"
        if _again(work, app, task, why):
            return False
    elif runner.id in state.abandoned:
        why = f"its node {runner.node} is lost"
        if runner.goal is Goal.RUN and _again(work, app, task, why):
            work.put(replace(runner, goal=Goal.STOP, goal_reason=f"{why}; another packs the image"), runner)
            return False
    elif not runner.node and work.moment.wall_s - runner.created_at_s > BUILD_WAIT_MAX_S:
        pending = state.pending.get((app.id, app.revision))
        why = f"no node took it in {BUILD_WAIT_MAX_S:g} s: {pending.reason if pending is not None else 'none is ready'}"
    else:
        return False
    _failed(work, app, task, why, runner.id if runner is not None else "", ())
    return True


def _again(work: Work, app: App, task: BuildTask, why: str) -> bool:
    """Let another runner pack an image whose node failed it; False where that was tried often enough.

    An app's generation counts the tries: it is stored, so the next leader knows.
    """
    if not task.image or app.generation >= IMAGE_PACK_TRIES_MAX:
        return False
    work.put(replace(app, generation=app.generation + 1), app)
    runner = _new_runner(work, app.id)
    text = f"{why}; try {app.generation + 1} of {IMAGE_PACK_TRIES_MAX}"
    work.log("IMAGE_PACKED_AGAIN", task.image, text, runner=runner.id)
    return True


def tick(work: Work) -> None:
    """Tasks without a node are looked at again when they have waited too long."""
    for app, _ in builds(work.state):
        if app.id in work.state.waiting:
            work.state.dirty[app.id] = None


def _fail_build(work: Work, event: FailBuild) -> Reply:
    runner, app, task = task_of(work.state, event.runner)
    _failed(work, app, task, event.reason, runner.id, (), kind="CACHE_REFUSED" if event.refused else "")
    return Reply("done", runner.id)


def task_of(state: State, runner_id: str) -> tuple[Runner, App, BuildTask]:
    """A task that is not over, by its runner. Raises FAILED_PRECONDITION."""
    runner = state.runners.get(runner_id)
    app = state.apps.get(runner.app) if runner is not None else None
    task = state.catalog.builds.get(runner.app) if runner is not None else None
    if runner is None or app is None or task is None or app.deleting:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"{runner_id!r} is no build task that this scheduler runs",
            remedy="Build the entry with `falctl cache build`, add the image with `falctl image add`.",
            field="runner",
        )
    return runner, app, task


def _failed(
    work: Work, app: App, task: BuildTask, why: str, runner_id: str, lines: tuple[str, ...], *, kind: str = ""
) -> None:
    failures = work.state.build_failures
    failures.pop(slot_of(task), None)
    failures[slot_of(task)] = BuildFailure(why, runner_id, lines)
    while len(failures) > FAILURES_KEPT_MAX:
        del failures[next(iter(failures))]
    finish(work, app)
    if task.image:
        work.log("IMAGE_FAILED", task.image, f"from {task.source}: {why}", runner=runner_id)
    else:
        work.log(kind or "CACHE_BUILD_FAILED", task.key, f"for namespace {task.namespace}: {why}", runner=runner_id)


def finish(work: Work, app: App) -> None:
    """The task is over: `reconcile` stops its runner, then forgets it. It was asked for, so nothing holds it back."""
    work.put(replace(app, deleting=True, generation=app.generation + 1), app)
    work.state.dirty[app.id] = None
    work.state.asked[app.id] = None


# --- entries ----------------------------------------------------------------------------------------------------------


def _put(work: Work, event: PutCacheEntry) -> Reply:
    state, entry = work.state, event.entry
    runner, app, task = task_of(state, event.runner)
    if (entry.namespace, entry.key, entry.task) != (task.namespace, task.key, runner.id):
        raise FalError(Code.FAILED_PRECONDITION, f"{runner.id} does not build {entry.key[:12]}", remedy="Report this.")
    have = state.catalog.cache_entries.get((entry.namespace, entry.key))
    if have is not None and have.manifest_digest != entry.manifest_digest:
        raise FalError(
            Code.CONFLICT,
            f"entry {entry.key[:12]} of {entry.namespace} exists with other content",
            remedy="Entries never change; evict it first where it is wrong.",
            field="key",
        )
    if have is None:
        count, size = _size(state, entry.namespace)
        if size + entry.bytes > CACHE_NAMESPACE_BYTES_MAX or count >= CACHE_NAMESPACE_ENTRIES_MAX:
            raise FalError(Code.NO_CAPACITY, f"namespace {entry.namespace} is full", remedy="Evict what is not needed.")
        work.put(replace(event.model, created_at_s=work.moment.wall_s), state.models.get(event.model.id))
        work.put(replace(entry, created_at_s=work.moment.wall_s), None)
        text = f"{entry.bytes} bytes for namespace {entry.namespace}, built by {runner.id}"
        work.log("CACHE_BUILT", entry.key, text, node=runner.node, manifest=entry.manifest_digest)
    finish(work, app)
    return Reply("created" if have is None else "unchanged", event.model.id)


def _size(state: State, namespace: str) -> tuple[int, int]:
    sizes = [one.bytes for one in state.catalog.cache_entries.values() if one.namespace == namespace]
    return len(sizes), sum(sizes)


def _trim(work: Work, event: TrimCache) -> Reply:
    state = work.state
    if event.bytes > CACHE_NAMESPACE_BYTES_MAX:
        raise FalError(
            Code.NO_CAPACITY,
            f"{event.bytes} bytes are more than namespace {event.namespace} may have ({CACHE_NAMESPACE_BYTES_MAX})",
            remedy="Leave less in the output folder.",
        )
    named = {key for app in state.apps.values() for key in state.revision_of(app).spec.compile_caches}
    entries = [one for one in state.catalog.cache_entries.values() if one.namespace == event.namespace]
    entries.sort(key=lambda one: (one.key in named, one.created_at_s, one.key))
    count, size = _size(state, event.namespace)
    gone = 0
    for entry in entries:
        if size + event.bytes <= CACHE_NAMESPACE_BYTES_MAX and count < CACHE_NAMESPACE_ENTRIES_MAX:
            break
        if gone >= _EVICTED_AT_ONCE_MAX or work.full:
            return Reply("more", event.namespace)
        _evict(work, entry, "to make room in its namespace")
        count, size, gone = count - 1, size - entry.bytes, gone + 1
    return Reply("done", event.namespace)


def _evict_one(work: Work, event: EvictCacheEntry) -> Reply:
    entry = work.state.catalog.cache_entries.get((event.namespace, event.key))
    if entry is None:
        raise not_found("cache entry", f"{event.namespace}/{event.key}", remedy="List them with `falctl cache list`.")
    _evict(work, entry, "by an operator")
    return Reply("done", entry.key)


def _evict(work: Work, entry: CacheEntry, why: str) -> None:
    """Forget an entry and the model that stands for its files; nodes drop the files when they need the room."""
    work.drop(entry)
    for wish in work.state.catalog.wishes_of(entry.model):
        if not work.full:
            work.drop(wish)
    model = work.state.models.get(entry.model)
    if model is not None:
        work.drop(model)
    work.log("CACHE_EVICTED", entry.key, f"{entry.bytes} bytes of namespace {entry.namespace}: {why}")


__all__ = [
    "begin",
    "builds",
    "command",
    "end_of_task",
    "ended",
    "finish",
    "runner_of",
    "runner_of_build",
    "slot_of",
    "task_of",
    "tick",
]
