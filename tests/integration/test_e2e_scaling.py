"""An app without runners, on real processes: a request starts one, idleness ends it, the next brings it back."""

from __future__ import annotations

import http.client
import json

import pytest

from e2e_cluster import PNG, Cluster, until

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]


def deploy(real: Cluster, app: str, **changes: object) -> None:
    file = real.manifest(app, driver="process", min_concurrency=0, keep_alive=1, **changes)
    done = real.falctl("app", "apply", "-f", str(file))
    assert done.returncode == 0, done.stderr
    assert "the first request starts a runner" in done.stderr


def test_a_request_wakes_an_app_that_sleeps_again_when_nobody_asks(real: Cluster) -> None:
    deploy(real, "sleepy")
    assert real.runners("sleepy") == []
    seen = set()
    for _ in range(2):
        assert real.picture("sleepy").startswith(PNG)
        seen |= set(real.ready("sleepy"))
        until(lambda: not real.runners("sleepy"), "the idle runner is gone")
    view = real.ask("app", "app", "show", "sleepy")
    assert (view.get("wanted", 0), view.get("reason", "")) == (0, "")
    events = real.ask("events", "events")
    placed = [one for one in events if one["kind"] == "RUNNER_PLACED" and "sleepy" in one["subject"]]
    assert len(placed) == 2, "one runner for each request"


def test_a_request_that_cannot_be_served_is_told_why(real: Cluster) -> None:
    deploy(real, "nowhere", machine_type=["B200-180GB"])
    connection = http.client.HTTPConnection("127.0.0.1", real.http_port, timeout=60)
    connection.request("POST", "/v1/run/default/nowhere", b"{}", {"x-fal-wait-s": "2"})
    with connection.getresponse() as answer:
        status, error = answer.status, json.loads(answer.read())["error"]
    connection.close()
    assert (status, error["code"]) == (503, "NO_CAPACITY")
    assert "default/nowhere" in error["what"]
    assert "B200-180GB" in error["what"], "what it waits for"
    until(lambda: not real.runners("nowhere"), "what nobody waits for any more is forgotten")
