"""fal's metrics of apps, under fal's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from demand_rig import Serving
from fal_scheduler.app_metrics import SAMPLED_EVERY_S, AppMetrics


def test_runners_by_state_and_machine_what_waits_and_what_is_under_way() -> None:
    serving = Serving()
    serving.deploy(max_concurrency=2)
    serving.deploy("default/none")
    serving.ask(4, takes_s=100.0)
    serving.run(15)
    registry, metrics = CollectorRegistry(), AppMetrics()
    registry.register(metrics)
    metrics.sample(serving.world.state, 100.0)
    runners = {(one.node, one.gpus) for one in serving.ready()}
    assert len(runners) == 2
    labels = {"application": "default/a"}
    found = {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "fal_app_runners"
    }
    assert sum(found.values()) == 2
    assert {(app, state) for app, state, _ in found} == {("default/a", "IDLE")}, "as its nodes tell"
    assert {machine for *_, machine in found} <= {"H100-80GB", "A100-40GB"}
    assert registry.get_sample_value("fal_app_queue_size", labels) == 2
    assert registry.get_sample_value("fal_app_concurrent_requests", labels) == 2
    assert registry.get_sample_value("fal_app_queue_size", {"application": "default/none"}) == 0
    serving.queue.clear()
    serving.run(1)
    metrics.sample(serving.world.state, 100.0 + SAMPLED_EVERY_S / 2)
    assert registry.get_sample_value("fal_app_queue_size", labels) == 2, "not counted anew yet"
    metrics.sample(serving.world.state, 100.0 + SAMPLED_EVERY_S)
    assert registry.get_sample_value("fal_app_queue_size", labels) == 0
    metrics.sample(None, 200.0)
    assert registry.get_sample_value("fal_app_queue_size", labels) is None, "a standby has none"
