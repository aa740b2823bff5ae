"""Takes what pack tasks left: fetches the manifest, checks and signs it, lets the store name the image. One leader's.

A runner's end tells names, sizes, SHA-256 and what the packer says of the image; the digests of the pieces, some MiB of
a large image, are asked of the same node's cache, and must belong to what the end told. From then on the image is an
artifact like any other, and two nodes are wished it. When and how often it is tried: `task_outputs`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from fal_contract.artifact import Artifact, attestation_text, from_manifest, listing_id, signed_by
from fal_contract.cache_key import OUTPUT_URI
from fal_contract.errors import Code, FalError
from fal_contract.limits import BUILD_MANIFEST_BYTES_MAX
from fal_contract.pieces import piece_bytes_of
from fal_contract.v1 import state_pb2
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.codec_weights import image_from_pb
from fal_scheduler.core.pack_events import PutImage
from fal_scheduler.core.records import BuildTask, ImageFacts, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk
from fal_scheduler.task_outputs import TaskOutputs, attested_model

TRIES_MAX: Final = 60  # the cache of a node may be away for a moment
ANSWER_TIMEOUT_S: Final = 15.0
FORMATS: Final = ("erofs", "squashfs")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class Caches(Protocol):
    """Nodes' caches, as far as manifests go (`cache_sessions.CacheSessions`)."""

    def ask_manifest(self, node_id: str, artifact_id: str) -> bool:
        """Ask one node; False where it has no session."""
        ...

    on_manifest: Callable[[str, state_pb2.ModelManifest], bool]  # node; True: it was waited for


class ImagePacks(TaskOutputs):
    """Outputs of pack tasks."""

    def __init__(self, engine: EnginePort, desk: ManifestDesk, ca: CertificateAuthority, caches: Caches) -> None:
        super().__init__(engine, desk, ca, tries_max=TRIES_MAX)
        self._caches = caches
        caches.on_manifest = self._told
        self._awaited: dict[tuple[str, str], asyncio.Future[state_pb2.ModelManifest]] = {}  # node, artifact

    def mine(self, task: BuildTask) -> bool:
        return bool(task.image)

    async def take(self, runner: Runner, task: BuildTask, output: bytes) -> None:
        listing, facts = output_of(output, task)
        artifact = self.signed(await self._content(runner.node, listing))
        model = attested_model(task.image, artifact, uri=task.source, attestation="pack", by=runner.node, image=facts)
        await self.keep(artifact)
        await self._engine.submit(PutImage(model, runner.id))

    def _told(self, node_id: str, manifest: state_pb2.ModelManifest) -> bool:
        waiting = self._awaited.get((node_id, manifest.artifact_id))
        if waiting is None:
            return False
        if not waiting.done():
            waiting.set_result(manifest)
        return True

    async def _content(self, node_id: str, listing: Artifact) -> Artifact:
        """The listing with the digests of its pieces, as the node's cache holds them. UNAVAILABLE, TIMEOUT, INVALID."""
        if not self._caches.ask_manifest(node_id, listing.id):
            what = f"the weight cache of node {node_id} has no session"
            raise FalError(Code.UNAVAILABLE, what, remedy="It is asked again when it is back.")
        key = (node_id, listing.id)
        waiting = self._awaited[key] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                manifest = await waiting
        except TimeoutError:
            what = f"the weight cache of node {node_id} did not tell the image's digests in {ANSWER_TIMEOUT_S:g} s"
            raise FalError(Code.TIMEOUT, what, remedy="It is asked again.") from None
        finally:
            del self._awaited[key]
        artifact = await asyncio.to_thread(from_manifest, manifest)
        unsigned = replace(artifact, signature=b"")  # a cache that had it before tells it as it was signed then
        if not artifact.attested or replace(unsigned, hashes=None) != listing:
            raise _bad("its node's cache holds something else than what its end told")
        if artifact.signature and not signed_by(self._ca.public_key, artifact.signature, attestation_text(artifact)):
            raise _bad("its node's cache tells digests that another cluster has signed")
        return unsigned


def output_of(raw: bytes, task: BuildTask) -> tuple[Artifact, ImageFacts]:
    """The listing that a node tells, with SHA-256 of each file, and what the packer says. INVALID naming the field."""
    if len(raw) > BUILD_MANIFEST_BYTES_MAX:
        raise _bad(f"what its end tells has {len(raw)} bytes, at most {BUILD_MANIFEST_BYTES_MAX} are taken")
    try:
        message = state_pb2.ModelManifest.FromString(raw)
    except DecodeError:
        raise _bad("what its end tells cannot be read") from None
    artifact = from_manifest(message)
    if artifact.kind != "image" or artifact.signature or artifact.attested:
        raise _bad(f"it is a {artifact.kind} of another form, not an image's listing")
    if artifact.uri != OUTPUT_URI or artifact.id != listing_id(artifact.uri, artifact.files):
        raise _bad("its id does not follow from its files")
    if artifact.piece_bytes != piece_bytes_of("image", artifact.bytes_total):
        raise _bad(f"its pieces have {artifact.piece_bytes} bytes")
    if artifact.bytes_total > task.bytes_max:
        raise _bad(f"it has {artifact.bytes_total} bytes, at most {task.bytes_max} are allowed")
    facts = image_from_pb(message.image)
    named = f"image.{facts.format}"
    if facts.format not in FORMATS or [file.path for file in artifact.files] != sorted(["config.json", named]):
        raise _bad("it is not one image file and its config.json")
    if any(len(file.sha256) != 32 for file in artifact.files) or not _DIGEST.fullmatch(facts.digest):
        raise _bad("digests are missing")
    # What the operator asked for stands, whatever the packer says it read.
    return artifact, replace(facts, source=task.source, platform=task.platform, first_pieces=())


def _bad(why: str) -> FalError:
    return FalError(Code.INVALID, why, remedy="Look at the log of the node's agent.", field="output")


__all__ = ["ImagePacks", "output_of"]
