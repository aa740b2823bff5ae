"""Lists in pages: so many views at a time, and never more than a message holds.

A caller that asks for no `limit` gets all in one answer, as releases before this one did. Where a page ends early
because its views are large, its `next` says where to go on, as at any other end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

from fal_contract.errors import invalid
from fal_contract.limits import LISTED_MAX, MESSAGE_BYTES_MAX

PAGE_BYTES: Final = MESSAGE_BYTES_MAX // 2  # the last view may bring as much again

K = TypeVar("K", bound=tuple[str, ...])
V = TypeVar("V", bound=Message)

_BETWEEN: Final = "\n"  # in no id and no name


def page(
    keys: Sequence[K], view_of: Callable[[K], V], *, limit: int, after: str, bytes_max: int = PAGE_BYTES
) -> tuple[list[V], str]:
    """Views of the keys behind `after`, and where to go on (empty: that was all).

    `keys`: sorted, each once, as tuples of names without line ends. A key that is gone since the last page is no
    trouble: the page begins where it would have been. Raises INVALID (limit).
    """
    if limit > LISTED_MAX:
        raise invalid("limit", limit, "is too many for one answer", remedy=f"At most {LISTED_MAX} a page.")
    start = bisect_right(keys, tuple(after.split(_BETWEEN))) if after else 0
    views: list[V] = []
    size = 0
    for place in range(start, len(keys)):
        if limit and (len(views) == limit or size >= bytes_max):
            return views, _BETWEEN.join(keys[place - 1])
        view = view_of(keys[place])
        size += view.ByteSize() if limit else 0
        views.append(view)
    return views, ""


__all__ = ["page"]
