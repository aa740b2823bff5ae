"""Predictions against outcomes as metrics: each placement counts once, whatever samples and leaders come and go."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from fal_scheduler.core.expectations import Expectation
from fal_scheduler.core.ready_at import NEVER_MS, Prediction
from fal_scheduler.core.state import State
from fal_scheduler.prediction_metrics import PredictionMetrics


def came(predicted_ms: int, ready_ms: int, tier: str = "disk", at_s: float = 1.0) -> Expectation:
    return Expectation(Prediction(predicted_ms, (), "n1", tier), "default/a", "host", at_s, ready_ms=ready_ms)


def test_each_placement_counts_once_by_its_tier() -> None:
    registry, state = CollectorRegistry(), State()
    metrics = PredictionMetrics(registry)
    state.outcomes = {"r1": came(1100, 1000), "r2": came(500, 1000, "peer"), "r3": came(NEVER_MS, 1000, "origin")}
    state.predictions = {"r4": came(1, -1)}
    first = metrics.sample(state)
    assert first["predictions_pending"] == 1
    assert abs(first["prediction_error_ratio_median"] - 0.3) < 1e-9
    metrics.sample(state)
    state.outcomes["r1"] = came(1000, 1000, at_s=9.0)  # placed again
    metrics.sample(state)
    name = "fal_prediction_error_ratio_count"
    counts = {tier: registry.get_sample_value(name, {"tier": tier}) for tier in ("disk", "peer")}
    assert counts == {"disk": 2.0, "peer": 1.0}
    assert registry.get_sample_value("fal_prediction_error_ratio_bucket", {"tier": "disk", "le": "0.02"}) == 1.0
    assert registry.get_sample_value("fal_prediction_error_ratio_count", {"tier": "origin"}) is None


def test_a_standby_has_nothing_to_tell() -> None:
    assert PredictionMetrics(CollectorRegistry()).sample(None) == {}
