"""What is remembered of GPUs over a restart of the agent: one small file, replaced whole.

STATE/gpu-health.json: faults, so that a bad GPU is not given out again; and the inventory's generation with each GPU's
last change, so that an assignment that was decided before a restart is judged as one decided after it. It counts from
the next generation on. A file that is not understood is moved aside and told: then all GPUs are judged anew.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fal_agent.core import gpu_health
from fal_agent.core.gpu_health import Health
from fal_agent.ports import OnEvent

FILE: Final = "gpu-health.json"
VERSION: Final = 1
_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Mark:
    """A GPU's state as assignments care about it, and the generation with which that came."""

    print: str
    generation: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file held."""

    health: Mapping[str, Health] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)
    generation: int = 0


State = tuple[Mapping[str, Health], Mapping[str, Mark], int]


class GpuFile:
    """The file; `path` None: nothing is kept. `boot_id`: of this start of the machine."""

    def __init__(self, path: Path | None, *, boot_id: str, on_event: OnEvent) -> None:
        self._path = path
        self._boot_id = boot_id
        self._on_event = on_event
        self._saving = asyncio.Lock()
        self._written: bytes = b""
        self._failed = False

    def load(self, *, now_s: float) -> Kept:
        """What was kept; nothing where there is no file. Blocks for a moment; at the agent's start only."""
        if self._path is None or not self._path.exists():
            return Kept()
        try:
            given = json.loads(self._path.read_bytes()[:_BYTES_MAX])
            if given["version"] > VERSION:
                raise ValueError(f"version {given['version']} is a newer agent's")
            same = given["boot_id"] == self._boot_id
            gpus = given["gpus"].items()
            return Kept(
                {id_: gpu_health.restore(id_, one, now_s=now_s, same_boot=same) for id_, one in gpus},
                {id_: Mark(str(print_), int(at)) for id_, (print_, at) in given["marks"].items()},
                int(given["generation"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            aside = self._path.with_suffix(".damaged")
            self._path.replace(aside)
            self._on_event("GPU_FILE_DAMAGED", str(self._path), f"{exc!r}; kept as {aside}, GPUs are judged anew")
            return Kept()

    async def save(self, state: Callable[[], State]) -> None:
        """Keep what `state` says, and what it says then, until nothing changed meanwhile. Never raises for a disk."""
        if self._path is None:
            return
        async with self._saving:
            while (data := self._encode(state())) != self._written:
                try:
                    await asyncio.to_thread(_replace, self._path, data)
                except OSError as exc:
                    if not self._failed:
                        self._on_event("GPU_FILE_FAILED", str(self._path), f"cannot be written: {exc.strerror}")
                    self._failed = True
                    return
                self._written, self._failed = data, False

    def _encode(self, state: State) -> bytes:
        health, marks, generation = state
        kept: dict[str, Any] = {
            "version": VERSION,
            "boot_id": self._boot_id,
            "generation": generation,
            "gpus": {id_: gpu_health.keep(one) for id_, one in sorted(health.items()) if not _plain(one)},
            "marks": {id_: [mark.print, mark.generation] for id_, mark in sorted(marks.items())},
        }
        return json.dumps(kept).encode()


def _plain(health: Health) -> bool:
    """Whether nothing of it is worth a line."""
    return health.ok and not health.xids and not health.verified_s


def _replace(path: Path, data: bytes) -> None:
    """Durable, then in place."""
    beside = path.with_suffix(".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    beside.replace(path)


__all__ = ["FILE", "GpuFile", "Kept", "Mark"]
