"""Registering models: listed at once, hashed in a thread, attested when every digest is known.

A model is REGISTERED with names and sizes, so that an app can be applied, and ATTESTED once its manifest stands in
`blobs/`; a file that changes in between makes it REFUSED. A new leader goes on with what the last one did not finish,
and reads an attested model again whose manifest lay on the last leader's disk only.
At most two models are hashed at once. Must not read anything but file:// folders (fsd does the rest).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import check_name
from fal_contract.model_manifest import manifest_digest
from fal_contract.telemetry import get_logger
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.core.events import AddModel, AttestModel, RefuseModel
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.registry import KINDS, Listed, folder_of, hash_files, list_files

HASHED_AT_ONCE_MAX: Final = 2
ATTEST_WAIT_S: Final = 3.0  # small models are attested before AddModel answers
_log = get_logger("scheduler.models")


class ModelRegistrar:
    """Registrations of one leader. `roots`: folders below which models may lie; none: anywhere."""

    def __init__(self, engine: EnginePort, blobs: ManifestBlobs, *, roots: Sequence[Path] = ()) -> None:
        self._engine = engine
        self._blobs = blobs
        self._roots = tuple(roots)
        self._slots = asyncio.Semaphore(HASHED_AT_ONCE_MAX)
        self._stop = Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, id_: str, uri: str, *, kind: str, revision: str, actor: str) -> None:
        """Register and begin to hash; returns when it is attested, or after 3 s. Raises INVALID, ALREADY_EXISTS."""
        team, slash, name = id_.partition("/")
        check_name(team, field="id")
        check_name(name if slash else "", field="id")
        kind = kind or "model"
        if kind not in KINDS:
            raise invalid("kind", kind, "is no kind", remedy="Use model or lora.")
        if revision:
            raise invalid("revision", revision, "has no meaning for a folder", remedy="Leave it out with file://.")
        folder = await asyncio.to_thread(folder_of, uri, self._roots)
        listed = await asyncio.to_thread(list_files, folder)
        await self._same_content(id_, listed)
        model = Model(id=id_, kind=kind, uri=uri, bytes=sum(x.size_bytes for x in listed), files=len(listed))
        await self._engine.submit(AddModel(model, actor))
        task = self._begin(id_, lambda: listed)
        if task is not None:
            await asyncio.wait({task}, timeout=ATTEST_WAIT_S)

    async def _same_content(self, id_: str, listed: Sequence[Listed]) -> None:
        """A second registration of a name must bring the same files; the record alone cannot tell."""
        known = self._engine.view.models.get(id_)
        if known is None or known.state is not ModelState.ATTESTED:
            return
        size = sum(x.size_bytes for x in listed)
        same = (known.bytes, known.files) == (size, len(listed))
        if same:
            async with self._slots:
                entries = await asyncio.to_thread(hash_files, listed, self._stop)
            same = await asyncio.to_thread(self._blobs.put, entries) == known.manifest_digest
        if not same:
            raise FalError(
                Code.ALREADY_EXISTS,
                f"model {id_!r} exists with other content (from {known.uri})",
                remedy="Use another name; a model's content never changes.",
                field="id",
            )

    def resume(self) -> None:
        """Go on with models that the last leader did not attest; make manifests anew that only its disk had."""
        for model in list(self._engine.view.models.values()):
            if model.state is ModelState.REGISTERED:
                self._begin(model.id, self._lister(model.uri))
            elif model.state is ModelState.ATTESTED and not self._blobs.has(model.manifest_digest):
                self._start(model.id, self._restore(model))

    def _lister(self, uri: str) -> Callable[[], Sequence[Listed]]:
        return lambda: list_files(folder_of(uri, self._roots))

    async def _restore(self, model: Model) -> None:
        """Read an attested model again; where its files are what they were, its manifest is what it was."""
        try:
            async with self._slots:
                listed = await asyncio.to_thread(self._lister(model.uri))
                entries = await asyncio.to_thread(hash_files, listed, self._stop)
            if manifest_digest(entries) == model.manifest_digest:
                await asyncio.to_thread(self._blobs.put, entries)
                return
            why = "its files are not what they were"
        except FalError as error:
            why = str(error)
        _log.error("manifest_not_restored", model=model.id, digest=model.manifest_digest, message=why)

    def _begin(self, id_: str, files: Callable[[], Sequence[Listed]]) -> asyncio.Task[None] | None:
        model = self._engine.view.models.get(id_)
        if model is None or model.state is not ModelState.REGISTERED:
            return None
        running = self._tasks.get(id_)
        if running is not None:
            return running
        return self._start(id_, self._attest(id_, files))

    def _start(self, id_: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[id_] = task
        task.add_done_callback(lambda _: self._tasks.pop(id_, None))
        return task

    async def _attest(self, id_: str, files: Callable[[], Sequence[Listed]]) -> None:
        """Hash, write the manifest, attest; what is wrong with the content refuses the model."""
        try:
            async with self._slots:
                listed = await asyncio.to_thread(files)
                entries = await asyncio.to_thread(hash_files, listed, self._stop)
            digest = await asyncio.to_thread(self._blobs.put, entries)
            size = sum(x.size_bytes for x in entries)
            await self._engine.submit(AttestModel(id_, digest, size, len(entries)))
        except FalError as error:
            if error.code in (Code.INVALID, Code.CONFLICT):
                await self._refuse(id_, error)
            elif error.code is not Code.CANCELLED:
                _log.error("model_not_attested", model=id_, code=str(error.code), message=str(error))

    async def _refuse(self, id_: str, why: FalError) -> None:
        try:
            await self._engine.submit(RefuseModel(id_, str(why)))
        except FalError as error:  # a new leader tries again
            _log.error("model_not_refused", model=id_, code=str(error.code), message=str(error))

    @property
    def idle(self) -> bool:
        """Whether nothing is being hashed."""
        return not self._tasks

    async def close(self) -> None:
        """Stop hashing; a new leader goes on."""
        self._stop.set()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["ModelRegistrar"]
