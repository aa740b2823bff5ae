"""The mounts of unfinished artifacts: `FOLDER/ARTIFACT-ID/` for each, one FUSE connection each. `ports.InFlight`.

Invariants: a descriptor is at the holder before anybody learns of its mount, so a killed fsd leaves no reader hanging;
every wait ends within `read_timeout_s`; when fsd comes back it takes connections over and the kernel sends again what
was not answered (where it cannot, the mount is aborted and goes). Made, used and closed on one event loop; system calls
run in threads. Nothing here looks below a mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_fsd.mount import holder, kernel
from fal_fsd.mount.access import Access
from fal_fsd.mount.connection import Connection
from fal_fsd.mount.keeper import About, Keeper
from fal_fsd.mount.probe import YES, probe, switched_off
from fal_fsd.mount.server import THREADS, Server
from fal_fsd.ports import OnWanted, Part

READ_TIMEOUT_S: Final = 20.0
MOUNTS_MAX: Final = 512  # half of what the holder keeps
_QUIET_TIMEOUT_S: Final = 10.0  # a connection that is closed must have answered by then, else it is aborted
_HOLDER_RETRY_S: Final = 5.0
_RECORDED_MAX: Final = 64
_T = TypeVar("_T")
_log = get_logger("fal.mount")


@dataclass(slots=True)
class _Mounted:
    """A connection and what is remembered of it."""

    about: About
    connection: Connection
    path: Path


class InFlightMounts:
    """See the module. `folder` is ours alone. Call `start` first and `stop` last."""

    def __init__(
        self,
        folder: Path,
        *,
        on_wanted: OnWanted,
        read_timeout_s: float = READ_TIMEOUT_S,
        clock: Clock | None = None,
        off: Collection[str] | None = None,
        threads: int = THREADS,
        orphan_s: float = holder.ORPHAN_S,
        keep_s: float = holder.KEEP_S,
    ) -> None:
        """`off`: modes of `probe` to do without; default: what the environment says."""
        self._folder = folder.absolute()
        self._wanted = _Wanted(on_wanted, self._has)
        self._read_timeout_s = read_timeout_s
        self._clock = clock or SystemClock()
        self._off = switched_off() if off is None else frozenset(off)
        self._threads = threads
        self._keeper = Keeper(self._folder, self._clock, orphan_s=orphan_s, keep_s=keep_s)
        self._available = "it was not started"
        self._server: Server | None = None
        self._lease: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._mounted: dict[str, _Mounted] = {}  # by artifact
        self._all: dict[Connection, _Mounted] = {}  # also those that are closed and still open somewhere
        self._access: dict[str, Access] = {}  # by artifact, the oldest first
        self._work: set[asyncio.Task[Any]] = set()  # finished before we stop
        self._holding: asyncio.Task[None] | None = None
        self.modes: dict[str, str] = {}

    # ---- life

    async def start(self, part_of: Callable[[str], Part | None] = lambda artifact_id: None) -> list[str]:
        """Find out what works, start or find the holder, take over what an earlier fsd had mounted.

        `part_of` says where the bytes of such an artifact are now (a finished one: `sources.FolderPart`); what it does
        not know is taken away. Returns the artifacts whose mounts are in their place again; `close` them when done.
        """
        self._loop = asyncio.get_running_loop()
        self._wanted.loop = self._loop
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        self.modes = await asyncio.to_thread(probe, self._folder, off=self._off)
        self._available = "" if self.modes["fuse"] == YES else f"no FUSE here: {self.modes['fuse']}"
        if self._available:
            _log.info("no_in_flight_mounts", why=self._available)
            return []
        self._server = Server(self._clock, self._gone_in_thread, threads=self._threads)
        try:
            await self._hold()
            await self._take_over(part_of)
        except (FalError, OSError) as exc:  # containers wait until models are ready; nothing else suffers
            _log.error("no_in_flight_mounts", why=str(exc))
            await self.stop(keep=True)
            self._available = str(exc)
        return list(self._mounted)

    async def stop(self, *, keep: bool = True) -> None:
        """Serve no more. With `keep` the holder keeps the mounts for the next fsd, if that can take them over."""
        keep = keep and self.modes.get("resend") == YES
        self._available = "it was stopped"
        if self._lease is not None:
            self._loop.remove_reader(self._lease)
        if self._holding is not None:
            self._holding.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        if not keep:
            for mounted in list(self._all.values()):
                await self._close(mounted)
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
            self._server = None
        if self._lease is not None:
            if not keep:
                await asyncio.to_thread(self._keeper.end)
            self._lease.close()
            self._lease = None
        await asyncio.to_thread(self._keeper.reap)
        self._mounted.clear()
        self._all.clear()

    @property
    def available(self) -> str:
        """Empty when it works here, else why not."""
        return self._available

    @property
    def holder_pid(self) -> int:
        """The holder's process."""
        return self._keeper.pid

    @property
    def artifacts(self) -> list[str]:
        """What is mounted."""
        return list(self._mounted)

    @property
    def lingering(self) -> int:
        """Closed mounts that somebody still has open."""
        return len(self._all) - len(self._mounted)

    @property
    def in_use(self) -> frozenset[str]:
        """Artifacts that are mounted, or closed and still open somewhere: their bytes are not free when they go."""
        return frozenset(mounted.about.artifact_id for mounted in self._all.values())

    @property
    def answered_bytes(self) -> int:
        """What readers got from the connections of now."""
        return sum(connection.answered_bytes for connection in self._all)

    # ---- ports.InFlight

    async def open(self, part: Part) -> Path:
        """See `ports.InFlight`. With another part than before: what was refused is waited for again."""
        if self._available or self._server is None:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"unfinished models cannot be shown: {self._available}",
                remedy="Wait until the model is ready.",
            )
        return await asyncio.shield(self._spawn(self._open(part)))  # who gives up must not leave half a mount

    async def _open(self, part: Part) -> Path:
        artifact_id = part.artifact.id
        async with self._lock:
            found = self._mounted.get(artifact_id)
            if found is not None:
                found.connection.renew(part)
                return found.path
            if len(self._all) >= MOUNTS_MAX:
                raise FalError(
                    Code.NO_CAPACITY,
                    f"{len(self._all)} unfinished artifacts are mounted already",
                    remedy="Wait until some are ready, or stop containers that hold finished ones open.",
                )
            path = self._folder / artifact_id
            try:
                fd, about = await asyncio.to_thread(self._mount, artifact_id, path)
            except OSError as exc:
                raise FalError(
                    Code.UNAVAILABLE, f"{path} cannot be mounted: {exc}", remedy="It is tried again when asked again."
                ) from exc
            return self._serve(about, fd, part, path).path

    def arrived(self, artifact_id: str, piece: int) -> None:
        """See `ports.InFlight`."""
        found = self._mounted.get(artifact_id)
        if found is not None:
            found.connection.arrived(piece)

    def fail(self, artifact_id: str, reason: str) -> None:
        """See `ports.InFlight`. `open` with its part again takes it back."""
        found = self._mounted.get(artifact_id)
        if found is not None:
            found.connection.refuse(reason)

    def cancel_reads(self, pids: Sequence[int]) -> int:
        """See `ports.InFlight`."""
        if not pids:
            return 0

        def of_reader(thread_id: int) -> bool:  # the kernel names the reading thread
            return any(os.path.exists(f"/proc/{pid}/task/{thread_id}") for pid in pids)

        return sum(connection.cancel(of_reader) for connection in list(self._all))

    def shows(self, artifact_id: str) -> bool:
        """See `ports.InFlight`."""
        return artifact_id in self._mounted

    def take_access(self, artifact_id: str) -> list[int]:
        """See `ports.InFlight`."""
        access = self._access.pop(artifact_id, None)
        return access.pieces() if access is not None else []

    async def close(self, artifact_id: str) -> None:
        """See `ports.InFlight`. The part may be closed, moved or dropped afterwards."""
        await asyncio.shield(self._spawn(self._close_one(artifact_id)))

    async def _close_one(self, artifact_id: str) -> None:
        async with self._lock:
            found = self._mounted.get(artifact_id)
            if found is not None:
                await self._close(found)

    # ---- inside

    def _mount(self, artifact_id: str, path: Path) -> tuple[int, About]:
        """Blocks."""
        fd = kernel.open_device()
        try:
            kernel.remove_mount_point(path)
            path.mkdir()
            try:
                about = About(artifact_id, kernel.mount(fd, path), secrets.token_hex(8))
                self._keeper.put(about, fd)
            except BaseException:
                kernel.remove_mount_point(path)
                raise
        except BaseException:
            os.close(fd)
            raise
        return fd, about

    def _serve(self, about: About, fd: int, part: Part, path: Path) -> _Mounted:
        assert self._server is not None
        connection = Connection(
            fd,
            part,
            about.connection,
            read_timeout_s=self._read_timeout_s,
            allow_mmap="allow_mmap" not in self._off,
            tell=self._wanted.tell,
            wake=self._server.wake,
            access=self._access_of(part) if about.mounted else None,
        )
        made = _Mounted(about, connection, path)
        self._all[connection] = made
        if about.mounted:
            self._mounted[about.artifact_id] = made
        self._server.add(connection)
        return made

    def _access_of(self, part: Part) -> Access | None:
        """Starts of images are recorded, of the last few; a mount that takes another's place goes on with its list."""
        if part.artifact.kind != "image":
            return None
        access = self._access.setdefault(part.artifact.id, Access())
        while len(self._access) > _RECORDED_MAX:
            del self._access[next(iter(self._access))]
        return access

    async def _close(self, mounted: _Mounted) -> None:
        """Take it from its place. It lives on while somebody has it open, unless a request hangs in it."""
        connection, about = mounted.connection, mounted.about
        if self._mounted.get(about.artifact_id) is mounted:
            del self._mounted[about.artifact_id]
        connection.refuse("the mount was closed")
        await asyncio.to_thread(kernel.remove_mount_point, mounted.path)
        await asyncio.to_thread(connection.keep_bytes)
        mounted.about = replace(about, mounted=False)
        with contextlib.suppress(OSError, FalError):  # a holder that is away hears of it when it is back
            await asyncio.to_thread(self._keeper.note, mounted.about)
        if not await asyncio.to_thread(connection.quiet, _QUIET_TIMEOUT_S):
            _log.error("aborted", artifact=about.artifact_id, why="a request hangs in it")
            await asyncio.to_thread(kernel.abort, about.connection)

    async def _hold(self) -> None:
        """Have a holder that has all our descriptors."""
        lease = await asyncio.to_thread(self._keeper.ensure)
        try:
            for mounted in list(self._all.values()):
                await asyncio.to_thread(self._keeper.put, mounted.about, mounted.connection.fd)
        except BaseException:
            lease.close()
            raise
        lease.setblocking(False)
        self._lease = lease
        self._loop.add_reader(lease, self._holder_died)

    def _holder_died(self) -> None:
        """Readers do not notice: the descriptors are here, too."""
        assert self._lease is not None
        self._loop.remove_reader(self._lease)
        self._lease.close()
        self._lease = None
        _log.warning("holder_died", held=len(self._all))
        self._holding = self._spawn(self._hold_again())

    async def _hold_again(self) -> None:
        while True:
            async with self._lock:
                try:
                    await self._hold()
                    self._available = ""
                    return
                except (FalError, OSError) as exc:
                    _log.error("no_holder", why=str(exc))
                    self._available = f"the process that keeps mounts does not start: {exc}"
            await asyncio.sleep(_HOLDER_RETRY_S)

    async def _take_over(self, part_of: Callable[[str], Part | None]) -> None:
        held = await asyncio.to_thread(self._keeper.held)
        there = {x.connection: x.path for x in await asyncio.to_thread(kernel.mounted_below, self._folder)}
        for about in held:
            path = self._folder / about.artifact_id
            part = part_of(about.artifact_id)
            usable = part is not None and self.modes["resend"] == YES
            if part is not None and usable and (not about.mounted or there.get(about.connection) == path):
                try:
                    await self._resume(about, part, path)
                    there.pop(about.connection, None)
                    continue
                except OSError as exc:
                    _log.warning("not_taken_over", artifact=about.artifact_id, why=exc.strerror)
            why = "requests cannot be sent again" if part is not None else "nobody needs it"
            _log.info("mount_dropped", artifact=about.artifact_id, why=why)
            # The last descriptor: its connection ends. (Its number may be another's by now, so it is not aborted.)
            await asyncio.to_thread(self._keeper.drop, about)
        for path in there.values():
            await asyncio.to_thread(kernel.remove_mount_point, path)

    async def _resume(self, about: About, part: Part, path: Path) -> None:
        fd = await asyncio.to_thread(self._keeper.take, about)
        mounted = self._serve(about, fd, part, path)
        try:
            await asyncio.to_thread(mounted.connection.notify_resend)
        except OSError:
            assert self._server is not None
            self._server.remove(mounted.connection)
            self._all.pop(mounted.connection, None)
            self._mounted.pop(about.artifact_id, None)
            raise
        _log.info("mount_taken_over", artifact=about.artifact_id, mounted=about.mounted)

    def _gone_in_thread(self, connection: Connection) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._gone, connection)

    def _gone(self, connection: Connection) -> None:
        """Released by the last who had it open, or aborted."""
        mounted = self._all.pop(connection, None)
        if mounted is None:
            return
        if self._mounted.get(mounted.about.artifact_id) is mounted:
            _log.warning("mount_lost", artifact=mounted.about.artifact_id, why="it was aborted or unmounted")
            del self._mounted[mounted.about.artifact_id]
        self._spawn(asyncio.to_thread(self._keeper.drop, mounted.about))

    def _has(self, artifact_id: str, piece: int) -> bool:
        found = self._mounted.get(artifact_id)
        return found is not None and found.connection.has(piece)

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = self._loop.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task


class _Wanted:
    """Brings what threads say readers want to the loop, many words at once; what is here is not worth a word."""

    def __init__(self, on_wanted: OnWanted, has: Callable[[str, int], bool]) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._on_wanted, self._has = on_wanted, has
        self._lock = threading.Lock()
        self._said: dict[str, dict[int, bool]] = {}

    def tell(self, artifact_id: str, pieces: Sequence[int], wanted: bool) -> None:
        """From any thread."""
        with self._lock:
            first = not self._said
            self._said.setdefault(artifact_id, {}).update(dict.fromkeys(pieces, wanted))
        if first and self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            said, self._said = self._said, {}
        for artifact_id, words in said.items():
            absent = sorted(piece for piece in words if not self._has(artifact_id, piece))
            for wanted in (True, False):
                if pieces := [piece for piece in absent if words[piece] is wanted]:
                    self._on_wanted(artifact_id, pieces, wanted)


__all__ = ["MOUNTS_MAX", "READ_TIMEOUT_S", "InFlightMounts"]
