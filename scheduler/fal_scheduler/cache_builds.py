"""Takes what build tasks left: checks it, signs it, keeps its manifest, and then lets the store name it. One leader's.

The agent tells the manifest of what its cache took in with the end of the runner (`RunnerStatus.output`). Only a runner
that this scheduler made as a build task is listened to, which the core checks again. Signed are the manifest, as of any
artifact, and (namespace, key, manifest digest). A new leader is told of the same end again with the node's Hello.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from google.protobuf.message import DecodeError

from fal_contract.artifact import Artifact, attestation_text, cache_entry_text, from_manifest, listing_id
from fal_contract.cache_key import OUTPUT_URI, entry_model
from fal_contract.errors import Code, FalError
from fal_contract.limits import BUILD_MANIFEST_BYTES_MAX
from fal_contract.telemetry import get_logger
from fal_contract.v1 import state_pb2
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.build_events import BuildEnded, FailBuild, PutCacheEntry, TrimCache
from fal_scheduler.core.events import Effect
from fal_scheduler.core.records import BuildTask, CacheEntry, Model, ModelState, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk

AGAIN_S: Final = 1.0  # after an error of the store
TRIES_MAX: Final = 30
_PASSING: Final = frozenset({Code.STORE_FAILED, Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE})
_log = get_logger("scheduler.builds")


class CacheBuilds:
    """Outputs of build tasks of one leader. `close` ends what is under way; a new leader hears of it again."""

    def __init__(self, engine: EnginePort, desk: ManifestDesk, ca: CertificateAuthority) -> None:
        self._engine = engine
        self._desk = desk
        self._ca = ca
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unsubscribe = engine.subscribe(self._on_effect)

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, BuildEnded) and effect.runner_id not in self._tasks:
            task = asyncio.create_task(self._settle(effect.runner_id), name=f"build {effect.runner_id}")
            self._tasks[effect.runner_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(effect.runner_id, None))

    async def _settle(self, runner_id: str) -> None:
        for _ in range(TRIES_MAX):
            try:
                await self._once(runner_id)
                return
            except FalError as error:
                if error.code not in _PASSING:
                    _log.error("build_not_settled", runner=runner_id, code=str(error.code), message=str(error))
                    return
            await asyncio.sleep(AGAIN_S)

    async def _once(self, runner_id: str) -> None:
        state = self._engine.view
        runner = state.runners.get(runner_id)
        task = state.catalog.builds.get(runner.app) if runner is not None else None
        status = state.status_of(runner) if runner is not None else None
        if runner is None or task is None or status is None or task.image:
            return  # stopped meanwhile, or an image (`image_packs`)
        try:
            artifact = output_of(status.output, task)
            await self._take(runner, task, artifact)
        except FalError as error:
            if error.code in _PASSING:
                raise
            if error.code is not Code.FAILED_PRECONDITION:  # the core knows no such task any more
                await self._engine.submit(FailBuild(runner_id, f"its output was refused: {error}", refused=True))

    async def _take(self, runner: Runner, task: BuildTask, artifact: Artifact) -> None:
        signed = replace(artifact, signature=self._ca.sign(attestation_text(artifact)))
        entry = CacheEntry(
            namespace=task.namespace,
            key=task.key,
            model=entry_model(task.namespace, task.key),
            manifest_digest=signed.manifest_digest,
            bytes=signed.bytes_total,
            task=runner.id,
            signature=self._ca.sign(cache_entry_text(task.namespace, task.key, signed.manifest_digest)),
            facts=task.facts,
        )
        model = Model(
            id=entry.model,
            kind="cache",
            uri=signed.uri,
            state=ModelState.ATTESTED,
            manifest_digest=signed.manifest_digest,
            bytes=signed.bytes_total,
            files=len(signed.files),
            artifact_id=signed.id,
            resolved_uri=signed.uri,
            attestation="build",
            attested_by=runner.node,
        )
        while (await self._engine.submit(TrimCache(task.namespace, signed.bytes_total))).outcome == "more":
            pass
        await asyncio.to_thread(self._desk.keep, signed)
        self._desk.kept(signed.id)
        await self._engine.submit(PutCacheEntry(entry, model, runner.id))

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


def output_of(raw: bytes, task: BuildTask) -> Artifact:
    """The artifact that a node tells of. INVALID naming the field for anything that no build may leave."""
    if len(raw) > BUILD_MANIFEST_BYTES_MAX:
        raise _bad(f"its manifest has {len(raw)} bytes, at most {BUILD_MANIFEST_BYTES_MAX} are taken")
    try:
        artifact = from_manifest(state_pb2.ModelManifest.FromString(raw))
    except DecodeError:
        raise _bad("its manifest cannot be read") from None
    if artifact.kind != "cache":
        raise _bad(f"it is a {artifact.kind}, not a cache")
    if artifact.signature or not artifact.attested or not artifact.files:
        raise _bad("a node signs nothing, and tells every digest of at least one file")
    if artifact.id != listing_id(artifact.uri, artifact.files) or artifact.uri != OUTPUT_URI:
        raise _bad("its id does not follow from its files")
    if artifact.bytes_total > task.bytes_max:
        raise _bad(f"it has {artifact.bytes_total} bytes, at most {task.bytes_max} are allowed")
    return artifact


def _bad(why: str) -> FalError:
    return FalError(Code.INVALID, why, remedy="Look at the build's command.", field="output")


__all__ = ["CacheBuilds", "output_of"]
