"""The life of an app on real processes and containers, from deploy to delete, and what an operator is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from e2e_cluster import FALCTL, PNG, STRANGERS, Cluster, alive, environment, leftovers, until, worker_pid
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]
MODELS = Path(__file__).resolve().parents[2] / "ops" / "models"


@pytest.mark.parametrize("driver", ["oci", "process"])
def test_an_app_from_deploy_to_delete(real: Cluster, driver: str) -> None:
    app = f"life-{driver}"
    [first] = real.apply(app, driver=driver)
    pid = worker_pid(first)
    assert real.picture(app).startswith(PNG)
    drawn = real.root / f"{app}.png"
    done = real.falctl("run", app, "--prompt", "seven", "--seed", "1", "-o", str(drawn))
    assert done.returncode == 0, done.stderr
    assert drawn.read_bytes() == real.picture(app, seed=1)

    follow_the_log(real, first)
    scale(real, app, 2)
    assert first in real.wait_ready(app, 2)
    scale(real, app, 1)
    assert real.wait_ready(app, 1) == [first], "the youngest goes"
    until(lambda: len(real.runners(app)) == 1, "the other one is gone")

    assert real.falctl("runner", "stop", first).returncode == 0
    until(lambda: real.ready(app) and first not in real.ready(app), "a stopped runner is replaced")
    [second] = real.wait_ready(app, 1)
    assert real.falctl("runner", "kill", second).returncode == 0
    until(lambda: real.ready(app) and second not in real.ready(app), "a killed runner is replaced")
    [third] = real.wait_ready(app, 1)

    done = real.falctl("app", "delete", app)
    assert done.returncode == 0, done.stderr
    assert not alive(pid)
    assert [left for runner in (first, second, third) for left in leftovers(runner)] == []
    node = real.node("box" if driver == "oci" else "lap")
    assert (len(node.gpus_free), list(node.runners)) == (4, [])


def follow_the_log(real: Cluster, runner: str) -> None:
    """`runner logs -f` shows what was written before, and ends when the container's life is followed no longer."""
    argv = [*FALCTL, "runner", "logs", "-f", runner]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=real.falctl_env, text=True) as logs:
        assert logs.stdout is not None
        lines = []
        while not any('"ready"' in line for line in lines):
            line = logs.stdout.readline()
            assert line, f"the log ended: {lines}"
            lines.append(line)
        logs.terminate()
    assert '"start"' in lines[0]


def scale(real: Cluster, app: str, count: int) -> None:
    done = real.falctl("app", "scale", app, "--min", str(count), "--detach")
    assert done.returncode == 0, done.stderr


def test_a_runner_takes_as_many_requests_at_once_as_its_app_says(real: Cluster) -> None:
    real.apply("many", max_multiplexing=3, env={"FAL_FAKE_STEP_S": "0.2"})
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda seed: real.post("many", seed=seed, format="json"), range(6)))
    assert [answer.status for answer in answers] == [200] * 6, answers
    queued_s = [json.loads(answer.body)["timings"]["queue_s"] for answer in answers]
    assert max(queued_s) > 0.2, "the worker holds more than one, though it draws one after the other"
    [view] = real.runners("many")
    assert (len(real.runners("many")), view.status.max_multiplexing) == (1, 3)


@pytest.mark.torch
@pytest.mark.timeout(240)
def test_the_real_model_draws_the_digit_that_is_asked_for(real: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(MODELS))
    done = real.falctl("weights", "add", "digits", (MODELS / "digits").as_uri())
    assert done.returncode == 0, done.stderr
    [runner] = real.apply("digits", command=[], model="digits", resources={"cpu": 1.0, "memory_gib": 2.0})
    pictures = [real.picture("digits", f"a handwritten {word}", seed=1) for word in ("zero", "seven", "three")]
    assert names(pictures) == [0, 7, 3]
    real.delete("digits")
    assert leftovers(runner) == []


def names(pictures: list[bytes]) -> list[int]:
    """What the classifier that was fitted to real digits takes them for."""
    import io

    import torch
    from PIL import Image
    from score_digits import name_digits

    assert all(picture.startswith(PNG) for picture in pictures)
    pixels = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), dtype=np.float32) / 255 for p in pictures]
    return list(name_digits(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)))


def test_a_worker_that_crashes_in_setup_waits_and_shows_its_last_words(real: Cluster) -> None:
    crash = "import sys; print('loading'); sys.exit('no such checkpoint: /models/sdxl')"
    python = json.loads(real.manifest("crash").read_text())["command"][0]
    file = real.manifest("crash", command=[python, "-c", crash])
    assert real.falctl("app", "apply", "-f", str(file), "--detach").returncode == 0

    def backing_off() -> list[str]:
        views = real.runners("crash")
        return [v.runner.id for v in views if v.state == state_pb2.RUNNER_STATE_CRASH_BACKOFF]

    until(backing_off, "it waits before the next try")
    shown = real.ask("runner", "runner", "show", backing_off()[0])
    assert shown["state"] == "CRASH_BACKOFF"
    assert shown["status"]["exit_code"] == 1
    assert shown["status"]["log_tail"][-2:] == ["loading", "no such checkpoint: /models/sdxl"]
    assert shown["failures"] == 1
    assert "exit code 1" in shown["reason"] or "exited" in shown["reason"], shown["reason"]


def test_a_gpu_that_no_node_has_is_pending_with_the_nearest_miss(real: Cluster) -> None:
    file = real.manifest("exotic", machine_type=["B300-288GB"])
    done = real.falctl("app", "apply", "-f", str(file), "--detach")
    assert done.returncode == 0, done.stderr
    until(lambda: real.runners("exotic") and real.runners("exotic")[0].reason, "there is a reason")
    [view] = real.runners("exotic")
    assert view.state == state_pb2.RUNNER_STATE_PENDING
    explained = real.ask("explanation", "explain", "exotic")
    assert "H100-80GB" in explained["placement"]["nearest_miss"], explained
    assert "B300-288GB" in json.dumps(explained)
    refused = {verdict["node_name"]: verdict["filter"] for verdict in explained["verdicts"]}
    assert set(refused) == {"box", "lap"}
    assert explained["placement"]["feasible"] == 0


def test_a_runner_whose_monitor_was_killed_is_replaced_before_it_goes(real: Cluster) -> None:
    [first] = real.apply("wounded", driver="oci")
    stat = Path(f"/proc/{worker_pid(first)}/stat").read_text()
    monitor = int(stat.rpartition(")")[2].split()[1])
    assert Path(f"/proc/{monitor}/comm").read_text().strip() == "conmon"
    os.kill(monitor, signal.SIGKILL)
    until(
        lambda: len(real.ready("wounded")) == 1 and first not in real.ready("wounded"), "another serves", within_s=60.0
    )
    [second] = real.ready("wounded")
    told = [(event["kind"], event["subject"], event["message"]) for event in real.ask("events", "events")]
    ready = told.index(("RUNNER_READY", second, "ready for requests"))
    drained = told.index(("RUNNER_DRAINING", first, "replaced: log and exit code lost: conmon died"))
    assert ready < drained, "the wounded one serves until the other does"
    real.delete("wounded")
    assert leftovers(first) == []


def test_a_revoked_node_loses_its_stream_and_keeps_its_container(real: Cluster) -> None:
    node = real.add_node("outcast", gpus="1xL4-24GB", pool=STRANGERS)
    [runner] = real.apply("kept", pools=[STRANGERS])
    pid = worker_pid(runner)
    assert real.falctl("node", "revoke", "outcast", "--reason", "test").returncode == 0
    until(lambda: "refused_by_scheduler" in node.process.log.read_text(), "its stream ends", within_s=5.0)
    assert real.node("outcast").health == "revoked"
    assert node.process.popen is not None
    assert node.process.popen.poll() is None
    assert worker_pid(runner) == pid
    real.call("DeleteApp", pb.DeleteAppRequest(id="default/kept"))


@pytest.mark.parametrize(("kind", "word"), [("expired", "expired"), ("used-up", "used")])
def test_a_token_that_is_no_longer_good_is_refused_clearly(real: Cluster, kind: str, word: str) -> None:
    token = real.token(ttl_s=1.0 if kind == "expired" else 600.0)
    if kind == "used-up":
        assert start_agent(real, "first", token, until_joined=True) == ""
    else:
        until(lambda: token_state(real, token) == "expired", "the token expires")
    said = start_agent(real, f"late-{kind}", token)
    assert said.startswith("error: ")
    assert word in said
    refusals = [event for event in real.ask("events", "events") if event["kind"] == "TOKEN_REFUSED"]
    assert word in refusals[-1]["message"]


def token_state(real: Cluster, token: str) -> str:
    views = real.call("ListTokens", pb.ListTokensRequest()).tokens
    return next(str(view.state) for view in views if view.id in token)


def start_agent(real: Cluster, name: str, token: str, *, until_joined: bool = False) -> str:
    """Start an agent with a token. Its only line on stderr and exit code 1, or nothing when it joins."""
    node = real.make_node(name, token, driver="process", gpus="1xL4-24GB")
    if until_joined:
        node.process.start()
        until((node.state_dir / "identity").exists, f"{name} joined")
        node.process.end()
        return ""
    done = subprocess.run(node.process.argv, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]
