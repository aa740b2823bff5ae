"""A word in a store that keeps schedulers from leading on it: it is being filled, or its records moved elsewhere.

Pure. `moving` writes it, `recovery` looks for it before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fal_contract.errors import Code, FalError

MARK_KEY: Final = "mark"
UNFINISHED: Final = b"unfinished"
_MOVED: Final = b"moved to "


def moved(where: str) -> bytes:
    """The mark of a store whose records are at `where` now."""
    return _MOVED + where.encode()


def moved_to(mark: bytes) -> str:
    """Where they are; empty where it says something else."""
    return mark[len(_MOVED) :].decode(errors="replace") if mark.startswith(_MOVED) else ""


def check_mark(records: Mapping[str, bytes]) -> None:
    """Raises FAILED_PRECONDITION where nobody may lead on these records."""
    mark = records.get(MARK_KEY)
    if mark is None:
        return
    where = moved_to(mark)
    if where:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"the records of this store were moved to {where}",
            remedy="Configure that store; where it says that the move was not finished, do the same move again. "
            "Or restore a snapshot into this one with --force.",
        )
    raise FalError(
        Code.FAILED_PRECONDITION,
        "a restore or a move into this store was not finished",
        remedy="Do the same again: it begins anew, and ends what was left.",
    )


__all__ = ["MARK_KEY", "UNFINISHED", "check_mark", "moved", "moved_to"]
