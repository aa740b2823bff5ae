"""Machines are taken out of a real cluster: drained by hand and by a notice while requests run, rebooted, removed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e_cluster import STRANGERS, Cluster, Node, until
from fal_contract.v1 import cluster_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.slow]
MOVED_S = 60.0


@pytest.fixture(scope="module")
def pair(shared_cluster: Cluster) -> Iterator[list[Node]]:
    """Two machines of their own; each watches a file for notices. The first may be rebooted, in vain."""
    made = []
    for at in range(2):
        name = f"away{at}"
        node = shared_cluster.make_node(name, shared_cluster.token(), driver="process", gpus="1xA100-40GB")
        options = ["--notices", f"file:{notice_file(node)}"]
        if at == 0:
            options += ["--reboot-command", "sh -c 'echo no power; exit 7'"]
        node.process.argv = [*node.process.argv, *options]
        node.process.start()
        made.append(node)
    for node in made:
        shared_cluster.wait_node(node.name, "ready")
    yield made
    for node in made:
        node.process.end(signal.SIGKILL)
        if shared_cluster.node(node.name).node.id:
            shared_cluster.call("RevokeNode", pb.RevokeNodeRequest(node=shared_cluster.node(node.name).node.id))


def notice_file(node: Node) -> Path:
    return node.state_dir / "notice.json"


def announce(node: Node, **notice: object) -> None:
    """Written beside and renamed: the agent never reads half of it."""
    beside = node.state_dir / "notice.new"
    beside.write_text(json.dumps(notice))
    beside.replace(notice_file(node))


@contextmanager
def requests(cluster: Cluster, app: str) -> Iterator[list[int]]:
    """One request after the other; statuses of those that ended."""
    over, statuses = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            statuses.append(cluster.post(app, prompt="seven").status)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        over.set()
        thread.join(60.0)


def place(cluster: Cluster, app: str) -> str:
    """The node of its one ready runner; empty while there is none or more."""
    places = list(cluster.ready(app).values())
    return places[0] if len(places) == 1 else ""


def test_runners_leave_by_hand_and_by_a_notice_and_no_request_fails(real: Cluster, pair: list[Node]) -> None:
    real.apply("mover", driver="process", machine_type=["A100-40GB"], pools=[STRANGERS])
    first = place(real, "mover")
    [other] = [node.name for node in pair if node.name != first]
    with requests(real, "mover") as statuses:
        until(lambda: len(statuses) > 3, "requests run")
        shown = real.ask("node", "node", "drain", first, "--deadline", "5m", "--reason", "fan", "--monitor")
        assert shown["node"]["cordon_reason"] == "drained: fan"
        assert place(real, "mover") == other
        assert real.falctl("node", "drain", first, "--cancel").returncode == 0
        assert not real.node(first).node.cordoned

        [noticed] = [node for node in pair if node.name == other]
        announce(noticed, kind="spot", in_s=600, reason="the cloud wants it back")
        until(lambda: place(real, "mover") == first, "it has left again", within_s=MOVED_S)
        view = real.node(other)
        assert (view.node.drain.kind, view.node.cordoned) == ("spot", True)
        assert "the cloud wants it back" in view.node.cordon_reason
        notice_file(noticed).unlink()
        until(lambda: not real.node(other).node.cordoned, "the notice was withdrawn")
        before = len(statuses)
        until(lambda: len(statuses) > before + 3, "requests go on")
    assert set(statuses) == {200}, statuses


def test_a_machine_that_may_not_be_rebooted_and_one_that_cannot(real: Cluster, pair: list[Node]) -> None:
    refused = real.falctl("node", "reboot", pair[1].name)
    assert refused.returncode == 1
    assert "may not reboot its machine" in refused.stderr
    assert not real.node(pair[1].name).node.cordoned

    failed = real.falctl("node", "reboot", pair[0].name, "--monitor")
    assert failed.returncode == 1
    assert "no power" in failed.stderr, failed.stderr
    view = real.node(pair[0].name)
    assert view.node.cordoned
    assert not view.node.HasField("drain")
    alarms = {alarm["kind"]: alarm["message"] for alarm in real.ask("status", "status")["alarms"]}
    assert "ended with 7: no power" in alarms["NODE_NOT_REBOOTED"]
    assert real.falctl("node", "uncordon", pair[0].name).returncode == 0
    until(
        lambda: "NODE_NOT_REBOOTED" not in {one["kind"] for one in real.ask("status", "status")["alarms"]},
        "the alarm is settled",
    )


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["drain", "none"], 1, "node 'none'"),
        (["drain", "away0", "--cancel", "--force"], 1, "--cancel"),
        (["drain", "away0", "--force", "--no-deadline"], 1, "--no-deadline"),
        (["drain", "away0", "--deadline", "soon"], 1, "--deadline"),
        (["drain", "away0", "--deadline", "0s"], 1, "deadline"),
        (["rm", "none"], 1, "node 'none'"),
        (["rm", "away0"], 1, "is in use"),
        (["label", "away0", "disk"], 1, "'disk'"),
        (["label", "away0", "=x"], 1, "'=x'"),
        (["label", "away0", f"a={'x' * 300}"], 1, "is no label"),
    ],
)
def test_wrong_words_are_refused_with_one_error(
    real: Cluster, pair: list[Node], words: list[str], code: int, told: str
) -> None:
    before = real.node("away0")
    done = real.falctl("node", *words)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert code == 2 or done.stderr.startswith("error: ")
    assert real.node("away0").node == before.node


def test_a_pool_in_which_nobody_is_silent_is_not_lost(real: Cluster, pair: list[Node]) -> None:
    done = real.falctl("pool", "declare-lost", STRANGERS, "--yes")
    assert done.returncode == 1
    assert "is silent" in done.stderr
    assert real.falctl("pool", "declare-lost", "none", "--yes").returncode == 1


def test_labels_are_shown_and_a_machine_that_is_gone_is_forgotten(real: Cluster, pair: list[Node]) -> None:
    shown = real.ask("node", "node", "label", "away1", "disk=nvme", "rack=7")
    assert shown["node"]["labels"] == {"disk": "nvme", "rack": "7"}
    assert real.ask("node", "node", "label", "away1", "rack-")["node"]["labels"] == {"disk": "nvme"}
    assert real.falctl("node", "drain", "away1", "--monitor").returncode == 0
    assert real.falctl("node", "rm", "away1").returncode == 0
    assert not real.node("away1").node.id
    assert real.falctl("node", "rm", "away1").returncode == 1
