"""One read-only mount of each image on this node, shared by its containers; also while the image arrives.

    IMAGES/ID        the mount point
    IMAGES/ID.json   what is mounted there (`_Mounted`), written before the mount

A finished image is mounted from its plain file: EROFS without a loop device where the kernel can (Linux 6.12), else
through one. An unfinished one, a file on a FUSE mount, always goes through a loop device, because that can be given
another file under everything that is open: `finished` moves it to the plain file, and fsd may go away. Invariants: a
mount goes when no record names its image; unmounting ends within `STUCK_S` + `ABORTED_S`, also where reads wait for a
peer that never answers (the FUSE connection of that one artifact is aborted). Called by the oci driver; system calls
run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_runtime.driver import Image, driver_failed
from fal_runtime.images.layout import CONFIG_FILE, ImageLayout, read_layout
from fal_runtime.oci import loop, mounts
from fal_runtime.process_supervisor import write_whole

STUCK_S: Final = 5.0  # then the connection of an unfinished image is aborted
ABORTED_S: Final = 8.0
KEEP_S: Final = 20.0  # the next container of an image comes mostly soon
_FLAGS: Final = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
_FUSE: Final = Path("/sys/fs/fuse/connections")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_HEAD_BYTES: Final = 64 << 10
UNMOUNTS_MAX: Final = 32  # at once; more hang only where the kernel is ill
_ABORTING: Final = threading.Lock()  # who finds fusectl mounted must not lose it to who mounted it
_log = get_logger("oci.images")


@dataclass(frozen=True, slots=True)
class _Mounted:
    """`file`: what it reads; `fuse`: number of its FUSE connection, 0 for a plain file."""

    file: str
    format: str
    finished: bool
    fuse: int = 0


class _Lock:
    """Of one image, for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """To unmount an image. Its thread may hang in the kernel; after `given_up` it unmounts nothing more."""

    end: asyncio.Future[None]
    given_up: threading.Event = field(default_factory=threading.Event)


class ImageMounts:
    """See the module's docstring. `users_of(id)`: the containers whose records name that image; asked in threads."""

    def __init__(self, folder: Path, users_of: Callable[[str], frozenset[str]], *, keep_s: float = KEEP_S) -> None:
        self.folder = folder
        self._users_of = users_of
        self._keep_s = keep_s
        self._locks: dict[str, _Lock] = {}
        self._unmounting: dict[str, _Attempt] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._work: set[asyncio.Task[None]] = set()

    async def attach(self, image: Image) -> tuple[Path, ImageLayout]:
        """Where it is mounted, and what its folder says. Idempotent; takes over a better file than is mounted.

        UNAVAILABLE: its first bytes have not arrived; CORRUPT, DRIVER_FAILED.
        """
        async with self._locked(image.id):
            self._forget_later(image.id)
            return await asyncio.to_thread(self._attach, image)

    async def finished(self, image: Image) -> None:
        """The image is whole, in `image.folder`: what is mounted reads from there from now on. Not mounted: fine."""
        async with self._locked(image.id):
            await asyncio.to_thread(self._move, image)

    def let_go(self, id: str) -> None:
        """A container of it has gone: unmount it after a while unless another is there by then."""
        self._forget_later(id)
        loop_ = asyncio.get_running_loop()
        self._later[id] = loop_.call_later(self._keep_s, self._release_later, id)

    async def release(self, id: str) -> bool:
        """Unmount it unless a container uses it; True when it is not mounted any more."""
        async with self._locked(id):
            if await asyncio.to_thread(self._users_of, id):
                return False
            await self._take_down(id)
            return True

    @asynccontextmanager
    async def unstuck(self, id: str, container: str) -> AsyncIterator[None]:
        """While a killed container is waited for: its reads of an unfinished image (if any) end after a while.

        A reader of SquashFS cannot be killed before its read ends. Where others read the same image, it waits for
        fsd's own bound; theirs must not fail.
        """
        if not id:
            yield
            return
        freeing = asyncio.create_task(self._free(id, container), name=f"reads of {container}")
        try:
            yield
        finally:
            freeing.cancel()
            await asyncio.gather(freeing, return_exceptions=True)

    async def clean(self) -> list[str]:
        """Unmount what no container uses; what was found, in words."""
        words = []
        for id in await asyncio.to_thread(self._known):
            if await self.release(id):
                words.append(f"image mount {id}")
        return words

    def close(self) -> None:
        """Forget what was to be unmounted later; mounts stay for the next driver's `clean`."""
        for id in list(self._later):
            self._forget_later(id)

    # ---- inside

    @asynccontextmanager
    async def _locked(self, id: str) -> AsyncIterator[None]:
        if not _ID.fullmatch(id) or ".." in id:
            raise driver_failed(f"image id {id!r} is not a file name", remedy="Use the artifact's id.")
        lock = self._locks.setdefault(id, _Lock())
        lock.users += 1
        try:
            async with lock.lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[id]

    def _forget_later(self, id: str) -> None:
        if (handle := self._later.pop(id, None)) is not None:
            handle.cancel()

    def _release_later(self, id: str) -> None:
        self._later.pop(id, None)

        async def release() -> None:
            try:
                await self.release(id)
            except FalError as exc:
                _log.warning("image_not_unmounted", image=id, error=str(exc))

        task = asyncio.get_running_loop().create_task(release(), name=f"unmount image {id[:12]}")
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _state(self, id: str) -> _Mounted | None:
        try:
            value: dict[str, Any] = json.loads((self.folder / f"{id}.json").read_text())
            return _Mounted(**value)
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, id: str, state: _Mounted) -> None:
        write_whole(self.folder / f"{id}.json", asdict(state))

    def _known(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        names = {path.name.removesuffix(".json") for path in self.folder.iterdir()}
        return sorted(name for name in names if _ID.fullmatch(name))

    def _attach(self, image: Image) -> tuple[Path, ImageLayout]:
        layout = _read(image)
        place = self.folder / image.id
        place.mkdir(parents=True, exist_ok=True, mode=0o711)
        mounted, state = _device_at(place), self._state(image.id)
        if mounted is not None and state is not None:
            self._improve(image, layout, mounted, state)
            return place, layout
        while _device_at(place) is not None:
            mounts.umount(place)
        fd = _open(layout.file, finished=image.finished)
        try:
            fuse = 0 if image.finished else os.minor(os.fstat(fd).st_dev)
            self._write(image.id, _Mounted(str(layout.file), layout.format, image.finished, fuse))
            if not (image.finished and layout.format == "erofs" and _without_loop(layout.file, place)):
                with loop.attached(fd, layout.file.name, self.folder) as device:
                    mounts.mount(str(device), place, layout.format, _FLAGS)
        except FalError:
            if not image.finished:
                _readable(fd, layout.file, finished=False)  # a better reason, and one that passes
            raise
        finally:
            os.close(fd)
        return place, layout

    def _improve(self, image: Image, layout: ImageLayout, device: int, state: _Mounted) -> None:
        """Give the loop device a better file: the plain one, or that of a new FUSE mount where the old one has died."""
        if state.finished:
            return
        fd = _open(layout.file, finished=image.finished)
        try:
            fuse = 0 if image.finished else os.minor(os.fstat(fd).st_dev)
            if fuse == state.fuse:
                return
            if os.major(device) != loop.MAJOR:
                raise driver_failed(f"image {image.id} is not behind a loop device", remedy="Remove its containers.")
            loop.change_file(os.minor(device), fd, self.folder)
        finally:
            os.close(fd)
        self._write(image.id, _Mounted(str(layout.file), layout.format, image.finished, fuse))

    def _move(self, image: Image) -> None:
        mounted, state = _device_at(self.folder / image.id), self._state(image.id)
        if mounted is None or state is None or state.finished:
            return
        self._improve(image, _read(image), mounted, state)

    async def _free(self, id: str, container: str) -> None:
        await asyncio.sleep(STUCK_S)
        async with self._locked(id):
            state = await asyncio.to_thread(self._state, id)
            if state is not None and state.fuse and await asyncio.to_thread(self._users_of, id) == {container}:
                _log.warning("image_aborted", image=id, why=f"{container} cannot be killed while it reads")
                await asyncio.to_thread(_abort, state.fuse)

    async def _take_down(self, id: str) -> None:
        place, state = self.folder / id, await asyncio.to_thread(self._state, id)
        self._forget_later(id)
        attempt = self._unmounting.get(id) or self._unmount(id)
        try:
            done, _ = await asyncio.wait({attempt.end}, timeout=STUCK_S)
            if not done and state is not None and state.fuse:
                _log.warning("image_aborted", image=id, why="its unmounting waits for pieces that do not come")
                await asyncio.to_thread(_abort, state.fuse)
            done, _ = await asyncio.wait({attempt.end}, timeout=ABORTED_S)
        finally:
            attempt.given_up.set()  # the next mount there is not its
        if not done:
            raise driver_failed(f"image {id} cannot be unmounted", remedy="A read of its file hangs in the kernel.")
        attempt.end.result()
        if await asyncio.to_thread(_device_at, place) is not None:
            raise driver_failed(f"image {id} was mounted again meanwhile", remedy="It is unmounted when asked again.")
        (self.folder / f"{id}.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()

    def _unmount(self, id: str) -> _Attempt:
        """One attempt at a time for each image, in a thread that nobody's end waits for: it may hang in the kernel."""
        if len(self._unmounting) >= UNMOUNTS_MAX:
            raise driver_failed(f"{len(self._unmounting)} images hang while they are unmounted", remedy="Reboot.")
        loop_ = asyncio.get_running_loop()
        attempt = self._unmounting[id] = _Attempt(loop_.create_future())

        def ended(error: Exception | None) -> None:
            del self._unmounting[id]
            if error is None:
                attempt.end.set_result(None)
            else:
                attempt.end.set_exception(error)
                attempt.end.exception()  # perhaps nobody waits any more

        def unmount() -> None:
            error: Exception | None = None
            try:
                _unmount(self.folder / id, attempt.given_up)
            except Exception as exc:
                error = exc
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop_.call_soon_threadsafe(ended, error)

        threading.Thread(target=unmount, name=f"umount {id[:12]}", daemon=True).start()
        return attempt


def _read(image: Image) -> ImageLayout:
    if not image.finished:
        config = image.folder / CONFIG_FILE
        try:
            with config.open("rb") as file:
                file.read(1)  # waits for its piece; what goes wrong here passes
        except OSError as exc:
            raise _not_here(config, exc) from exc
    return read_layout(image.folder)


def _open(file: Path, *, finished: bool) -> int:
    """The image file, its first bytes readable."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        if finished:
            raise driver_failed(f"{file}: {exc.strerror}", remedy="Stage the image again.") from exc
        raise _not_here(file, exc) from exc
    try:
        _readable(fd, file, finished=finished)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _readable(fd: int, file: Path, *, finished: bool) -> None:
    """Waits, within fsd's bound, for the pieces that mounting needs first."""
    if finished:
        return
    try:
        size = os.fstat(fd).st_size
        for offset in (0, max(size - _HEAD_BYTES, 0)):
            os.pread(fd, _HEAD_BYTES, offset)
    except OSError as exc:
        raise _not_here(file, exc) from exc


def _not_here(path: Path, exc: OSError) -> FalError:
    return FalError(
        Code.UNAVAILABLE, f"{path} cannot be read yet: {exc.strerror}", remedy="It is tried again as it arrives."
    )


def _device_at(place: Path) -> int | None:
    """Device number of the filesystem that is mounted at `place`; None: nothing is."""
    try:
        here, above = os.stat(place), os.stat(place.parent)
    except OSError:
        return None
    return here.st_dev if here.st_dev != above.st_dev else None


def _without_loop(file: Path, place: Path) -> bool:
    """Mount the file itself; False where this kernel or the file's filesystem cannot."""
    try:
        mounts.mount(str(file), place, "erofs", _FLAGS)
    except FalError:
        return False
    return True


def _unmount(place: Path, given_up: threading.Event) -> None:
    while not given_up.is_set() and _device_at(place) is not None:
        mounts.umount(place)


def _abort(fuse: int) -> None:
    """All requests of that connection fail, whatever hangs in it."""
    with _ABORTING, contextlib.suppress(OSError):
        mounted = _FUSE.is_dir() and not any(_FUSE.iterdir())
        if mounted:
            try:
                mounts.mount("fusectl", _FUSE, "fusectl", mounts.MS_NOSUID | mounts.MS_NODEV)
            except FalError:
                return
        try:
            (_FUSE / str(fuse) / "abort").write_text("1")
        finally:
            if mounted:
                with contextlib.suppress(FalError):
                    mounts.umount(_FUSE)


__all__ = ["KEEP_S", "ImageMounts"]
