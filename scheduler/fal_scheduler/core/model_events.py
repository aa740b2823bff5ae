"""Commands about models and wishes; part of `core.events.Command`.

Pure. What each does, and refuses, stands in `core.model_commands`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fal_scheduler.core.records import Model, Wish


@dataclass(frozen=True, slots=True)
class AddModel:
    """Register a model. The same id with other content: ALREADY_EXISTS; the same again: unchanged.

    A refused model is registered anew; a revoked one, or one with a revoked artifact, is not (FAILED_PRECONDITION).
    """

    model: Model
    actor: str = ""


@dataclass(frozen=True, slots=True)
class AttestModel:
    """The digests of a registered model are known and frozen. `attestation`, `attested_by`: see state.proto."""

    id: str
    manifest_digest: str
    bytes: int
    files: int
    actor: str = ""
    attestation: str = ""
    attested_by: str = ""


@dataclass(frozen=True, slots=True)
class RefuseModel:
    """The content of a registered model was not what it was said to be; its runners are stopped and named."""

    id: str
    reason: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class IdentifyModel:
    """A record of the first release gets its artifact id; who had attested it then read it, too."""

    id: str
    artifact_id: str
    resolved_uri: str


@dataclass(frozen=True, slots=True)
class RevokeModel:
    """Withdraw a model for good: never staged again, its runners are stopped."""

    id: str
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class StageModel:
    """Wish a model somewhere; a node in the target may be named by name or id. A wish with the same target changes."""

    wish: Wish
    actor: str = ""


@dataclass(frozen=True, slots=True)
class UnstageModel:
    """Take wishes of a model back. Empty target: all; NOT_FOUND where there is none."""

    id: str
    target: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class CollectModels:
    """Forget those of these models that are withdrawn and not in use, and all wishes that ended."""

    models: tuple[str, ...] = ()
    actor: str = ""
