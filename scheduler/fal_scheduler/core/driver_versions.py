"""Versions of GPU drivers and CUDA, compared as numbers: "550.9" is older than "550.54". Pure."""

from __future__ import annotations

import re
from typing import Final

_PARTS: Final = 4
_PART_MAX: Final = 100_000  # a manifest's versions have at most five digits a part
_NUMBERS: Final = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5})*")


def rank(version: str) -> int:
    """A number that grows with the version; -1 for what is none. "550.54-server" counts as "550.54"."""
    found = _NUMBERS.match(version)
    if found is None:
        return -1
    parts = [int(part) for part in found[0].split(".")[:_PARTS]]
    number = 0
    for part in (*parts, *[0] * (_PARTS - len(parts))):
        number = number * _PART_MAX + part
    return number


def at_least(version: str, least: str) -> bool:
    """Whether `version` is `least` or newer; everything is when `least` is empty, nothing when `version` is none."""
    return not least or 0 <= rank(least) <= rank(version)
