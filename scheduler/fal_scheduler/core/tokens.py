"""Join tokens as pure transitions: each function returns a new record or raises the FalError a machine is shown.

Called by the core (`commands`) and by the operator API, which draws the secret and keeps only its SHA-256.
The secret itself is never stored. Times are Unix seconds, passed in.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import TOKEN_TTL_MAX_S

_MAKE_ANOTHER = "Make another with `falctl node token create`."


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What is kept of a join token."""

    id: str
    secret_sha256: bytes
    pool: str
    expires_at_s: float
    uses_left: int
    revoked: bool = False
    created_by: str = ""
    created_at_s: float = 0.0

    def state(self, now_s: float) -> str:
        """ "valid", "expired", "used up" or "revoked"."""
        if self.revoked:
            return "revoked"
        if now_s >= self.expires_at_s:
            return "expired"
        return "valid" if self.uses_left > 0 else "used up"


def create(
    token_id: str, secret: str, *, pool: str, ttl_s: float, uses: int, created_by: str, now_s: float
) -> JoinToken:
    """A new token; INVALID where ttl or uses are out of bounds."""
    if not 0.0 < ttl_s <= TOKEN_TTL_MAX_S:
        raise invalid("ttl", ttl_s, "is out of bounds", remedy=f"Use more than 0 and at most {TOKEN_TTL_MAX_S:g} s.")
    if not 1 <= uses <= 100_000:
        raise invalid("uses", uses, "is out of bounds", remedy="Use 1 to 100000.")
    digest = hashlib.sha256(secret.encode()).digest()
    return JoinToken(token_id, digest, pool, now_s + ttl_s, uses, created_by=created_by, created_at_s=now_s)


def redeem(token: JoinToken | None, secret: str, *, now_s: float) -> JoinToken:
    """The token with one use less; UNAUTHENTICATED where it is unknown, wrong, revoked, expired or used up."""
    digest = hashlib.sha256(secret.encode()).digest()
    # Compare also for an unknown token, and before its state is told: who guesses learns nothing.
    known = hmac.compare_digest(digest, token.secret_sha256 if token is not None else bytes(32))
    if token is None or not known:
        raise FalError(Code.UNAUTHENTICATED, "the join token is not known here", remedy=_MAKE_ANOTHER)
    state = token.state(now_s)
    if state != "valid":
        raise FalError(Code.UNAUTHENTICATED, f"join token {token.id} is {state}", remedy=_MAKE_ANOTHER)
    return replace(token, uses_left=token.uses_left - 1)


def revoke(token: JoinToken) -> JoinToken:
    """The token, refused from now on."""
    return replace(token, revoked=True)
