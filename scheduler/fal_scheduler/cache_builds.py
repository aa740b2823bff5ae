"""Takes the entries of the compile cache that build tasks left: checks, signs, keeps, lets the store name them.

The agent tells the manifest of what its cache took in with the end of the runner (`RunnerStatus.output`). Signed are
the manifest, as of any artifact, and (namespace, key, manifest digest). When and how often it is tried: `task_outputs`.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from fal_contract.artifact import Artifact, cache_entry_text, from_manifest, listing_id
from fal_contract.cache_key import OUTPUT_URI, entry_model
from fal_contract.errors import Code, FalError
from fal_contract.limits import BUILD_MANIFEST_BYTES_MAX
from fal_contract.v1 import state_pb2
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.build_events import PutCacheEntry, TrimCache
from fal_scheduler.core.records import BuildTask, CacheEntry, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk
from fal_scheduler.task_outputs import TaskOutputs, attested_model

TRIES_MAX: Final = 30


class CacheBuilds(TaskOutputs):
    """Outputs of build tasks that make entries of the compile cache."""

    def __init__(self, engine: EnginePort, desk: ManifestDesk, ca: CertificateAuthority) -> None:
        super().__init__(engine, desk, ca, tries_max=TRIES_MAX)

    def mine(self, task: BuildTask) -> bool:
        return not task.image

    async def take(self, runner: Runner, task: BuildTask, output: bytes) -> None:
        artifact = self.signed(output_of(output, task))
        entry = CacheEntry(
            namespace=task.namespace,
            key=task.key,
            model=entry_model(task.namespace, task.key),
            manifest_digest=artifact.manifest_digest,
            bytes=artifact.bytes_total,
            task=runner.id,
            signature=self._ca.sign(cache_entry_text(task.namespace, task.key, artifact.manifest_digest)),
            facts=task.facts,
        )
        model = attested_model(entry.model, artifact, uri=artifact.uri, attestation="build", by=runner.node)
        while (await self._engine.submit(TrimCache(task.namespace, artifact.bytes_total))).outcome == "more":
            pass
        await self.keep(artifact)
        await self._engine.submit(PutCacheEntry(entry, model, runner.id))


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
