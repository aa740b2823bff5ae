"""How the output of a build task is settled, whatever it is: told by its runner's end, tried again. One leader's.

Invariant: an output is either taken or its task fails with the reason, within `tries_max` tries; a new leader is told
of the same end again with the node's Hello. Only tasks of this scheduler are listened to, which the core checks again.
What is taken, and how, is said by `cache_builds` (entries of the compile cache) and `image_packs` (images).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final

from fal_contract.artifact import Artifact, attestation_text
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.build_events import BuildEnded, FailBuild
from fal_scheduler.core.events import Effect
from fal_scheduler.core.records import BuildTask, ImageFacts, Model, ModelState, Runner
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.manifest_desk import ManifestDesk

AGAIN_S: Final = 1.0  # after an error of the store, or while a node's cache is away
_PASSING: Final = frozenset({Code.STORE_FAILED, Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE})
_log = get_logger("scheduler.builds")


class TaskOutputs(ABC):
    """Outputs of one kind. `close` ends what is under way."""

    def __init__(self, engine: EnginePort, desk: ManifestDesk, ca: CertificateAuthority, *, tries_max: int) -> None:
        self._engine = engine
        self._desk = desk
        self._ca = ca
        self._tries_max = tries_max
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unsubscribe = engine.subscribe(self._on_effect)

    @abstractmethod
    def mine(self, task: BuildTask) -> bool:
        """Whether the task makes what this object takes."""

    @abstractmethod
    async def take(self, runner: Runner, task: BuildTask, output: bytes) -> None:
        """Check, sign, keep and commit. UNAVAILABLE and the like are tried again, INVALID ends the task."""

    def signed(self, artifact: Artifact) -> Artifact:
        """With the CA's signature over what it is and holds."""
        return replace(artifact, signature=self._ca.sign(attestation_text(artifact)))

    async def keep(self, artifact: Artifact) -> None:
        """Its manifest, beside the store; durable when this returns."""
        await asyncio.to_thread(self._desk.keep, artifact)
        self._desk.kept(artifact.id)

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

    def _on_effect(self, effect: Effect) -> None:
        if not isinstance(effect, BuildEnded) or effect.runner_id in self._tasks:
            return
        task = asyncio.create_task(self._settle(effect.runner_id), name=f"output of {effect.runner_id}")
        self._tasks[effect.runner_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(effect.runner_id, None))

    async def _settle(self, runner_id: str) -> None:
        for left in reversed(range(self._tries_max)):
            try:
                await self._once(runner_id, last=left == 0)
                return
            except FalError as error:
                if error.code not in _PASSING or left == 0:
                    _log.error("output_not_settled", runner=runner_id, code=str(error.code), message=str(error))
                    return
            await asyncio.sleep(AGAIN_S)

    async def _once(self, runner_id: str, *, last: bool) -> None:
        state = self._engine.view
        runner = state.runners.get(runner_id)
        task = state.catalog.builds.get(runner.app) if runner is not None else None
        status = state.status_of(runner) if runner is not None else None
        if runner is None or task is None or status is None or not self.mine(task):
            return  # stopped meanwhile, or for another
        try:
            await self.take(runner, task, status.output)
        except FalError as error:
            if error.code in _PASSING and not last:
                raise
            if error.code is not Code.FAILED_PRECONDITION:  # the core knows no such task any more
                await self._engine.submit(FailBuild(runner_id, f"its output was refused: {error}", refused=True))


def attested_model(
    id: str, signed: Artifact, *, uri: str, attestation: str, by: str, image: ImageFacts | None = None
) -> Model:
    """The record of an artifact whose content the scheduler has signed; `attestation` and `by` say who told it."""
    return Model(
        id=id,
        kind=signed.kind,
        uri=uri,
        state=ModelState.ATTESTED,
        manifest_digest=signed.manifest_digest,
        bytes=signed.bytes_total,
        files=len(signed.files),
        artifact_id=signed.id,
        resolved_uri=signed.uri,
        attestation=attestation,
        attested_by=by,
        image=image,
    )


__all__ = ["AGAIN_S", "TaskOutputs", "attested_model"]
