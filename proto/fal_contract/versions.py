"""Which wire versions this release speaks, and how two sides agree on one. Pure.

The highest version that both speak is used for the life of a stream. Each release speaks its own version and the one
before it.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from fal_contract.errors import Code, FalError

WIRE_MIN: Final = 1
WIRE_MAX: Final = 1
FEATURES: Final[frozenset[str]] = frozenset()


def software() -> str:
    """Version of the installed distribution, for people."""
    try:
        return version("falctl")
    except PackageNotFoundError:
        return "unknown"


def agree(peer: str, low: int, high: int, *, ours: tuple[int, int] = (WIRE_MIN, WIRE_MAX)) -> int:
    """The version to use with `peer`, which speaks `low` to `high`. Raises VERSION_MISMATCH saying whom to upgrade."""
    common = min(high, ours[1])
    if common >= max(low, ours[0]) and low >= 1:
        return common
    older, newer = (peer, "this process") if high < ours[0] else ("this process", peer)
    raise FalError(
        Code.VERSION_MISMATCH,
        f"{peer} speaks wire versions {low} to {high}, this process {ours[0]} to {ours[1]}",
        remedy=f"Upgrade {older} to a release next to that of {newer}; upgrade schedulers before agents and gateways.",
    )


def shared_features(theirs: Collection[str]) -> list[str]:
    """Optional features that both sides speak, sorted."""
    return sorted(FEATURES & set(theirs))


__all__ = ["FEATURES", "WIRE_MAX", "WIRE_MIN", "agree", "shared_features", "software"]
