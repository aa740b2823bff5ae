"""Commands about entries of the compile cache and the tasks that build them; part of `core.events.Command`.

Pure. What each does, and refuses, stands in `core.builds`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fal_scheduler.core.records import CacheEntry, Model, Spec


@dataclass(frozen=True, slots=True)
class BuildCache:
    """Run a build task, unless the entry is there ("unchanged") or being built ("building").

    `spec.build` says what it makes. `Reply.subject`: the entry's model, else the runner of the build.
    """

    spec: Spec
    actor: str = ""


@dataclass(frozen=True, slots=True)
class PutCacheEntry:
    """A build task ended well and its output is signed: keep the entry, end the task.

    The task must be this runner's. The same key with other content: CONFLICT; no room in the namespace: NO_CAPACITY.
    """

    entry: CacheEntry
    model: Model
    runner: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class FailBuild:
    """What a build task left is not taken. `refused`: it was not what it had to be."""

    runner: str
    reason: str
    refused: bool = False
    actor: str = ""


@dataclass(frozen=True, slots=True)
class TrimCache:
    """Make room for one entry of so many bytes in a namespace: the oldest that no app names go first.

    `Reply.outcome` is "more" where one step was not enough.
    """

    namespace: str
    bytes: int
    actor: str = ""


@dataclass(frozen=True, slots=True)
class EvictCacheEntry:
    """Forget an entry; runners keep what they have. NOT_FOUND."""

    namespace: str
    key: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class BuildEnded:
    """An effect: a build task ended with exit code 0, its node has the output. Its record waits for the answer."""

    runner_id: str


BuildCommand = BuildCache | PutCacheEntry | FailBuild | TrimCache | EvictCacheEntry

__all__ = [
    "BuildCache",
    "BuildCommand",
    "BuildEnded",
    "EvictCacheEntry",
    "FailBuild",
    "PutCacheEntry",
    "TrimCache",
]
