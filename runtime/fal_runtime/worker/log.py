"""JSON lines on stdout: what happened, when, and how long the process has been up.

Imports nothing heavy: the first line is written before anything else is imported, so that the time between
`exec` and that line is the container's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import sys
import time

from fal_contract.clock import SystemClock

_CLOCK = SystemClock()
_STARTED_S = time.monotonic()
# The request that this task or thread works for: each line written meanwhile names it, for `runner logs --request`.
REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


def begin() -> None:
    """The life that lines are counted from begins now: a warm worker has become somebody."""
    global _STARTED_S
    _STARTED_S = time.monotonic()


def log(event: str, **fields: object) -> None:
    """Write one line: `event`, seconds since 1970, seconds since start, then `fields` (JSON values)."""
    up_s = round(_CLOCK.monotonic_s() - _STARTED_S, 3)
    line: dict[str, object] = {"event": event, "time_s": round(_CLOCK.wall_s(), 3), "up_s": up_s}
    if (request_id := REQUEST.get()) and "request_id" not in fields:
        line["request_id"] = request_id
    with contextlib.suppress(OSError):  # when nobody reads the log any more, serving goes on
        print(json.dumps(line | fields, default=str), file=sys.stdout, flush=True)
