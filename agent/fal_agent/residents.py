"""What a live worker has loaded is brought to what its assignment asks for: staged, shown, loaded; let go, unpinned.

Invariants: nothing is done before the runner serves nor once it is to end; one change at a time; files come first, so
that the worker waits for its disk only. The worker's own word says what is there, so an agent that starts anew needs
no memory of it. A model that does not load is told as failed and tried again only when it was let go and is asked for
anew; it never ends the runner. Made by fal_agent.runner; does nothing for a runner whose assignment names no residency.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from fal_agent import launch, serving
from fal_agent.arrivals import PASSING, Arrivals
from fal_agent.core.assignments import Goal
from fal_agent.core.tasks import Phase, Task
from fal_agent.tools import Tools
from fal_agent.wire import parse
from fal_contract.errors import FalError, not_found
from fal_contract.limits import MODEL_LOAD_TIMEOUT_S, RESIDENT_STAGE_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import agent_pb2, state_pb2

STAGING, LOADING, LOADED, FAILED, LEAVING = "staging", "loading", "loaded", "failed", "leaving"
_ASK_TIMEOUT_S: Final = 10.0
_RETRY_MIN_S: Final = 0.1
_RETRY_MAX_S: Final = 10.0
_log = get_logger("agent.residents")


class Residents:
    """The models of one runner. `start` once it serves; `poke` when its assignment changed."""

    def __init__(
        self,
        runner_id: str,
        tools: Tools,
        arrivals: Arrivals,
        task: Callable[[], Task],
        on_change: Callable[[str], None],
    ) -> None:
        self._runner_id = runner_id
        self._tools = tools
        self._arrivals = arrivals
        self._task = task
        self._on_change = on_change
        self._known: dict[str, agent_pb2.Resident] = {}
        self._held: dict[str, state_pb2.Residency] = {}  # of those in `_known`, as they were asked for
        self._artifacts: dict[str, agent_pb2.Artifact] = {}
        self._paths: dict[str, str] = {}  # by model, inside
        self._news = asyncio.Event()
        self._job: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The runner serves."""
        if self._job is None and not self._task().assignment.build:
            self._job = asyncio.create_task(self._run(), name=f"residents of {self._runner_id}")

    def poke(self) -> None:
        """Look at the assignment again."""
        self._news.set()

    async def close(self) -> None:
        """Stop; the worker keeps what it has."""
        if self._job is not None:
            self._job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._job
            self._job = None

    def tell(self, status: agent_pb2.RunnerStatus) -> None:
        """Put what is loaded in the place of what the assignment names."""
        if not self._known:
            return
        del status.residencies[:]
        status.residencies.extend(self._held[id] for id, one in self._known.items() if one.state == LOADED)
        status.residents.extend(self._known.values())

    # ---- the loop

    async def _run(self) -> None:
        retry_s, asked = _RETRY_MIN_S, False
        while True:
            self._news.clear()
            wanted = self._wanted()
            try:
                if wanted and not asked:
                    await self._take_back(wanted)
                    asked = True
                done = not wanted or await self._one_change(wanted)
            except Exception as exc:
                # A mistake of ours must not leave a runner with what it has for good.
                passing = isinstance(exc, FalError)
                _log.warning("resident_change", runner=self._runner_id, message=str(exc), exc_info=not passing)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await self._news.wait()
                retry_s = min(_RETRY_MAX_S, 2 * retry_s)
                continue
            retry_s = _RETRY_MIN_S
            if done:
                await self._news.wait()

    def _wanted(self) -> dict[str, state_pb2.Residency]:
        """By id; nothing while the runner does not serve, or is to end."""
        task = self._task()
        if task.goal is not Goal.RUN or task.phase is not Phase.SERVING or not task.known:
            return {}
        message = parse(task.assignment)
        self._artifacts |= {one.model: one for one in message.artifacts}
        return {one.id: one for one in message.residencies}

    async def _take_back(self, wanted: Mapping[str, state_pb2.Residency]) -> None:
        """What the worker has: it began with some, or an earlier agent loaded them."""
        answer = await self._ask("/readyz", None, _ASK_TIMEOUT_S)
        if "resident" not in answer:  # a server that does not say: it has what it began with
            for id, one in wanted.items():
                self._held[id], self._known[id] = one, agent_pb2.Resident(id=id, state=LOADED)
        for row in _rows(answer):
            name = str(row.get("model", ""))
            self._note(wanted, name, "", row)
            for lora in row.get("loras", ()):
                self._note(wanted, name, str(lora), row)
        self._on_change(self._runner_id)

    def _note(self, wanted: Mapping[str, state_pb2.Residency], model: str, lora: str, row: Mapping[str, Any]) -> None:
        base = model if lora else ""
        found = [
            one for one in wanted.values() if one.base == base and (_lora(one) == lora if lora else one.model == model)
        ]
        team = model.partition("/")[0]
        own = state_pb2.Residency(id=f"{lora or model}@{base}", model=f"{team}/{lora}" if lora else model, base=base)
        one = found[0] if found else own
        size = _count(row.get("bytes")) if not lora else 0
        self._held[one.id], self._known[one.id] = one, agent_pb2.Resident(id=one.id, state=LOADED, bytes=size)

    async def _one_change(self, wanted: Mapping[str, state_pb2.Residency]) -> bool:
        """The next change that is due; True where there is none."""
        for id in [id for id in self._known if id not in wanted and self._known[id].state == FAILED]:
            self._forget(id)
        fresh = sorted((one for id, one in wanted.items() if id not in self._known), key=lambda one: one.base != "")
        for one in fresh:
            await self._stage(one)
            return False
        leaving = [self._held[id] for id in self._known if id not in wanted]
        for one in sorted(leaving, key=lambda one: one.base == ""):  # LoRAs before what they are in
            await self._unload(one, wanted)
            return False
        for one in sorted(wanted.values(), key=lambda one: one.base != ""):
            if self._known[one.id].state in (STAGING, LOADING, LEAVING):  # it was to go, and stays after all
                await self._load(one)
                return False
        return True

    # ---- the moves

    async def _stage(self, one: state_pb2.Residency) -> None:
        began_s = self._tools.clock.monotonic_s()
        resident = agent_pb2.Resident(id=one.id, state=STAGING)
        self._put(one, resident)
        try:
            artifact = self._artifacts.get(one.model)
            if artifact is None:
                raise not_found("artifact", one.model, remedy="Report this: its assignment does not name it.")
            async with asyncio.timeout(RESIDENT_STAGE_TIMEOUT_S):
                self._paths[one.model] = await self._arrivals.show(artifact)
        except TimeoutError:
            self._failed(one, f"its files did not arrive in {RESIDENT_STAGE_TIMEOUT_S:g} s")
        except FalError as exc:
            if exc.code in PASSING:
                self._forget(one.id)
                raise
            self._failed(one, str(exc))
        except BaseException:
            self._forget(one.id)
            raise
        resident.stage_seconds = self._tools.clock.monotonic_s() - began_s

    async def _load(self, one: state_pb2.Residency) -> None:
        resident = self._known[one.id]
        resident.state = LOADING
        self._on_change(self._runner_id)
        where = {"path": self._paths[one.model]}
        body = {"model": one.base, "lora": {"name": _lora(one), **where}} if one.base else {"model": one.model, **where}
        began_s = self._tools.clock.monotonic_s()
        try:
            answer = await self._ask("/load", body, MODEL_LOAD_TIMEOUT_S + _ASK_TIMEOUT_S)
        except FalError as exc:
            if exc.code in PASSING:
                raise
            self._failed(one, str(exc))
            return
        resident.state, resident.load_seconds = LOADED, self._tools.clock.monotonic_s() - began_s
        if not one.base:
            resident.bytes = sum(_count(row.get("bytes")) for row in _rows(answer) if row.get("model") == one.model)
        _log.info("resident_loaded", runner=self._runner_id, model=one.model, seconds=resident.load_seconds)
        self._on_change(self._runner_id)

    async def _unload(self, one: state_pb2.Residency, wanted: Mapping[str, state_pb2.Residency]) -> None:
        resident = self._known[one.id]
        if resident.state != LEAVING:
            resident.state = LEAVING
            self._on_change(self._runner_id)
        body = {"model": one.base, "lora": {"name": _lora(one)}} if one.base else {"model": one.model}
        await self._ask("/unload", body, MODEL_LOAD_TIMEOUT_S)
        self._forget(one.id)
        used = {other.model for other in (*wanted.values(), *self._held.values())}
        if one.model not in used and (artifact := self._artifacts.pop(one.model, None)) is not None:
            await self._arrivals.drop(artifact)
        self._on_change(self._runner_id)

    # ---- parts

    def _put(self, one: state_pb2.Residency, resident: agent_pb2.Resident) -> None:
        self._held[one.id], self._known[one.id] = one, resident
        self._on_change(self._runner_id)

    def _forget(self, id: str) -> None:
        self._known.pop(id, None)
        self._held.pop(id, None)

    def _failed(self, one: state_pb2.Residency, why: str) -> None:
        self._tools.on_event("RESIDENT_FAILED", self._runner_id, f"{one.model}: {why}")
        self._put(one, agent_pb2.Resident(id=one.id, state=FAILED, reason=why[:1000]))

    async def _ask(self, path: str, body: Mapping[str, object] | None, timeout_s: float) -> Mapping[str, Any]:
        address = await serving.address_of(self._task(), self._tools)
        return await self._tools.control(address, path, body, timeout_s)


def _lora(one: state_pb2.Residency) -> str:
    """A request names a LoRA of the app's team without the team."""
    return launch.model_name(one.model).partition(".")[2]


def _rows(answer: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """What a worker says; what it says wrongly counts as nothing."""
    rows = answer.get("resident")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


__all__ = ["Residents"]
