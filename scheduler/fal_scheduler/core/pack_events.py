"""Commands about images and the tasks that pack them; part of `core.events.Command`.

Pure. What each does, and refuses, stands in `core.packs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fal_scheduler.core.records import Model, Spec


@dataclass(frozen=True, slots=True)
class PackImage:
    """Pack the image that `spec.build` names, unless it is there ("unchanged") or being packed ("packing").

    `Reply.subject`: the image, else the runner that packs it. Other content under the name: ALREADY_EXISTS.
    """

    spec: Spec
    actor: str = ""


@dataclass(frozen=True, slots=True)
class PutImage:
    """A pack task ended well and its manifest is signed: keep the image, wish replicas, end the task."""

    model: Model
    runner: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RemoveModel:
    """Forget a model or image that nothing uses, or end the task that packs it. Used: FAILED_PRECONDITION.

    `Reply.outcome`: "removed" or "cancelled".
    """

    id: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class AccessTold:
    """News, part of a node's report: what the start of `runner` has read of an image.

    `pieces`: numbers of pieces in order of first use.
    """

    artifact_id: str
    runner: str
    pieces: tuple[int, ...]


PackCommand = PackImage | PutImage | RemoveModel

__all__ = ["AccessTold", "PackCommand", "PackImage", "PutImage", "RemoveModel"]
