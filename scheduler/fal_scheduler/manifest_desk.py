"""Gives out manifests by artifact id or digest, and takes back those that this scheduler's disk has lost.

What the store knows and the disk does not (a new leader on another machine) is wanted: whoever speaks with the nodes'
caches sets `want_manifest` and asks them, `offer` takes the answer when it proves itself: a listing by its hash, the
rest by the CA's signature. An edge of one leader; blocks on small files only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fal_contract.artifact import Artifact, from_manifest, to_manifest
from fal_contract.errors import FalError, not_found
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2
from fal_scheduler.blobs import ManifestBlobs, check_manifest
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.engine_port import EnginePort

WANTED_MAX: Final = 4096
_log = get_logger("scheduler.manifests")


class ManifestDesk:
    """Manifests of one leader. `pending`: listings that are not written yet, of folders that are being hashed."""

    def __init__(self, engine: EnginePort, blobs: ManifestBlobs, ca: CertificateAuthority) -> None:
        self._engine = engine
        self._blobs = blobs
        self._ca = ca
        self.pending: dict[str, Artifact] = {}
        self.wanted: dict[str, None] = {}  # artifact ids, in order
        self.want_manifest: Callable[[str], None] = lambda artifact_id: None

    def model_of(self, id_: str) -> Model:
        """The model that an artifact id or a manifest digest names; the one that is furthest, where several do.

        Raises NOT_FOUND.
        """
        state = self._engine.view
        ids = state.models_by_artifact.get(id_) or state.models_by_digest.get(id_) or ()
        models = [state.models[one] for one in ids]
        if not models:
            raise not_found("artifact", id_[:64], remedy="Register the model with `falctl weights add`.")
        return next((one for one in models if one.state is ModelState.ATTESTED), models[0])

    def manifest_of(self, id_: str) -> state_pb2.ModelManifest:
        """The manifest (a listing while REGISTERED); do not change it. Raises NOT_FOUND or CORRUPT.

        One that is missing or damaged here is asked of the nodes; try again in a second.
        """
        model = self.model_of(id_)
        pending = self.pending.get(model.artifact_id)
        if pending is not None:
            return to_manifest(pending)
        try:
            return self._blobs.get(model.artifact_id)
        except FalError:
            self.want(model.artifact_id)
            raise

    def artifact_of(self, id_: str) -> Artifact:
        """As `manifest_of`, ready to be worked with."""
        model = self.model_of(id_)
        return self.pending.get(model.artifact_id) or from_manifest(self.manifest_of(id_))

    def want(self, artifact_id: str) -> None:
        """Ask the nodes for it; once, until it is there."""
        if artifact_id in self.wanted or len(self.wanted) >= WANTED_MAX:
            return
        self.wanted[artifact_id] = None
        self.want_manifest(artifact_id)

    def offer(self, message: state_pb2.ModelManifest) -> bool:
        """Keep a manifest that a node brings back, if it is missing here and proves itself. True: it was kept.

        Blocks on the disk for one small file.
        """
        try:
            model = self.model_of(message.artifact_id)
            artifact = check_manifest(message, model.artifact_id, self._ca.public_key)
        except FalError as error:
            _log.warning("manifest_not_taken", artifact=message.artifact_id[:64], message=str(error))
            return False
        attested = model.state is ModelState.ATTESTED
        if attested and artifact.attested and artifact.manifest_digest != model.manifest_digest:
            return False
        if self._blobs.has(artifact.id) and (artifact.attested or not attested) and self._whole(artifact):
            return False
        self._blobs.put(artifact)
        if artifact.attested or not attested:
            self.wanted.pop(artifact.id, None)
        _log.info("manifest_taken_back", model=model.id, artifact=artifact.id[:12])
        return True

    def _whole(self, offered: Artifact) -> bool:
        """Whether what is here is as good as what is offered."""
        try:
            return self._blobs.artifact(offered.id).attested or not offered.attested
        except FalError:
            return False

    def keep(self, artifact: Artifact) -> None:
        """Write a manifest that was made here. Blocks: in a thread, then `kept` on the loop."""
        self._blobs.put(artifact)

    def kept(self, artifact_id: str) -> None:
        """It stands in its file now."""
        self.pending.pop(artifact_id, None)
        self.wanted.pop(artifact_id, None)

    def get(self, artifact_id: str) -> state_pb2.ModelManifest:
        """`manifest_of`, for builders of assignments."""
        return self.manifest_of(artifact_id)


__all__ = ["ManifestDesk"]
