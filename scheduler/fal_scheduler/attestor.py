"""Turns what nodes tell of a model's content into its attestation, or its refusal. An edge of one leader.

Claims are kept in memory, bounded, until the model is settled; a new leader knows those that are told to it again. The
examination runs in a thread. An attestation is signed with the CA's key, written, and only then named by the store.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from fal_contract.artifact import Artifact, attestation_text
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.limits import CLAIMS_BYTES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import weights_pb2
from fal_scheduler.attestation import ClaimBook, Mismatch, examine
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.events import Logged
from fal_scheduler.core.model_events import AttestModel, RefuseModel
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk

_log = get_logger("scheduler.attestor")
EXAMINED_AT_ONCE_MAX: Final = 2
SUBMITS_MAX: Final = 5
SUBMIT_AGAIN_S: Final = 1.0


class Attestor:
    """Claims and attestations of one leader. `spawn` runs a coroutine as a task that somebody owns."""

    def __init__(
        self,
        engine: EnginePort,
        desk: ManifestDesk,
        ca: CertificateAuthority,
        *,
        clock: Clock,
        note: Callable[[Logged], None],
        spawn: Callable[[str, Coroutine[Any, Any, None]], object],
    ) -> None:
        self._engine = engine
        self._desk = desk
        self._ca = ca
        self._clock = clock
        self._note = note
        self._spawn = spawn
        self._books: OrderedDict[str, ClaimBook] = OrderedDict()
        self._slots = asyncio.Semaphore(EXAMINED_AT_ONCE_MAX)
        self._examined: set[str] = set()  # artifacts under examination: the first message counts

    # --- what nodes tell --------------------------------------------------------------------------------------------

    def on_claims(self, node_id: str, claims: weights_pb2.PieceClaims) -> None:
        """A node read these pieces from the origin. Claims signed by others are theirs to tell, and left out."""
        models = self._registered(claims.artifact_id)
        if not models:
            return
        try:
            book = self._book(claims.artifact_id)
            for claim in claims.claims:
                if claim.signer != node_id:
                    continue
                dispute = book.add(claim.piece, claim.blake3, node_id)
                if dispute is not None:
                    text = f"piece {dispute.piece} of {models[0].id} was read differently by {dispute.first}"
                    self._say("CLAIMS_DIFFER", node_id, text)
        except FalError as error:
            self._say("BAD_CLAIM", node_id, f"claims about {models[0].id}: {error}")

    def on_attestation(self, node_id: str, told: weights_pb2.Attestation) -> None:
        """A node holds all of an artifact and tells its digests, or what is wrong with it. Returns at once."""
        artifact_id = told.artifact_id
        if artifact_id in self._examined:
            return
        if self._registered(artifact_id) or self._unsigned(artifact_id):
            self._examined.add(artifact_id)
            self._spawn(f"attest {artifact_id}", self._examine(node_id, told))

    def _registered(self, artifact_id: str) -> list[Model]:
        models = self._engine.view.catalog.named_by(artifact_id)
        return [model for model in models if model.state is ModelState.REGISTERED]

    def _unsigned(self, artifact_id: str) -> bool:
        """Whether it is attested, yet its digests of pieces are not known here: a record of the first release."""
        models = self._engine.view.catalog.named_by(artifact_id)
        if not any(model.state is ModelState.ATTESTED for model in models):
            return False
        try:
            return not self._desk.artifact_of(artifact_id).attested
        except FalError:
            return False

    def _book(self, artifact_id: str) -> ClaimBook:
        """Raises NOT_FOUND or CORRUPT while the listing is not here."""
        book = self._books.get(artifact_id)
        if book is None:
            book = self._books[artifact_id] = ClaimBook(len(self._desk.artifact_of(artifact_id).layout))
            while len(self._books) > 1 and sum(x.size_bytes for x in self._books.values()) > CLAIMS_BYTES_MAX:
                self._books.popitem(last=False)
        self._books.move_to_end(artifact_id)
        return book

    # --- what becomes of it -----------------------------------------------------------------------------------------

    async def _examine(self, node_id: str, told: weights_pb2.Attestation) -> None:
        artifact_id = told.artifact_id
        try:
            listing = self._desk.artifact_of(artifact_id)
            book = self._book(artifact_id).copy()
            async with self._slots:
                found = await asyncio.to_thread(examine, listing, told, book, told_by=node_id, name_of=self._name_of)
            if isinstance(found, Mismatch):
                await self.refuse(artifact_id, found.reason)
            else:
                # Whatever one node says: every other one holds its own bytes against what the origin published.
                found = replace(found, published=any(file.sha256 for file in listing.files))
                everything = all(file.sha256 for file in listing.files)
                await self.settle(found, "digests" if everything else "version", node_id)
        except FalError as error:
            kind = "BAD_ATTESTATION" if error.code is Code.INVALID else "ATTESTATION_LATE"
            self._say(kind, node_id, f"attestation of artifact {artifact_id[:12]}: {error}")
        finally:
            self._examined.discard(artifact_id)

    async def settle(self, artifact: Artifact, attestation: str, told_by: str) -> None:
        """Sign an artifact whose digests are known, keep its manifest, attest every model that names it.

        Content that was withdrawn under another name is refused. Raises a store error.
        """
        withdrawn = self.withdrawn_twin(artifact)
        if withdrawn:
            await self.refuse(artifact.id, withdrawn)
            return
        signed = self.signed(artifact)
        await asyncio.to_thread(self._desk.keep, signed)
        self._desk.kept(artifact.id)
        for model in self._registered(artifact.id):
            event = AttestModel(
                model.id,
                signed.manifest_digest,
                signed.bytes_total,
                len(signed.files),
                attestation=attestation,
                attested_by=told_by,
            )
            await self._submit(event)
        self._books.pop(artifact.id, None)

    async def _submit(self, event: AttestModel | RefuseModel) -> None:
        """Do it, again where the store failed for a moment: nobody would tell it a second time."""
        for left in reversed(range(SUBMITS_MAX)):
            try:
                await self._engine.submit(event)
                return
            except FalError as error:
                if error.code is not Code.STORE_FAILED or not left:
                    raise
            await asyncio.sleep(SUBMIT_AGAIN_S)

    def signed(self, artifact: Artifact) -> Artifact:
        """With the CA's signature."""
        return replace(artifact, signature=self._ca.sign(attestation_text(artifact)))

    def withdrawn_twin(self, artifact: Artifact) -> str:
        """Why this content may not be used at all: every model that has it is revoked. Empty: it may."""
        state = self._engine.view
        twins = [state.models[id_] for id_ in state.models_by_digest.get(artifact.manifest_digest, ())]
        if twins and all(model.state is ModelState.REVOKED for model in twins):
            return f"the same content was withdrawn as {twins[-1].id}: {twins[-1].reason}"
        return ""

    async def refuse(self, artifact_id: str, reason: str) -> None:
        """Refuse every model that waits for this artifact's content."""
        for model in self._registered(artifact_id):
            await self._submit(RefuseModel(model.id, reason))
        self._books.pop(artifact_id, None)

    def _name_of(self, node_id: str) -> str:
        node = self._engine.view.nodes.get(node_id)
        return f"{node.name} ({node_id})" if node is not None else node_id

    def _say(self, kind: str, node_id: str, message: str) -> None:
        self._note(Logged(kind, node_id, message, self._clock.wall_s(), f"node/{node_id}"))


__all__ = ["Attestor"]
