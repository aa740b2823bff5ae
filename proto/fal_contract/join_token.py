"""The text of a join token: `falj1.ID.SECRET.CA`. Pure.

ID names the token in lists, SECRET (26 characters, 130 bits) proves the right to join, CA is the SHA-256 of the
cluster's CA certificate in hexadecimal: whoever holds the token can tell this cluster from an impostor before
trusting a byte. Only the SHA-256 of the secret is stored.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random
from typing import Final

from fal_contract.errors import Code, FalError
from fal_contract.ids import random_suffix

PREFIX: Final = "falj1"
_PART: Final = re.compile(r"[0-9a-z]{10}|[0-9a-z]{26}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
ID_CHARS: Final = 10
SECRET_CHARS: Final = 26


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token in the hands of a joiner."""

    id: str
    secret: str
    ca_sha256: str  # 64 hexadecimal digits

    def __str__(self) -> str:
        return f"{PREFIX}.{self.id}.{self.secret}.{self.ca_sha256}"

    def __repr__(self) -> str:  # the secret must not reach a log
        return f"TokenText({self.id})"


def new_token(rng: Random, ca_sha256: str) -> TokenText:
    """A fresh token; `rng` is `random.SystemRandom()` outside of tests."""
    return TokenText(random_suffix(rng, ID_CHARS), random_suffix(rng, SECRET_CHARS), ca_sha256)


def parse_token(text: str) -> TokenText:
    """Read a token. Raises INVALID saying which part is wrong; the secret is never repeated."""
    parts = text.strip().split(".")
    if parts[0] != PREFIX:
        version = parts[0] if re.fullmatch(r"falj\d+", parts[0]) else None
        why = f"has version {version}, this release reads {PREFIX}" if version else f"does not start with {PREFIX}."
        raise _bad(why)
    if len(parts) != 4:
        raise _bad(f"has {len(parts)} parts instead of 4; it may be cut off")
    _, token_id, secret, ca_sha256 = parts
    if len(token_id) != ID_CHARS or not _PART.fullmatch(token_id):
        raise _bad("has a damaged id (second part)")
    if len(secret) != SECRET_CHARS or not _PART.fullmatch(secret):
        raise _bad("has a damaged secret (third part)")
    if not _HASH.fullmatch(ca_sha256):
        raise _bad("has a damaged CA hash (last part); it may be cut off")
    return TokenText(token_id, secret, ca_sha256)


def secret_sha256(secret: str) -> bytes:
    """What is stored instead of the secret. Plain SHA-256: the secret is random, so there is nothing to guess."""
    return hashlib.sha256(secret.encode()).digest()


def _bad(why: str) -> FalError:
    return FalError(
        Code.INVALID,
        f"the join token {why}",
        remedy="Copy it whole, or make a new one with `falctl node token create`.",
        field="token",
    )
