"""Registering models: listed at once, attested when every digest is known. An edge of one leader.

A model is REGISTERED with names, sizes and what the origin calls each file's version, so that apps can be applied and
nodes begin to stage. A `file://` folder is then hashed here, in a thread; everything else is read by nodes, which tell
the digests (`attestor`). A moving name (branch) is resolved to a commit once, by the listing; what is stored is what it
meant. A new leader goes on with what the last one did not finish, completes records of the first release, and reads a
folder again, or asks the nodes, where a manifest lay on the last leader's disk only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from fal_contract.artifact import Artifact, ArtifactFile
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import check_customer, check_name
from fal_contract.limits import LISTING_TIMEOUT_S, LISTINGS_AT_ONCE_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2, weights_pb2
from fal_scheduler.attestor import Attestor
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.events import Logged
from fal_scheduler.core.model_events import AddModel, IdentifyModel
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk
from fal_scheduler.registry import Listed, folder_listing, folder_of, hash_files, list_files, listing_of

KINDS: Final = ("model", "lora", "image")
HASHED_AT_ONCE_MAX: Final = 2
ATTEST_WAIT_S: Final = 3.0  # small models are attested before AddModel answers
_log = get_logger("scheduler.models")


class OriginListing(Protocol):
    """What an origin said (`fal_fsd.origin.Listing`)."""

    @property
    def uri(self) -> str: ...
    @property
    def files(self) -> tuple[ArtifactFile, ...]: ...


_Listing = tuple[Artifact, Sequence[Listed]]  # of a folder
Lister = Callable[[str, str, bool], Awaitable[OriginListing]]  # URI, revision, allow pickles


def origin_lister(credentials_file: Path | None) -> Lister:
    """Lists origins with the credentials of a file and of the environment; both are read anew at each call."""

    async def list_uri(uri: str, revision: str, allow_pickle: bool) -> OriginListing:
        from fal_fsd.origin import Credentials, list_origin

        credentials = await asyncio.to_thread(Credentials.load, credentials_file, os.environ)
        return await list_origin(
            uri, revision=revision, credentials=credentials, allow_pickle=allow_pickle, timeout_s=LISTING_TIMEOUT_S
        )

    return list_uri


class ModelRegistrar:
    """Registrations of one leader. `roots`: folders below which models may lie; none: anywhere.

    Others hang in: `want_manifest` asks the nodes for a manifest, `counts` tells how many nodes have an artifact and
    how many are bringing it, `wished_nodes` names the nodes that a model's wishes mean.
    """

    def __init__(
        self,
        engine: EnginePort,
        blobs: ManifestBlobs,
        ca: CertificateAuthority,
        *,
        clock: Clock,
        note: Callable[[Logged], None],
        roots: Sequence[Path] = (),
        lister: Lister | None = None,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._roots = tuple(roots)
        self._lister = lister or origin_lister(None)
        self._hashing = asyncio.Semaphore(HASHED_AT_ONCE_MAX)
        self._listing = asyncio.Semaphore(LISTINGS_AT_ONCE_MAX)
        self._stop = Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.desk = ManifestDesk(engine, blobs, ca)
        self._attestor = Attestor(engine, self.desk, ca, clock=clock, note=note, spawn=self._start)
        self.counts: Callable[[str], tuple[int, int]] = lambda artifact_id: (0, 0)
        self.wished_nodes: Callable[[str], Sequence[str]] | None = None

    # --- what nodes tell and ask ------------------------------------------------------------------------------------

    def on_claims(self, node_id: str, claims: weights_pb2.PieceClaims) -> None:
        """See `Attestor.on_claims`."""
        self._attestor.on_claims(node_id, claims)

    def on_attestation(self, node_id: str, told: weights_pb2.Attestation) -> None:
        """See `Attestor.on_attestation`."""
        self._attestor.on_attestation(node_id, told)

    def manifest_of(self, id_: str) -> state_pb2.ModelManifest:
        """See `ManifestDesk.manifest_of`."""
        return self.desk.manifest_of(id_)

    def offer_manifest(self, message: state_pb2.ModelManifest) -> bool:
        """See `ManifestDesk.offer`."""
        return self.desk.offer(message)

    @property
    def want_manifest(self) -> Callable[[str], None]:
        """Asks the nodes for a manifest, by artifact id."""
        return self.desk.want_manifest

    @want_manifest.setter
    def want_manifest(self, ask: Callable[[str], None]) -> None:
        self.desk.want_manifest = ask
        for artifact_id in self.wanted:
            ask(artifact_id)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Artifact ids whose manifests are missing here: ask a node that says Hello with one of them."""
        return tuple(self.desk.wanted)

    # --- uploads (`pushes`) -----------------------------------------------------------------------------------------

    def withdrawn_twin(self, artifact: Artifact) -> str:
        """See `Attestor.withdrawn_twin`."""
        return self._attestor.withdrawn_twin(artifact)

    async def keep_pushed(self, artifact: Artifact) -> None:
        """Sign and write what an operator hashed, unless it is here: nodes check what they take by it."""
        if not self._blobs.has(artifact.id):
            await asyncio.to_thread(self.desk.keep, self._attestor.signed(artifact))
            self.desk.kept(artifact.id)

    async def attest_pushed(self, artifact: Artifact, actor: str) -> None:
        """A node has all of it, checked by these digests. Raises a store error."""
        await self._attestor.settle(artifact, "push", actor)

    # --- registering ------------------------------------------------------------------------------------------------

    async def add(
        self, id_: str, uri: str, *, kind: str, revision: str, actor: str, allow_pickle: bool = False
    ) -> None:
        """Register. A folder is attested when this returns, or goes on after 3 s; others are when a node has all of it.

        Raises INVALID, ALREADY_EXISTS, FAILED_PRECONDITION (withdrawn), and what the origin's listing raises.
        """
        team, slash, name = id_.partition("/")
        check_name(team, field="id")
        check_name(name if slash else "", field="id")
        check_customer(id_, field="id")
        kind = kind or "model"
        if kind not in KINDS:
            raise invalid("kind", kind, "is no kind", remedy=f"Use one of {', '.join(KINDS)}.")
        if uri.startswith("push:"):
            raise invalid("uri", "push://…", "has no origin to list", remedy="Use `falctl weights push DIR NAME`.")
        if urlsplit(uri).scheme in ("", "file"):
            await self._add_folder(id_, uri, kind, revision, actor, allow_pickle)
            return
        async with self._listing:
            listing = await self._lister(uri, revision, allow_pickle)
        artifact = listing_of(listing.uri, kind, listing.files)
        self._check_layout(artifact)
        known = self._engine.view.models_by_artifact.get(artifact.id)
        if not known or not self._blobs.has(artifact.id):
            await asyncio.to_thread(self.desk.keep, artifact)
        model = _record(id_, uri, artifact, revision, allow_pickle)
        await self._engine.submit(AddModel(model, actor))
        await self._attest_as_twin(artifact.id)

    async def _add_folder(self, id_: str, uri: str, kind: str, revision: str, actor: str, allow_pickle: bool) -> None:
        if revision:
            raise invalid("revision", revision, "has no meaning for a folder", remedy="Leave it out with file://.")
        folder = await asyncio.to_thread(folder_of, uri, self._roots)
        listed = await asyncio.to_thread(list_files, folder, allow_pickle=allow_pickle)
        artifact = folder_listing(folder.as_uri(), kind, listed)
        self._check_layout(artifact)
        await self._same_content(id_, artifact, listed)
        model = _record(id_, uri, artifact, "", allow_pickle)
        await self._engine.submit(AddModel(model, actor))
        if self._engine.view.models[id_].artifact_id != artifact.id:
            return  # the same bytes under other change times: what was registered first stands
        task = self._begin(id_, (artifact, listed))
        if task is not None:
            await asyncio.wait({task}, timeout=ATTEST_WAIT_S)

    def _check_layout(self, artifact: Artifact) -> None:
        """One artifact is cut into pieces in one way, whatever it is registered as."""
        state = self._engine.view
        for model in state.catalog.named_by(artifact.id):
            if (model.kind == "image") != (artifact.kind == "image"):
                raise FalError(
                    Code.ALREADY_EXISTS,
                    f"kind = {artifact.kind!r} does not go with model {model.id!r}, a {model.kind} of the same files",
                    remedy="Register it with the same kind.",
                    field="kind",
                )

    async def _same_content(self, id_: str, artifact: Artifact, listed: Sequence[Listed]) -> None:
        """A second registration of a name must bring the same files; the record alone cannot tell."""
        known = self._engine.view.models.get(id_)
        if known is None or known.state is not ModelState.ATTESTED:
            return
        same = (known.bytes, known.files) == (artifact.bytes_total, len(listed))
        if same:
            async with self._hashing:
                found = await asyncio.to_thread(hash_files, artifact, listed, self._stop)
            same = found.manifest_digest == known.manifest_digest
        if not same:
            raise FalError(
                Code.ALREADY_EXISTS,
                f"model {id_!r} exists with other content (from {known.uri})",
                remedy="Use another name; a model's content never changes.",
                field="id",
            )

    async def _attest_as_twin(self, artifact_id: str) -> None:
        """A model of an artifact that is attested under another name needs nobody to read it again."""
        models = self._engine.view.catalog.named_by(artifact_id)
        first = next((model for model in models if model.state is ModelState.ATTESTED), None)
        if first is None or all(model.state is not ModelState.REGISTERED for model in models):
            return
        try:
            artifact = self.desk.artifact_of(artifact_id)
        except FalError as error:
            _log.warning("twin_not_attested", artifact=artifact_id[:12], message=str(error))
            return
        if artifact.attested:
            await self._attestor.settle(artifact, first.attestation, first.attested_by)

    # --- folders ----------------------------------------------------------------------------------------------------

    def _begin(self, id_: str, listing: _Listing | None = None) -> asyncio.Task[None] | None:
        """Hash a registered folder; `listing` where it is listed already."""
        model = self._engine.view.models.get(id_)
        if model is None or model.state is not ModelState.REGISTERED:
            return None
        running = self._tasks.get(model.artifact_id)
        if running is not None:
            return running
        if listing is not None:
            self.desk.pending[model.artifact_id] = listing[0]
        return self._start(model.artifact_id, self._attest(model, listing))

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))
        return task

    async def _attest(self, model: Model, listing: _Listing | None) -> None:
        """Hash, sign, write, attest; what is wrong with the content refuses the model."""
        artifact_id = model.artifact_id
        try:
            async with self._hashing:
                if listing is None:
                    listing = await asyncio.to_thread(self._list_again, model)
                artifact, listed = listing
                if artifact.id != artifact_id:
                    raise _changed_meanwhile(model)
                self.desk.pending[artifact_id] = artifact
                found = await asyncio.to_thread(hash_files, artifact, listed, self._stop)
            await self._attestor.settle(found, "read", "scheduler")
        except FalError as error:
            if error.code in (Code.INVALID, Code.CONFLICT):
                await self._refuse(model, error)
            elif error.code is not Code.CANCELLED:
                _log.error("model_not_attested", model=model.id, code=str(error.code), message=str(error))
        finally:
            self.desk.pending.pop(artifact_id, None)

    async def _refuse(self, model: Model, why: FalError) -> None:
        try:
            await self._attestor.refuse(model.artifact_id, str(why))
        except FalError as error:  # a new leader tries again
            _log.error("model_not_refused", model=model.id, code=str(error.code), message=str(error))

    def _list_again(self, model: Model) -> _Listing:
        """The folder as it is now. Blocks on the disk."""
        listed = list_files(folder_of(model.resolved_uri or model.uri, self._roots), allow_pickle=model.allow_pickle)
        return folder_listing(model.resolved_uri or model.uri, model.kind, listed), listed

    # --- a new leader -----------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on with models that the last leader did not settle; bring back manifests that only its disk had."""
        self._start("resume", self._resume())

    async def _resume(self) -> None:
        here = await asyncio.to_thread(self._blobs.names)
        for number, model in enumerate(list(self._engine.view.models.values())):
            if number % 1000 == 999:
                await asyncio.sleep(0)  # there may be 100,000
            if model.withdrawn:
                continue
            folder, pushed = model.uri.startswith("file:"), model.uri.startswith("push:")
            if not model.artifact_id:
                self._start(model.id, self._complete(model))
            elif model.state is ModelState.REGISTERED and folder:
                self._begin(model.id)
            elif model.artifact_id in here:
                continue
            elif folder:
                self._start(model.id, self._restore(model))
            elif model.state is ModelState.REGISTERED and not pushed:
                self._start(model.id, self._relist(model))
            else:
                self.desk.want(model.artifact_id)

    async def _complete(self, model: Model) -> None:
        """A record of the first release: give it an artifact id, which follows from its content."""
        try:
            if model.state is ModelState.ATTESTED:
                artifact = await self._first_release(model)
                await asyncio.to_thread(self.desk.keep, artifact)
            else:
                async with self._hashing:
                    artifact, _ = await asyncio.to_thread(self._list_again, model)
            await self._engine.submit(IdentifyModel(model.id, artifact.id, artifact.uri))
            completed = self._engine.view.models[model.id]
            if completed.state is ModelState.REGISTERED:
                self._begin(model.id)
            else:
                await self._restore(completed)
        except FalError as error:
            _log.error("model_not_completed", model=model.id, message=str(error))

    async def _first_release(self, model: Model) -> Artifact:
        """Its listing, with SHA-256 in the place of versions: from its manifest, else from the folder."""
        try:
            entries = await asyncio.to_thread(self._blobs.legacy, model.manifest_digest)
            files = [ArtifactFile(x.path, x.size_bytes, "", x.sha256) for x in entries]
        except FalError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            async with self._hashing:
                artifact, listed = await asyncio.to_thread(self._list_again, model)
                found = await asyncio.to_thread(hash_files, artifact, listed, self._stop)
            if found.manifest_digest != model.manifest_digest:
                raise _changed_meanwhile(model) from None
            files = [ArtifactFile(x.path, x.size_bytes, "", x.sha256) for x in found.files]
        return listing_of(model.uri, model.kind, files)

    async def _restore(self, model: Model) -> None:
        """Read an attested folder again; where its files are what they were, its manifest is what it was."""
        try:
            async with self._hashing:
                artifact, listed = await asyncio.to_thread(self._list_again, model)
                found = await asyncio.to_thread(hash_files, artifact, listed, self._stop)
            if found.manifest_digest == model.manifest_digest:
                signed = self._attestor.signed(_renamed(found, model))
                await asyncio.to_thread(self.desk.keep, signed)
                self.desk.kept(model.artifact_id)
                return
            why = "its files are not what they were"
        except FalError as error:
            why = str(error)
        _log.warning("manifest_not_restored", model=model.id, digest=model.manifest_digest, message=why)
        if not self._blobs.has(model.artifact_id):
            self.desk.want(model.artifact_id)

    async def _relist(self, model: Model) -> None:
        """Ask the origin again for a listing that the disk has lost; where it says something else, ask the nodes."""
        try:
            async with self._listing:
                listing = await self._lister(model.resolved_uri, "", model.allow_pickle)
            artifact = listing_of(model.resolved_uri, model.kind, listing.files)
            if artifact.id == model.artifact_id:
                await asyncio.to_thread(self.desk.keep, artifact)
                self.desk.kept(artifact.id)
                return
        except FalError as error:
            _log.warning("listing_not_restored", model=model.id, message=str(error))
        self.desk.want(model.artifact_id)

    # --- the end ----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is being listed, hashed or examined."""
        return not self._tasks

    async def close(self) -> None:
        """Stop; a new leader goes on."""
        self._stop.set()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _record(id_: str, uri: str, artifact: Artifact, revision: str, allow_pickle: bool) -> Model:
    return Model(
        id=id_,
        kind=artifact.kind,
        uri=uri,
        bytes=artifact.bytes_total,
        files=len(artifact.files),
        revision=revision,
        artifact_id=artifact.id,
        resolved_uri=uri if artifact.uri == uri else artifact.uri,
        allow_pickle=allow_pickle,
    )


def _renamed(artifact: Artifact, model: Model) -> Artifact:
    """The same content under the id that it was registered with: change times are not content."""
    return Artifact(
        model.artifact_id, artifact.kind, artifact.uri, artifact.piece_bytes, artifact.files, artifact.hashes
    )


def _changed_meanwhile(model: Model) -> FalError:
    return FalError(
        Code.CONFLICT,
        f"the folder of model {model.id} changed while it was registered",
        remedy="Register the model again once its files are complete.",
    )


__all__ = ["KINDS", "Lister", "ModelRegistrar", "origin_lister"]
