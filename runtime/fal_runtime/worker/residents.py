"""The models that a worker has loaded, and how its agent changes them while it serves: `/load` and `/unload`.

    POST /load    {"model": "team/a", "path": DIR}   another model
    POST /load    {"model": "team/a", "lora": {"name": "neon", "path": DIR}}   a LoRA into a model
    POST /unload  {"model": "team/a"}   or   {"model": "team/a", "lora": {"name": "neon"}}

Both answer 200 with what is resident, and say the same when there is nothing to do. They need the header
`x-fal-control`, which the node's proxy takes out of whatever comes from outside. Which model goes to make room is the
scheduler's decision, never ours.

Invariants: a change is made in the engine's one thread, after the requests admitted before it, so never during a
request; one change at a time, a second is told BUSY; a load that fails leaves the others as they were.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import MODEL_LOAD_TIMEOUT_S, RESIDENTS_MAX
from fal_runtime.worker.engine import Engine
from fal_runtime.worker.lane import Lane
from fal_runtime.worker.log import log
from fal_runtime.worker.request import ModelInfo

CONTROL_HEADER: Final = "x-fal-control"
MODEL_HEADER: Final = "x-fal-model"


@dataclass(frozen=True, slots=True)
class Change:
    """What is asked for. `lora`: its name, empty for the model itself; `path`: None in an unload."""

    model: str
    lora: str = ""
    path: Path | None = None


class NotResident(FalError):
    """The model that a request names is not loaded here. `expected`: its gateway was told that it is."""

    def __init__(self, model: str, resident: list[str], *, expected: bool) -> None:
        super().__init__(
            Code.CONFLICT,
            f"model {model!r} is not loaded here; loaded: {', '.join(resident) or 'none'}",
            remedy="Ask for one that is, or try again.",
            field="model",
        )
        self.expected = expected


class Residents:
    """Loaded models by name; the first was there at the start, its name may be empty."""

    def __init__(self, engine: Engine, lane: Lane, first: str, info: ModelInfo) -> None:
        self._engine = engine
        self._lane = lane
        self._models: dict[str, ModelInfo] = {first: info}
        self._changing = ""
        self._job: asyncio.Task[None] | None = None

    def told(self) -> list[dict[str, object]]:
        """As `/readyz` and `/load` say it."""
        return [{"model": name, "loras": list(one.loras), "bytes": one.bytes} for name, one in self._models.items()]

    def find(self, header: str | None, body: bytes) -> tuple[str, ModelInfo]:
        """The model that a request means: by its header, its field `model`, or the only one. Raises NotResident."""
        named = _named(body) if b'"model"' in body else None
        if header is not None and named is not None and named != header:
            raise invalid("model", named, "is not the app's", remedy="Leave it out.")
        name = header if header is not None else named
        if name is None:
            name = next(iter(self._models), "") if len(self._models) == 1 or "" in self._models else None
        if name is None or name not in self._models:
            raise NotResident(name or "", [one for one in self._models if one], expected=header is not None)
        return name, self._models[name]

    async def load(self, body: bytes) -> dict[str, object]:
        """Make a model or LoRA resident. Raises INVALID, NOT_FOUND, BUSY, TIMEOUT, OUT_OF_MEMORY, RUNNER_FAILED."""
        change = _change(body, path_needed=True)
        have = self._models.get(change.model)
        if have is not None and (not change.lora or change.lora in have.loras):
            return self._answer(0.0)
        if change.lora and have is None:
            raise NotResident(change.model, list(self._models), expected=False)
        if have is None and len(self._models) >= RESIDENTS_MAX:
            raise FalError(Code.NO_CAPACITY, f"{RESIDENTS_MAX} models are loaded", remedy="Unload one first.")
        return await self._one(change)

    async def unload(self, body: bytes) -> dict[str, object]:
        """Let go of one; what was admitted for it before is still answered."""
        change = _change(body, path_needed=False)
        have = self._models.get(change.model)
        if have is None or (change.lora and change.lora not in have.loras):
            return self._answer(0.0)
        return await self._one(change)

    async def _one(self, change: Change) -> dict[str, object]:
        if self._changing:
            raise FalError(Code.BUSY, f"{self._changing} is being changed", remedy="Try again.")
        began_s = time.monotonic()
        self._changing = change.lora or change.model
        # Its own task: a caller that goes away leaves no half-loaded model behind, and the bound stays ours.
        self._job = asyncio.create_task(self._make(change), name=f"change {self._changing}")
        self._job.add_done_callback(lambda job: job.cancelled() or job.exception())  # its caller may have gone
        try:
            async with asyncio.timeout(MODEL_LOAD_TIMEOUT_S):
                await asyncio.shield(self._job)
        except TimeoutError:
            what = f"{change.lora or change.model} was not there after {MODEL_LOAD_TIMEOUT_S:g} s"
            raise FalError(Code.TIMEOUT, what, remedy="Look at the runner's log.") from None
        return self._answer(time.monotonic() - began_s)

    async def _make(self, change: Change) -> None:
        began_s = time.monotonic()
        verb = "load" if change.path is not None else "unload"
        gone = self._models.pop(change.model, None) if verb == "unload" and not change.lora else None
        try:
            info = await self._lane.call(lambda: self._apply(change))
        except Exception as error:
            if gone is not None:
                self._models[change.model] = gone
            why = " ".join(str(error).split())[:400]
            log(verb, model=change.model, lora=change.lora, failed=why)
            if isinstance(error, FalError):
                raise
            what = f"cannot {verb} {change.lora or change.model}: {why}"
            raise FalError(Code.RUNNER_FAILED, what, remedy="Check its files and their versions.") from error
        finally:
            self._changing = ""
        if info is not None:
            self._models[change.model] = info
        log(verb, model=change.model, lora=change.lora, seconds=round(time.monotonic() - began_s, 3))

    def _apply(self, change: Change) -> ModelInfo | None:
        """In the engine's thread. None: the model is gone."""
        if not change.lora:
            if change.path is None:
                self._engine.remove_model(change.model)
                return None
            return self._engine.add_model(change.model, change.path)
        if change.path is None:
            self._engine.remove_lora(change.model, change.lora)
            have = self._models[change.model]
            return replace(have, loras=tuple(one for one in have.loras if one != change.lora))
        return self._engine.add_lora(change.model, change.lora, change.path)

    def _answer(self, seconds: float) -> dict[str, object]:
        return {"resident": self.told(), "seconds": round(seconds, 4)}


def _named(body: bytes) -> str | None:
    """The field `model` of a request; None where there is none, or nothing that its own check would not refuse."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = given.get("model") if isinstance(given, dict) else None
    return name if isinstance(name, str) else None


def _change(body: bytes, *, path_needed: bool) -> Change:
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, Mapping):
        raise invalid("body", body[:60].decode("utf-8", "replace"), "is not a JSON object", remedy="Send {…}.")
    lora = given.get("lora")
    if lora is not None and not isinstance(lora, Mapping):
        raise invalid("lora", lora, "is not an object", remedy='Send {"name": "…", "path": "…"}.')
    path = (lora if lora is not None else given).get("path")
    change = Change(_text("model", given.get("model")), _text("lora.name", lora.get("name")) if lora else "")
    return replace(change, path=Path(_text("path", path))) if path_needed else change


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 4096:
        raise invalid(field, str(value)[:80], "is no name", remedy="Give a text.")
    return value
