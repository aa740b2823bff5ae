"""Sizes, durations and ages as people write and read them. Pure."""

from __future__ import annotations

import re
from typing import Final

from fal_contract.errors import invalid

_BYTES: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "pib": 1 << 50,
}  # fmt: skip
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_UNIT: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: str | int, *, field: str = "size") -> int:
    """`2TiB`, `500 MB`, `4096` → bytes. Raises FalError(INVALID)."""
    if isinstance(value, int):
        if value < 0:
            raise invalid(field, value, "is negative", remedy="Give bytes, or a size such as 2TiB.")
        return value
    match = _NUMBER_UNIT.fullmatch(value)
    if match is None or match[2].lower() not in _BYTES:
        raise invalid(field, value, "is not a size", remedy="Write a number and a unit, such as 512MiB or 2TiB.")
    return round(float(match[1]) * _BYTES[match[2].lower()])


def parse_duration_s(value: str, *, field: str = "duration") -> float:
    """`90s`, `15m`, `1h`, `2d` → seconds. Raises FalError(INVALID)."""
    match = _NUMBER_UNIT.fullmatch(value)
    if match is None or match[2].lower() not in _SECONDS:
        raise invalid(
            field, value, "is not a duration", remedy="Write a number and a unit, such as 90s, 15m, 1h or 2d."
        )
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_bytes(value: float) -> str:
    """`4.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_duration(value_s: float) -> str:
    """`0.3s`, `42s`, `5m10s`, `3h02m`, `4d01h`: two units at most."""
    if value_s < 10:
        return f"{value_s:.1f}s"
    whole = round(value_s)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
