"""Whether scaling values make sense together: a revision's under those set at run time. Pure. Called by commands."""

from __future__ import annotations

import math
from typing import Final

from fal_contract.errors import invalid
from fal_contract.limits import RUNNERS_PER_APP_MAX
from fal_scheduler.core.records import Scaling

# The bounds of a manifest (fal_contract.manifest); values set at run time have the same.
KEEP_ALIVE_MAX_S: Final = 604_800.0
BUFFER_PERC_MAX: Final = 1000
SCALING_DELAY_MAX_S: Final = 3600.0
REQUEST_TIMEOUT_MAX_S: Final = 86_400.0


def check_scaling(scaling: Scaling) -> None:
    """Raises INVALID, naming the value that is out of bounds."""
    _within("max_concurrency", scaling.max_concurrency, RUNNERS_PER_APP_MAX)
    if not 0 <= scaling.min_concurrency <= scaling.max_concurrency:
        remedy = f"Use 0 to max_concurrency, which is {scaling.max_concurrency}, or raise that."
        raise invalid("scaling.min_concurrency", scaling.min_concurrency, "is out of bounds", remedy=remedy)
    _within("keep_alive", scaling.keep_alive_s, KEEP_ALIVE_MAX_S)
    _within("concurrency_buffer", scaling.concurrency_buffer, RUNNERS_PER_APP_MAX)
    _within("concurrency_buffer_perc", scaling.concurrency_buffer_perc, BUFFER_PERC_MAX)
    _within("scaling_delay", scaling.scaling_delay_s, SCALING_DELAY_MAX_S)
    _within("forecast_concurrency", scaling.forecast_concurrency, RUNNERS_PER_APP_MAX)
    if not 0.0 < scaling.request_timeout_s <= REQUEST_TIMEOUT_MAX_S:
        remedy = f"Use more than 0 and at most {REQUEST_TIMEOUT_MAX_S:g} seconds."
        raise invalid("scaling.request_timeout", scaling.request_timeout_s, "is out of bounds", remedy=remedy)


def _within(name: str, value: float, most: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= most:
        raise invalid(f"scaling.{name}", value, "is out of bounds", remedy=f"Use 0 to {most:g}.")


__all__ = ["check_scaling"]
