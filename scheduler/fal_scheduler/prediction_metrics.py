"""How far predictions of placements are from what happened, as metrics: a histogram by tier, and a median of late.

Reads what the core keeps of the last placements (`State.outcomes`) each time that the process samples its statistics;
there are fewer of them between two samples than are kept. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Final

from prometheus_client import CollectorRegistry, Histogram

from fal_scheduler.core.expectations import Expectation
from fal_scheduler.core.state import State

BUCKETS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0)
LATE: Final = 100  # placements that "of late" means


class PredictionMetrics:
    """One for the process; leaders come and go."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._errors = Histogram(
            "fal_prediction_error_ratio",
            "|predicted - actual| / actual of the seconds from placement to readiness, by where the weights were.",
            ["tier"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._seen: dict[tuple[str, float], None] = {}

    def sample(self, state: State | None) -> Mapping[str, float]:
        """Count what became ready since the last time; gauges as of now. None: this process does not lead."""
        if state is None:
            self._seen.clear()
            return {}
        seen: dict[tuple[str, float], None] = {}
        errors: list[float] = []
        for runner_id, outcome in state.outcomes.items():
            key = (runner_id, outcome.placed_at_s)
            seen[key] = None
            if (error := error_ratio(outcome)) is None:
                continue
            errors.append(error)
            if key not in self._seen:
                self._errors.labels(outcome.prediction.tier).observe(error)
        self._seen = seen
        pending, subjects = len(state.predictions), state.learning.subjects
        gauges = {"predictions_pending": float(pending), "learnt_subjects": float(subjects)}
        return gauges | ({"prediction_error_ratio_median": median(errors[-LATE:])} if errors else {})


def error_ratio(outcome: Expectation) -> float | None:
    """None where nothing could be predicted."""
    return outcome.error_ppm / 1e6 if outcome.error_ppm >= 0 else None


__all__ = ["PredictionMetrics", "error_ratio"]
