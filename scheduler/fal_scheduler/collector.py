"""Python's garbage collector, set for a process that holds much and makes little garbage in cycles.

By default a full collection walks every record after a few thousand allocations, which shows as pauses of tens of
milliseconds in the dispatch benchmark's p99. Called by daemons' main once their imports and records are loaded, and by
the benchmark, for both of its sides.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (20_000, 50, 100)


def calm() -> None:
    """Collect once, leave what is there out of later collections, and collect more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
