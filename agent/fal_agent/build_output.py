"""The folder that a build task fills: made before its container, measured while it runs, taken in after it, removed.

A task that packs an image makes it there out of layers and unpacked files, so it may hold some times as much meanwhile.

Invariants: it lies below the node's own folders, which nobody else may enter, and only its container has it bound; what
is larger than the task may leave ends the task, as nothing here needs a quota of the file system (so a fast writer is
stopped a moment late, by what it writes within MEASURE_S); what its processes hold open or mapped counts though it has
no name any more; it goes with the runner. Called by fal_agent.runner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fal_agent import packing, strangers
from fal_agent.arrivals import PASSING, processes_of
from fal_agent.launch import container_id, output_folder
from fal_agent.ports import Places, WeightCache
from fal_agent.tools import Tools
from fal_contract.cache_key import entry_model
from fal_contract.errors import FalError
from fal_contract.limits import (
    BUILD_MANIFEST_BYTES_MAX,
    BUILD_OUTPUT_PIN_S,
    IMAGE_PACK_WORK_FACTOR,
    MODEL_FILES_MAX,
    MODEL_PATH_BYTES_MAX,
)
from fal_contract.v1 import agent_pb2, state_pb2

MEASURE_S: Final = 1.0
_REST: Final = 10.0  # times as long as a look took
_MODE: Final = 0o700
_PACKED_MAX: Final = 1 << 24  # entries


def make(places: Places, message: agent_pb2.Assignment) -> None:
    """Make it where the assignment is a build task; again is fine."""
    if message.spec.HasField("build"):
        output_folder(places, message.runner_id).mkdir(parents=True, exist_ok=True, mode=_MODE)


def too_much(places: Places, message: agent_pb2.Assignment, pid: int | None = None) -> str:
    """Why what lies there is more than the task may leave; empty while it is not. `pid`: its first process. Blocks."""
    task, folder = message.spec.build, output_folder(places, message.runner_id)
    most = _PACKED_MAX if task.image else 2 * MODEL_FILES_MAX  # the packer bounds files and depth itself
    found = strangers.measure(folder, entries_max=most, path_chars_max=MODEL_PATH_BYTES_MAX)
    bytes_max = task.bytes_max * (IMAGE_PACK_WORK_FACTOR if task.image else 1)
    nameless, whole = strangers.held_unlinked(processes_of(pid), folder)
    if not whole:
        return "its processes have more files open than can be looked at"
    size = found.bytes + nameless
    if size > bytes_max + found.entries * 4096:  # a small file takes a block more than it has bytes
        return f"its output takes {size} bytes, at most {bytes_max} are allowed"
    if found.entries > most:
        return f"its output has {found.entries} files and folders, at most {MODEL_FILES_MAX} files are allowed"
    if found.too_deep and not task.image:
        return f"its output has folders whose paths are longer than {MODEL_PATH_BYTES_MAX} characters"
    return ""


async def watch(tools: Tools, message: agent_pb2.Assignment, left_s: Callable[[], float]) -> str:
    """Return why the task must end before its time is over, or nothing once it is."""
    pid = None
    while (before_s := left_s()) > 0.0:
        if pid is None:
            with contextlib.suppress(FalError):
                status = await tools.driver.status(container_id(message.runner_id))
                pid = status.pid if status else None
        if why := await asyncio.to_thread(too_much, tools.places, message, pid):
            return why
        took_s = before_s - left_s()  # a million files are not looked at all the time
        await asyncio.sleep(min(max(MEASURE_S, _REST * took_s), left_s()))
    return ""


async def take_in(places: Places, cache: WeightCache, message: agent_pb2.Assignment) -> tuple[bytes, str]:
    """The manifest (serialised) of what the node's cache took in, or why nothing was.

    Raises only what may pass: the cache is away for a moment.
    """
    task, folder = message.spec.build, output_folder(places, message.runner_id)
    try:
        if task.image:
            return (await _take_image(folder, cache, message)).SerializeToString(), ""
        manifest = await cache.ingest(
            folder,
            model=entry_model(task.namespace, task.key),
            bytes_max=task.bytes_max,
            owner=f"build {message.runner_id}",
            keep_s=BUILD_OUTPUT_PIN_S,
        )
    except FalError as exc:
        if exc.code in PASSING:
            raise
        return b"", f"its output was not taken: {exc}"
    raw = manifest.SerializeToString()
    if len(raw) > BUILD_MANIFEST_BYTES_MAX:
        return b"", f"its output has {len(manifest.files)} files, too many to be told of; pack them"
    return raw, ""


async def _take_image(folder: Path, cache: WeightCache, message: agent_pb2.Assignment) -> state_pb2.ModelManifest:
    """The manifest of an image with what the packer says of it, without the digests of its pieces: those of a large one
    have some MiB, and the scheduler asks this node's cache for them."""
    task = message.spec.build
    await asyncio.to_thread(packing.clear_rest, folder)
    facts = await asyncio.to_thread(packing.facts_of, folder)
    manifest = await cache.ingest(
        folder,
        model=task.image,
        bytes_max=task.bytes_max,
        owner=f"build {message.runner_id}",
        keep_s=BUILD_OUTPUT_PIN_S,
        kind="image",
    )
    for file in manifest.files:
        file.ClearField("blake3")
    manifest.image.CopyFrom(facts)
    return manifest


async def remove(places: Places, runner_id: str) -> None:
    """Leave nothing of it; what is not there is fine."""
    await asyncio.to_thread(strangers.remove, output_folder(places, runner_id))


__all__ = ["MEASURE_S", "make", "remove", "take_in", "too_much", "watch"]
