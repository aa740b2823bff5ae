"""Commands about secrets; part of `core.events.Command`. They carry sealed values only.

Pure. What each does, and refuses, stands in `core.secrets`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SetSecret:
    """Make a secret, or give it another value. `sealed`: by the edge, for this id; `bytes`: of the value."""

    id: str
    sealed: bytes
    bytes: int
    actor: str = ""


@dataclass(frozen=True, slots=True)
class UnsetSecret:
    """Forget a secret that nothing names. Named: FAILED_PRECONDITION."""

    id: str
    actor: str = ""


SecretCommand = SetSecret | UnsetSecret

__all__ = ["SecretCommand", "SetSecret", "UnsetSecret"]
