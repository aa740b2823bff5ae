"""Which containers to have ready before anybody asks. Pure.

What was started last is likely to be started next: the last few shapes are kept, most recent first. A shape is
whatever the caller compares for equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

SHAPES_MAX: Final = 4
FREE_BYTES_MIN: Final = 1 << 30  # below this nothing is kept ready
WARM_BYTES: Final = 1 << 30  # what a warm worker may take at most, about

Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True)
class Want(Generic[Shape]):
    """So many of this shape; `warm`: with a worker in them."""

    shape: Shape
    count: int
    warm: bool


def remembered(recent: Sequence[Shape], used: Shape) -> tuple[Shape, ...]:
    """The shapes after one more start."""
    return (used, *(shape for shape in recent if shape != used))[:SHAPES_MAX]


def wanted(
    recent: Sequence[Shape], *, prepared: int, warm: int, can_warm: Sequence[bool], free_bytes: int
) -> tuple[Want[Shape], ...]:
    """What should be ready. `can_warm[i]`: whether the i-th shape has a warm worker; such shapes get those first.

    Nothing while memory is short; warm ones as far as the memory above the minimum lasts, the most recent first.
    """
    if free_bytes < FREE_BYTES_MIN:
        return ()
    spare_bytes = free_bytes - FREE_BYTES_MIN
    found: list[Want[Shape]] = []
    for shape, warmable in zip(recent, can_warm, strict=True):
        count = min(warm, spare_bytes // WARM_BYTES) if warmable else 0
        spare_bytes -= count * WARM_BYTES
        if count:
            found.append(Want(shape, count, True))
        elif prepared:
            found.append(Want(shape, prepared, False))
    return tuple(found)
