"""Weights from `weights add` to a file in a container, over real processes: whose models a container sees, and what an
origin that never answers or a killed cache does to it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from e2e_cluster import POOLS, Cluster, alive, leftovers, until, worker_pid
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2
from fal_fsd.mount.probe import YES, probe
from origin_servers import HttpOrigin
from weights_rig import contents_of

pytestmark = [
    pytest.mark.root,
    pytest.mark.oci,
    pytest.mark.slow,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
FSD = "fal_fsd.main"
NODE = "box"
SIZES = (300_000, 150_000)
END_WITHIN_S = 15.0  # a bound that the operator relies on
MORE_READS = 20

# Its first words; what it tells stands in a file that the machine can look at without agent and scheduler.
_HEAD = """
import hashlib, json, os, time

def say(**words):
    with open("/tmp/said", "a") as out:
        out.write(json.dumps(words) + "\\n")

def digests():
    found = {}
    for folder, _, files in os.walk("/models"):
        for name in files:
            with open(f"{folder}/{name}", "rb") as file:
                found[f"{folder}/{name}"] = hashlib.sha256(file.read()).hexdigest()
    return found
"""
LISTS = """
say(models=sorted(os.listdir("/models")), digests=digests())
"""
READS_ON = """
import threading

def forever():
    first = digests()
    held = {path: os.open(path, os.O_RDONLY) for path in first}
    say(digests=first)
    for count in range(10**9):
        try:
            good = digests() == first
            for path, fd in held.items():
                with open(fd, "rb", closefd=False) as file:
                    file.seek(0)
                    good = good and hashlib.sha256(file.read()).hexdigest() == first[path]
            say(count=count, good=good)
        except OSError as error:
            say(count=count, good=False, why=str(error))
        time.sleep(0.02)

threading.Thread(target=forever, daemon=True).start()
"""
WAITS = """
[path] = [f"{folder}/{name}" for folder, _, files in os.walk("/models") for name in files]
fd = os.open(path, os.O_RDONLY)
while True:
    say(reads=path)
    try:
        say(came=len(os.read(fd, 1000)))
    except OSError as error:
        say(failed=str(error))
"""
_SERVE = """
from fal_runtime.worker import fake
fake.main()
"""


class Never(threading.Event):
    """What is waited for without a bound, until the origin ends."""

    def wait(self, timeout: float | None = None) -> bool:
        del timeout
        return super().wait()


class Team:
    """One team's models and apps; its apps end with the block."""

    def __init__(self, real: Cluster, name: str) -> None:
        self.real = real
        self.name = name
        self._apps: list[str] = []

    def falctl(self, *arguments: str) -> None:
        done = self.real.falctl("--team", self.name, *arguments)
        assert done.returncode == 0, done.stderr

    def deploy(self, app: str, script: str, **changes: Any) -> None:
        """An app on containers that runs `script` and then the worker without torch."""
        given = json.loads(self.real.manifest(app).read_text())
        command = [given["command"][0], "-c", _HEAD + script + _SERVE]
        file = self.real.manifest(app, team=self.name, command=command, pools=[POOLS["oci"]], **changes)
        self._apps.append(app)
        self.falctl("app", "apply", "-f", str(file), "--detach")

    def runners(self, app: str) -> list[pb.RunnerView]:
        request = pb.ListRunnersRequest(team=self.name, app=f"{self.name}/{app}")
        return list(self.real.call("ListRunners", request).runners)

    def running(self, app: str) -> tuple[str, int]:
        """Id and worker of the app's only runner, as soon as its container runs."""
        found: list[tuple[str, int]] = []

        def runs() -> bool:
            with suppress(AssertionError):  # not yet one worker
                found[:] = [(view.runner.id, worker_pid(view.runner.id)) for view in self.runners(app)]
            return len(found) == 1

        until(runs, f"a container of {app} runs")
        return found[0]

    def end(self) -> None:
        for app in self._apps:
            with suppress(Exception):
                self.real.call("DeleteApp", pb.DeleteAppRequest(id=f"{self.name}/{app}"))
        for app in self._apps:
            until(partial(self._gone, app), f"the runners of {app} are gone")

    def _gone(self, app: str) -> bool:
        return not self.runners(app)


@contextmanager
def team(real: Cluster, name: str) -> Iterator[Team]:
    made = Team(real, name)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def model(owner: Team, name: str, *sizes: int, kind: str = "model") -> Iterator[HttpOrigin]:
    """A registered model or LoRA and the origin that it comes from."""
    with HttpOrigin(contents_of(*sizes)) as origin:
        origin.put_list()
        owner.falctl("weights", "add", name, origin.url, "--kind", kind)
        yield origin


def digests_of(origin: HttpOrigin, folder: str) -> dict[str, str]:
    """As a container with this model at /models/FOLDER tells them."""
    names = [name for name in origin.files if name.endswith(".safetensors")]
    return {f"/models/{folder}/{name}": hashlib.sha256(origin.files[name]).hexdigest() for name in names}


def said(pid: int) -> list[dict[str, Any]]:
    """What a container told so far, whole lines only."""
    try:
        text = Path(f"/proc/{pid}/root/tmp/said").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def first_word(pid: int) -> dict[str, Any]:
    until(lambda: said(pid), "the container told something", also=lambda: lives(pid))
    return said(pid)[0]


def lives(pid: int) -> None:
    assert alive(pid), f"process {pid} ended"


def test_a_container_sees_the_models_of_its_own_app_alone(real: Cluster) -> None:
    with (
        team(real, "red") as red, team(real, "blue") as blue,
        model(red, "base", *SIZES) as red_base, model(red, "look", 100_000, kind="lora") as red_look,
        model(blue, "base", *SIZES) as blue_base, model(blue, "look", 100_000, kind="lora") as blue_look,
    ):  # fmt: skip
        for one in (red, blue):
            one.deploy(f"sees-{one.name}", LISTS, model="base", loras=["look"])
        for one, base, look in ((red, red_base, red_look), (blue, blue_base, blue_look)):
            runner, pid = one.running(f"sees-{one.name}")
            told = first_word(pid)
            assert told["models"] == [f"{one.name}.base", f"{one.name}.look"], runner
            assert told["digests"] == digests_of(base, f"{one.name}.base") | digests_of(look, f"{one.name}.look")
            state = real.nodes[NODE].state_dir
            assert state.exists()
            assert not Path(f"/proc/{pid}/root{state}").exists(), "the node's cache is in sight of the container"
        assert {view.node_name for one in (red, blue) for view in one.runners(f"sees-{one.name}")} == {NODE}


@pytest.mark.parametrize("how", ["kill", "delete"])
def test_a_container_that_waits_for_an_origin_that_never_answers_ends_in_time(
    real: Cluster, tmp_path: Path, how: str
) -> None:
    if (why := probe(tmp_path)["fuse"]) != YES:
        pytest.skip(why)
    app = f"waits-{how}"
    with team(real, "default") as ours, model(ours, f"never-{how}", 400_000) as origin:
        origin.faults.go = Never()
        origin.faults.stall_after = 0
        ours.deploy(app, WAITS, model=f"never-{how}", stream_weights=True, allow_provisional=True)
        runner, pid = ours.running(app)
        assert "reads" in first_word(pid)
        assert streaming(real), "it reads through a mount of fsd"
        until(lambda: asked_for(origin), "its cache asked the origin")
        assert [word for word in said(pid) if "came" in word] == []
        if how == "kill":
            ours.falctl("runner", "kill", runner)
        else:
            real.call("DeleteApp", pb.DeleteAppRequest(id=f"default/{app}"))

        def gone() -> bool:
            return runner not in [view.runner.id for view in ours.runners(app)] and not leftovers(runner)

        until(gone, f"{runner} and what it had are gone", within_s=END_WITHIN_S)
        assert not alive(pid)
        ours.end()
        until(lambda: not streaming(real), "the mounts are gone as well", within_s=END_WITHIN_S)


def asked_for(origin: HttpOrigin) -> bool:
    return any(request.path.endswith(".safetensors") and "Range" in request.headers for request in origin.requests)


def streaming(real: Cluster) -> list[str]:
    """Mount points of unfinished models on the node."""
    place = f"{real.nodes[NODE].state_dir.resolve()}/"
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [line[4] for line in lines if line[4].startswith(place) and line[line.index("-") + 1].startswith("fuse")]


def test_a_killed_cache_is_not_noticed_by_a_container_with_finished_files_and_serves_the_next_app(
    real: Cluster,
) -> None:
    node = real.nodes[NODE]
    with (
        team(real, "default") as ours,
        model(ours, "finished", *SIZES) as origin, model(ours, "later", *SIZES) as later,
    ):  # fmt: skip
        ours.deploy("reads-on", READS_ON, model="finished")
        runner, pid = ours.running("reads-on")
        assert first_word(pid)["digests"] == digests_of(origin, "default.finished")
        more_reads(pid)
        killed = node.daemon_pid(FSD)
        os.kill(node.process.pid, signal.SIGSTOP)  # so that nobody starts it again while we look
        try:
            os.kill(killed, signal.SIGKILL)
            until(lambda: not alive(killed), "fsd is dead")
            more_reads(pid)
        finally:
            os.kill(node.process.pid, signal.SIGCONT)
        until(lambda: fsd_of(real) not in (0, killed), "the agent started fsd again")

        ours.deploy("comes-later", LISTS, model="later")
        _, next_pid = ours.running("comes-later")
        assert first_word(next_pid)["digests"] == digests_of(later, "default.later")
        more_reads(pid)
        assert [word for word in said(pid)[1:] if not word["good"]] == []
        [view] = ours.runners("reads-on")
        assert (view.runner.id, view.state) == (runner, state_pb2.RUNNER_STATE_IDLE)


def more_reads(pid: int) -> None:
    """Wait until the container has read all its files so many times more."""
    target = len(said(pid)) + MORE_READS
    until(lambda: len(said(pid)) >= target, f"{MORE_READS} more reads", also=lambda: lives(pid))


def fsd_of(real: Cluster) -> int:
    """Its pid, 0 while there is none."""
    with suppress(AssertionError):
        return real.nodes[NODE].daemon_pid(FSD)
    return 0
