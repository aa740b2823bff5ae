"""Two apps of one share group on real processes: the second is served by the first one's container after a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from e2e_cluster import PNG, Cluster, until, worker_pid
from fal_contract.v1 import state_pb2
from weights_rig import contents_of

pytestmark = [pytest.mark.root, pytest.mark.slow]
NO_OCI = pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}")
DRIVERS = ["process", pytest.param("oci", marks=[pytest.mark.oci, NO_OCI])]


def add_model(real: Cluster, folder: Path, name: str, *, broken: bool = False) -> str:
    """A model of one file; one that is broken does not load into a live worker."""
    here = folder / name
    here.mkdir()
    for path, content in contents_of(50_000).items():
        (here / path).write_bytes(content)
    if broken:
        (here / "broken").write_text("it does not load")
    done = real.falctl("weights", "add", name, here.as_uri())
    assert done.returncode == 0, done.stderr
    return name


def deploy(real: Cluster, app: str, model: str, driver: str, **changes: Any) -> None:
    keys = {"model": model, "min_concurrency": 0, "max_concurrency": 1, "keep_alive": 60, "share_group": "atelier"}
    file = real.manifest(app, driver=driver, **(keys | changes))
    done = real.falctl("app", "apply", "-f", str(file), "--detach")
    assert done.returncode == 0, done.stderr


def idle(real: Cluster, app: str) -> str:
    """The app's only runner, once its node has told that it has no request."""
    until(lambda: [one.state for one in real.runners(app)] == [state_pb2.RUNNER_STATE_IDLE], f"{app} is idle")
    return str(real.runners(app)[0].runner.id)


def events_of(real: Cluster, kind: str, runner: str) -> list[Any]:
    return [one for one in real.ask("events", "events") if one["kind"] == kind and one["subject"] == runner]


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_second_app_is_served_by_the_first_ones_container(real: Cluster, tmp_path: Path, driver: str) -> None:
    names = [f"{driver}-{one}" for one in ("ma", "mb", "mc", "md")]
    for name in names:
        add_model(real, tmp_path, name, broken=name.endswith("mc"))
    one, two, three, four = (f"{driver}-{app}" for app in ("one", "two", "three", "four"))
    deploy(real, one, names[0], driver)
    deploy(real, two, names[1], driver)
    first = real.picture(one, seed=1)
    assert first.startswith(PNG)
    runner = idle(real, one)
    pid = worker_pid(runner)
    second = real.picture(two, seed=1)
    assert second != first, "another model drew it"
    assert list(real.ready(two)) == [runner]
    assert worker_pid(runner) == pid, "no other container was started"
    [told] = events_of(real, "RUNNER_SHARED", runner)
    assert told["facts"]["app"] == f"default/{two}"
    assert (real.picture(one, seed=1), real.picture(two, seed=1)) == (first, second)

    for model in (f"default/{names[0]}", "rivals/secret"):  # a request gets its own app's model, whatever it says
        answer = real.post(two, prompt="p", model=model)
        assert answer.status in (400, 409), answer.body

    idle(real, two)
    deploy(real, three, names[2], driver)  # its model does not load into a live worker: it costs nobody else anything
    assert real.picture(three).startswith(PNG)
    assert real.ready(three).keys() != {runner}
    assert events_of(real, "MODEL_NOT_LOADED", runner)
    assert real.picture(one, seed=1) == first

    deploy(real, four, names[3], driver, env={"OTHER": "engine"})  # another engine: never shared
    assert real.picture(four).startswith(PNG)
    assert not set(real.ready(four)) & {runner, *real.ready(three)}

    real.delete(one)
    assert real.picture(two, seed=1) == second, "who began with it may go"
    assert worker_pid(runner) == pid
    real.delete(two)
    until(lambda: not real.runners(two), "the last binding takes the runner along")


def test_an_agent_that_starts_anew_finds_out_what_its_worker_has_loaded(real: Cluster, tmp_path: Path) -> None:
    for name in ("again-ma", "again-mb", "again-mc"):
        add_model(real, tmp_path, name)
    deploy(real, "again-one", "again-ma", "process")
    deploy(real, "again-two", "again-mb", "process")
    deploy(real, "again-three", "again-mc", "process")
    first = real.picture("again-one", seed=1)
    runner = idle(real, "again-one")
    before = first, real.picture("again-two", seed=1)
    assert idle(real, "again-two") == runner
    node = real.nodes["lap"]
    node.process.end()
    node.process.start()
    until(lambda: real.node("lap").health == "ready", "the node is back")
    assert (real.picture("again-one", seed=1), real.picture("again-two", seed=1)) == before
    assert list(real.ready("again-two")) == [runner]
    idle(real, "again-two")
    assert real.picture("again-three").startswith(PNG)
    assert list(real.ready("again-three")) == [runner], "and it may still load others"
