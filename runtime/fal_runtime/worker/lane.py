"""One inference at a time, in one thread; the event loop stays free.

A `Lane` admits at most `in_flight_max` jobs (one runs, the rest wait in order) and refuses the next with BUSY.
Every job ends exactly once: with an output, a FalError, or `Stopped`. The place of a stopped job is free only
when its thread has really let go, so the bound holds for the model, not for the clients. All methods run on the
event loop; only `_work` runs in the thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fal_contract.errors import Code, FalError
from fal_runtime.worker.engine import DeviceFailed, Engine, OutOfMemory, Output, Stopped
from fal_runtime.worker.log import REQUEST
from fal_runtime.worker.request import InferRequest

DEVICE_FAILURES_MAX: Final = 2  # then the process is replaced
_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Job:
    """One admitted request. `events` carries (step, steps) pairs, then None when the job has ended."""

    request_id: str
    request: InferRequest
    result: asyncio.Future[Output]
    submitted_s: float
    events: asyncio.Queue[tuple[int, int] | None] = field(default_factory=asyncio.Queue)  # bounded by STEPS_MAX
    stopping: threading.Event = field(default_factory=threading.Event)
    started_s: float = 0.0
    steps_done: int = 0
    work: Future[Output] | None = None

    def stop(self) -> None:
        """Ask the job to end: at once if it waits, after the step it is in if it runs. May be called again."""
        self.stopping.set()
        if self.work is not None and self.work.cancel() and not self.result.done():
            self.result.set_exception(Stopped())

    @property
    def queue_s(self) -> float:
        """Seconds from admission to the start of the work; 0 before it starts."""
        return max(0.0, self.started_s - self.submitted_s) if self.started_s else 0.0


class Lane:
    """The engine's thread and the bounded queue before it. `on_end(job, outcome, seconds)` is told of each end."""

    def __init__(self, engine: Engine, *, in_flight_max: int, on_end: Callable[[Job, str, float], None]) -> None:
        self._engine = engine
        self._in_flight_max = in_flight_max
        self._on_end = on_end
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infer")
        self._jobs: dict[str, Job] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._device_failures = 0
        self.broken = asyncio.Event()  # set by the second device failure

    @property
    def in_flight(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    async def call(self, work: Callable[[], _T]) -> _T:
        """Run `work` in the engine's thread (loading, warming up)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def submit(self, request_id: str, request: InferRequest) -> Job:
        """Admit a request. Raises BUSY when the lane is full, ALREADY_EXISTS for an id that is in flight."""
        if request_id in self._jobs:
            raise FalError(
                Code.ALREADY_EXISTS, f"request {request_id!r} is already in flight", remedy="Use a new request id."
            )
        if len(self._jobs) >= self._in_flight_max:
            raise FalError(
                Code.BUSY, f"{len(self._jobs)} of {self._in_flight_max} requests are in flight", remedy="Try again."
            )
        loop = asyncio.get_running_loop()
        job = Job(request_id, request, loop.create_future(), time.monotonic())
        # A job whose client has gone is awaited by nobody; its failure is no news for the loop's handler then.
        job.result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self._jobs[request_id] = job
        self._idle.clear()
        job.work = self._thread.submit(self._work, job, loop)
        job.work.add_done_callback(lambda work: loop.call_soon_threadsafe(self._end, job, work))
        return job

    def stop(self, request_id: str) -> bool:
        """Ask a job to end; False when no job has that id."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.stop()
        return job is not None

    async def drain(self, *, grace_s: float) -> bool:
        """Wait for all jobs; after `grace_s` stop those that are left. True when none had to be stopped."""
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for job in list(self._jobs.values()):
                job.stop()
            return False
        return True

    def close(self) -> None:
        """The thread ends with what it does; nobody waits for it."""
        self._thread.shutdown(wait=False)

    def _work(self, job: Job, loop: asyncio.AbstractEventLoop) -> Output:
        job.started_s = time.monotonic()

        def on_step(done: int, steps: int) -> None:
            job.steps_done = done
            loop.call_soon_threadsafe(job.events.put_nowait, (done, steps))
            if job.stopping.is_set():
                raise Stopped

        if job.stopping.is_set():
            raise Stopped
        token = REQUEST.set(job.request_id)
        try:
            return self._engine.infer(job.request, on_step)
        finally:
            REQUEST.reset(token)

    def _end(self, job: Job, work: Future[Output]) -> None:
        """Free the place, settle the result, tell the outcome."""
        del self._jobs[job.request_id]
        if not self._jobs:
            self._idle.set()
        error: BaseException | None = Stopped() if work.cancelled() else work.exception()
        if isinstance(error, DeviceFailed):
            self._device_failures += 1
            if self._device_failures >= DEVICE_FAILURES_MAX:
                self.broken.set()
        outcome, failure = _outcome(error)
        if not job.result.done():
            if failure is None:
                job.result.set_result(work.result())
            else:
                job.result.set_exception(failure)
        job.events.put_nowait(None)
        self._on_end(job, outcome, time.monotonic() - job.submitted_s)


def _outcome(error: BaseException | None) -> tuple[str, Exception | None]:
    """The word for metrics, and the exception that the request ends with."""
    match error:
        case None:
            return "ok", None
        case Stopped():
            return "cancelled", error
        case FalError():
            return error.code.value.lower(), error
        case MemoryError():
            return "out_of_memory", OutOfMemory("the request did not fit into memory")
        case _:
            what = f"the pipeline failed: {type(error).__name__}: {_first_line(error)}"
            return "runner_failed", FalError(Code.RUNNER_FAILED, what, remedy="See the runner's log.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
