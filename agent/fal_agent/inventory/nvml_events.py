"""What NVIDIA's driver tells by itself: XIDs and memory errors, heard in a thread of their own.

NVML's wait blocks, so it is made in a daemon thread, a second at a time: it ends within that after `close`, and a
driver that hangs delays nobody. What it hears goes through a bounded queue to the loop; what does not fit is counted,
and told as one event that says "look". Calls into NVML from two threads are allowed by its documentation.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from fal_agent.inventory.model import DeviceEvent
from fal_contract.limits import GPU_EVENTS_MAX
from fal_contract.telemetry import get_logger

WAIT_MS: Final = 1000
_AGAIN_S: Final = 5.0  # after a driver that has no events for us
_JOIN_S: Final = 3.0
_log = get_logger("fal.inventory")


class NvmlEvents:
    """Listens from `start` to `close`. `library` is initialised already, and stays so while this listens."""

    def __init__(self, library: Any, on_event: Callable[[DeviceEvent], None], *, wait_ms: int = WAIT_MS) -> None:
        self._n = library
        self._on_event = on_event
        self._wait_ms = wait_ms
        self._queue: deque[DeviceEvent] = deque()
        self._lock = threading.Lock()
        self._woken = False  # the loop has been told and has not come yet
        self._lost = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; again after `close` begins anew."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="nvml-events", daemon=True)
            self._thread.start()

    async def close(self) -> None:
        """Stop listening; returns once NVML is not used any more, or the driver has hung for a while. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            await asyncio.to_thread(thread.join, _JOIN_S)

    # ---- in the thread

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                events, names = self._register()
            except self._n.NVMLError as exc:
                _log.info("no_gpu_events", why=str(exc))
                stop.wait(_AGAIN_S)
                continue
            try:
                while names and not stop.is_set():
                    self._wait(events, names)
                if not names:  # no device has events for us; there may be others later
                    stop.wait(_AGAIN_S)
            except self._n.NVMLError as exc:
                # The driver's word for a device that went: which one is seen by looking.
                _log.warning("gpu_events_ended", why=str(exc))
                self._hear(DeviceEvent("", "lost"))
                stop.wait(_AGAIN_S)
            finally:
                self._free(events)

    def _register(self) -> tuple[Any, dict[int, str]]:
        """A set with every device that has events, and their ids by handle."""
        n = self._n
        wanted = n.nvmlEventTypeXidCriticalError | n.nvmlEventTypeDoubleBitEccError
        events, names = n.nvmlEventSetCreate(), {}
        try:
            for index in range(int(n.nvmlDeviceGetCount())):
                try:
                    handle = n.nvmlDeviceGetHandleByIndex(index)
                    kinds = n.nvmlDeviceGetSupportedEventTypes(handle) & wanted
                    if kinds:
                        name = n.nvmlDeviceGetUUID(handle)
                        n.nvmlDeviceRegisterEvents(handle, kinds, events)
                        names[_key(handle)] = name.decode() if isinstance(name, bytes) else str(name)
                except n.NVMLError:  # lost, or without events
                    continue
        except n.NVMLError:
            self._free(events)
            raise
        return events, names

    def _wait(self, events: Any, names: dict[int, str]) -> None:
        n = self._n
        try:
            data = n.nvmlEventSetWait_v2(events, self._wait_ms)
        except n.NVMLError as exc:
            if getattr(exc, "value", None) == n.NVML_ERROR_TIMEOUT:
                return
            raise
        # A device that has just been lost cannot be asked for its name, so they were asked before.
        gpu_id = names.get(_key(data.device), "")
        if data.eventType & n.nvmlEventTypeXidCriticalError:
            self._hear(DeviceEvent(gpu_id, "xid", int(data.eventData)))
        elif data.eventType & n.nvmlEventTypeDoubleBitEccError:
            self._hear(DeviceEvent(gpu_id, "ecc"))

    def _free(self, events: Any) -> None:
        try:
            self._n.nvmlEventSetFree(events)
        except self._n.NVMLError as exc:
            _log.info("gpu_events_not_freed", why=str(exc))

    def _hear(self, event: DeviceEvent) -> None:
        assert self._loop is not None
        with self._lock:
            if len(self._queue) >= GPU_EVENTS_MAX:
                self._lost += 1
            else:
                self._queue.append(event)
            if self._woken:
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    # ---- on the loop

    def _deliver(self) -> None:
        with self._lock:
            heard, lost, self._lost, self._woken = list(self._queue), self._lost, 0, False
            self._queue.clear()
        for event in heard:
            self._on_event(event)
        if lost:
            _log.warning("gpu_events_lost", count=lost)
            self._on_event(DeviceEvent("", "lost"))


def _key(handle: Any) -> int:
    """What is equal for two handles of one device: the address that NVML's pointer holds."""
    try:
        return ctypes.cast(handle, ctypes.c_void_p).value or 0
    except (ctypes.ArgumentError, TypeError):
        return id(handle)


__all__ = ["NvmlEvents"]
