"""Takes what pack tasks left: fetches the manifest, checks and signs it, lets the store name the image. One leader's.

A runner's end tells names, sizes, SHA-256 and what the packer says of the image; the digests of the pieces, some MiB of
a large image, are asked of the same node's cache, and must belong to what the end told. From then on the image is an
artifact like any other, and two nodes are wished it. A new leader is told of the same end again with the node's Hello.
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
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.codec_weights import image_from_pb
from fal_scheduler.core.build_events import BuildEnded, FailBuild
from fal_scheduler.core.events import Effect
from fal_scheduler.core.pack_events import PutImage
from fal_scheduler.core.records import BuildTask, ImageFacts, Model, ModelState, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk

AGAIN_S: Final = 1.0
TRIES_MAX: Final = 60  # the cache of a node may be away for a moment
ANSWER_TIMEOUT_S: Final = 15.0
FORMATS: Final = ("erofs", "squashfs")
_PASSING: Final = frozenset({Code.STORE_FAILED, Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE})
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_log = get_logger("scheduler.images")


class Caches(Protocol):
    """Nodes' caches, as far as manifests go (`cache_sessions.CacheSessions`)."""

    def ask_manifest(self, node_id: str, artifact_id: str) -> bool:
        """Ask one node; False where it has no session."""
        ...

    on_manifest: Callable[[str, state_pb2.ModelManifest], bool]  # node; True: it was waited for


class ImagePacks:
    """Outputs of pack tasks of one leader. `close` ends what is under way; a new leader hears of it again."""

    def __init__(self, engine: EnginePort, desk: ManifestDesk, ca: CertificateAuthority, caches: Caches) -> None:
        self._engine = engine
        self._desk = desk
        self._ca = ca
        self._caches = caches
        caches.on_manifest = self._told
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._awaited: dict[tuple[str, str], asyncio.Future[state_pb2.ModelManifest]] = {}  # node, artifact
        self._unsubscribe = engine.subscribe(self._on_effect)

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, BuildEnded) and effect.runner_id not in self._tasks:
            task = asyncio.create_task(self._settle(effect.runner_id), name=f"image of {effect.runner_id}")
            self._tasks[effect.runner_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(effect.runner_id, None))

    def _told(self, node_id: str, manifest: state_pb2.ModelManifest) -> bool:
        waiting = self._awaited.get((node_id, manifest.artifact_id))
        if waiting is None:
            return False
        if not waiting.done():
            waiting.set_result(manifest)
        return True

    async def _settle(self, runner_id: str) -> None:
        for left in reversed(range(TRIES_MAX)):
            try:
                await self._once(runner_id, last=left == 0)
                return
            except FalError as error:
                if error.code not in _PASSING:
                    _log.error("image_not_settled", runner=runner_id, code=str(error.code), message=str(error))
                    return
            await asyncio.sleep(AGAIN_S)

    async def _once(self, runner_id: str, *, last: bool) -> None:
        state = self._engine.view
        runner = state.runners.get(runner_id)
        task = state.catalog.builds.get(runner.app) if runner is not None else None
        status = state.status_of(runner) if runner is not None else None
        if runner is None or task is None or status is None or not task.image:
            return  # stopped meanwhile, or an entry of the compile cache
        try:
            listing, facts = output_of(status.output, task)
            artifact = await self._content(runner.node, listing)
            await self._take(runner, task, artifact, facts)
        except FalError as error:
            if error.code in _PASSING and not last:
                raise
            if error.code is not Code.FAILED_PRECONDITION:  # the core knows no such task any more
                await self._engine.submit(FailBuild(runner_id, f"its output was refused: {error}", refused=True))

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

    async def _take(self, runner: Runner, task: BuildTask, artifact: Artifact, facts: ImageFacts) -> None:
        signed = replace(artifact, signature=self._ca.sign(attestation_text(artifact)))
        model = Model(
            id=task.image,
            kind="image",
            uri=task.source,
            state=ModelState.ATTESTED,
            manifest_digest=signed.manifest_digest,
            bytes=signed.bytes_total,
            files=len(signed.files),
            artifact_id=signed.id,
            resolved_uri=signed.uri,
            attestation="pack",
            attested_by=runner.node,
            image=facts,
        )
        await asyncio.to_thread(self._desk.keep, signed)
        self._desk.kept(signed.id)
        await self._engine.submit(PutImage(model, runner.id))

    @property
    def idle(self) -> bool:
        """Whether no output is being taken."""
        return not self._tasks

    async def close(self) -> None:
        """End."""
        self._unsubscribe()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
