"""Compile caches: entries and the builds that make them, looked up, built, evicted.

Reading costs what is listed. One build runs for a key, whoever asks: a second caller sees the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from fal_contract.cache_key import cache_key, check_key, check_namespace, namespace_of
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    BUILD_TIMEOUT_MAX_S,
    BUILD_TIMEOUT_S,
    CACHE_ENTRY_BYTES_MAX,
    GPUS_PER_RUNNER_MAX,
)
from fal_contract.v1 import cluster_pb2
from fal_scheduler.codec_weights import cache_entry_to_pb
from fal_scheduler.core.build_events import BuildCache, EvictCacheEntry
from fal_scheduler.core.builds import builds, runner_of_build
from fal_scheduler.core.model_commands import check_image
from fal_scheduler.core.packs import NAMESPACE as IMAGES
from fal_scheduler.core.records import HOST_IMAGE, BuildTask, CacheEntry, Resources, Scaling, Spec
from fal_scheduler.leadership import Leadership

COMMAND_WORDS_MAX = 256
COMMAND_BYTES_MAX = 32 << 10
MACHINE_TYPE_CHARS_MAX = 256


async def build_cache(
    leader: Leadership, request: cluster_pb2.BuildCacheRequest, actor: str
) -> cluster_pb2.CacheEntryView:
    """Look an entry up, or begin its build where a command is given. INVALID, NOT_FOUND (no entry and no command)."""
    namespace, key = check_namespace(request.namespace), cache_key(request.facts)
    if request.command:
        await leader.engine.submit(BuildCache(_spec(leader, request, namespace, key), actor))
    view = _view(leader, namespace, key)
    if view is None:
        raise FalError(
            Code.NOT_FOUND,
            f"namespace {namespace} has no entry {key}",
            remedy="Build it with `falctl cache build`.",
            field="facts",
        )
    return view


def _spec(leader: Leadership, request: cluster_pb2.BuildCacheRequest, namespace: str, key: str) -> Spec:
    """A build runs our image, or one of the team that alone reads the entry, without network, model or environment."""
    words = tuple(request.command)
    if len(words) > COMMAND_WORDS_MAX or sum(map(len, words)) > COMMAND_BYTES_MAX or not words[0]:
        raise invalid("command", words[0][:80], "is empty or too long", remedy=f"At most {COMMAND_BYTES_MAX} bytes.")
    image = request.image or HOST_IMAGE
    if image != HOST_IMAGE:
        _check_engine(leader, image, namespace, request.facts)
    if request.num_gpus > GPUS_PER_RUNNER_MAX:
        raise invalid("num_gpus", request.num_gpus, "is out of bounds", remedy=f"Use 0 to {GPUS_PER_RUNNER_MAX}.")
    if len(request.machine_type) > MACHINE_TYPE_CHARS_MAX:
        raise invalid("machine_type", request.machine_type[:80], "is too long", remedy="See `falctl gpu list`.")
    if request.machine_type and not request.num_gpus:
        raise invalid("num_gpus", 0, "goes with no machine_type", remedy="Ask for a GPU, or leave the type out.")
    if request.bytes_max > CACHE_ENTRY_BYTES_MAX:
        raise invalid("bytes_max", request.bytes_max, "is out of bounds", remedy=f"At most {CACHE_ENTRY_BYTES_MAX}.")
    timeout_s = request.timeout_s or BUILD_TIMEOUT_S
    if not isfinite(timeout_s) or not 1.0 <= timeout_s <= BUILD_TIMEOUT_MAX_S:
        remedy = f"Use 1 to {BUILD_TIMEOUT_MAX_S:.0f} seconds."
        raise invalid("timeout_s", timeout_s, "is out of bounds", remedy=remedy)
    return Spec(
        image=image,
        command=words,
        machine_type=(request.machine_type,) if request.machine_type else (),
        num_gpus=request.num_gpus,
        pools=_pools(leader, request),
        resources=_resources(request.num_gpus),
        network="none",
        scaling=Scaling(min_concurrency=1, max_concurrency=1, startup_timeout_s=timeout_s),
        build=BuildTask(namespace, key, request.bytes_max or CACHE_ENTRY_BYTES_MAX, dict(request.facts)),
    )


def _check_engine(leader: Leadership, image: str, namespace: str, facts: Mapping[str, str]) -> None:
    """Whose code makes an entry is who reads it; and the key names the content that made it."""
    if namespace != namespace_of(image.partition("/")[0]):
        remedy = f"Use {HOST_IMAGE}, or build for the namespace of the image's team."
        raise invalid("image", image[:128], f"is no engine image for namespace {namespace}", remedy=remedy)
    check_image(leader.view, Spec(image=image))
    known = leader.view.models[image].image
    if known is None or facts["engine_image"] != known.digest:
        digest = known.digest if known is not None else "unknown"
        remedy = f"Give engine_image = {digest}."
        raise invalid("facts.engine_image", facts["engine_image"][:128], f"is not image {image}", remedy=remedy)


def _pools(leader: Leadership, request: cluster_pb2.BuildCacheRequest) -> tuple[str, ...]:
    for pool in request.pools:
        if pool not in leader.view.pools:
            raise invalid("pools", pool[:80], "is no pool", remedy="List them with `falctl pool list`.")
    return tuple(request.pools)


def _resources(gpus: int) -> Resources:
    """Compilers use several processes for each GPU that they compile for, and memory for each of these."""
    return Resources(
        cpu_milli=max(1000, gpus * 8000), memory_bytes=max(1, 8 * gpus) * (4 << 30), pids_max=4096, shm_bytes=1 << 30
    )


def list_entries(leader: Leadership, request: cluster_pb2.ListCacheEntriesRequest) -> cluster_pb2.ListCacheEntriesReply:
    """Entries, builds and builds that failed, in order of namespace and key."""
    state = leader.view
    if request.namespace:
        check_namespace(request.namespace)
    found = {*state.catalog.cache_entries, *(slot for slot in state.build_failures if slot[0] != IMAGES)}
    found.update((task.namespace, task.key) for _, task in builds(state) if not task.image)
    views = (
        _view(leader, namespace, key)
        for namespace, key in sorted(found)
        if request.namespace in ("", namespace) and key.startswith(request.key)
    )
    return cluster_pb2.ListCacheEntriesReply(entries=[view for view in views if view is not None])


async def evict_entry(
    leader: Leadership, request: cluster_pb2.EvictCacheEntryRequest, actor: str
) -> cluster_pb2.CacheEntryView:
    """Forget an entry; returns what it was. INVALID, NOT_FOUND."""
    namespace, key = check_namespace(request.namespace), check_key(request.key)
    entry = leader.view.catalog.cache_entries.get((namespace, key))
    await leader.engine.submit(EvictCacheEntry(namespace, key, actor))
    assert entry is not None, "the core refuses to evict what is not there"
    return cluster_pb2.CacheEntryView(entry=cache_entry_to_pb(entry), state="evicted", namespace=namespace, key=key)


def _view(leader: Leadership, namespace: str, key: str) -> cluster_pb2.CacheEntryView | None:
    state = leader.view
    entry = state.catalog.cache_entries.get((namespace, key))
    if entry is not None:
        return _ready(leader, entry)
    view = cluster_pb2.CacheEntryView(namespace=namespace, key=key)
    runner = runner_of_build(state, namespace, key)
    failure = state.build_failures.get((namespace, key))
    if runner is not None:
        view.state, view.runner = "building", runner.id
    elif failure is not None:
        view.state, view.reason, view.runner = "failed", failure.reason, failure.runner
        view.log_tail.extend(failure.lines)
    else:
        return None
    return view


def _ready(leader: Leadership, entry: CacheEntry) -> cluster_pb2.CacheEntryView:
    model = leader.view.models.get(entry.model)
    return cluster_pb2.CacheEntryView(
        entry=cache_entry_to_pb(entry),
        state="ready",
        namespace=entry.namespace,
        key=entry.key,
        nodes_ready=leader.models.counts(model.artifact_id)[0] if model is not None else 0,
    )


__all__ = ["build_cache", "evict_entry", "list_entries"]
