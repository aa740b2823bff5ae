"""`falctl weights` on the real handlers and a real engine, without a network: what it prints and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fal_scheduler.api.service as service_module
import falctl.context
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2, fsd_pb2
from fal_scheduler.core.model_events import AddModel, RefuseModel
from fal_scheduler.core.records import Model
from fal_scheduler.leadership import Leadership
from falctl import weights, weights_stage, weights_where
from falctl.main import app
from falctl.weights_where import follow, progress_line, progress_of, rows_of
from loopback import Loopback
from scheduler_rig import ACTOR, join

GIB = 1 << 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with Loopback(tmp_path_factory.mktemp("leader")) as made, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(service_module, "_actor", lambda: ACTOR)
        for module in (weights, weights_stage, weights_where):
            monkeypatch.setattr(module, "unary", made.unary)
        monkeypatch.setattr(falctl.context, "call", made.call)
        monkeypatch.setattr(falctl.context.GLOBALS, "team", "t")
        made.run(lambda leader: join(leader, "n1"))
        model = Model("t/m", "lora", "s3://b/m", bytes=3 * GIB, files=2, artifact_id="ab" * 32, resolved_uri="s3://b/m")
        made.run(lambda leader: leader.engine.submit(AddModel(model)))
        yield made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["--team", "t", "weights", *arguments])


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exception is None, (result.output, result.exception)
    return result.output


def refused(*arguments: str) -> FalError:
    result = run(*arguments)
    assert isinstance(result.exception, FalError), (result.output, result.exception)
    assert result.exception.remedy
    return result.exception


def test_a_folder_is_added_listed_shown_and_revoked(cluster: Loopback, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"a" * 1000)
    assert "model t/digits attested: 1 files, 1000 B" in ok("add", "digits", str(folder))
    shown = json.loads(ok("list", "--json"))
    assert [x["model"]["id"] for x in shown["models"]] == ["t/digits", "t/m"]
    assert shown["models"][0]["model"]["state"] == "ATTESTED"
    assert "t/m" not in ok("list", "--prefix", "dig")
    assert "t/digits" not in ok("list", "--kind", "lora")
    assert "1 of 2 models" in ok("list", "--limit", "1")
    text = ok("show", "digits")
    assert "the scheduler read the folder; told by scheduler" in text
    assert "a.safetensors" in text
    assert "1 of 4.0 MiB" in text
    facts = json.loads(ok("show", "digits", "--json"))["model"]
    assert len(facts["model"]["artifact_id"]) == 64
    assert "revoked: licence ended" in ok("revoke", "digits", "-m", "licence ended")
    assert refused("add", "digits", str(folder)).code is Code.FAILED_PRECONDITION
    assert refused("stage", "digits", "--replicas", "1").code is Code.FAILED_PRECONDITION
    assert "0 models" in ok("gc"), "the cache of n1 is out of reach: it may have it, and must be told"
    bad = Model("t/bad", "model", "s3://b/bad", artifact_id="cd" * 32)
    cluster.run(lambda leader: leader.engine.submit(AddModel(bad)))
    cluster.run(lambda leader: leader.engine.submit(RefuseModel("t/bad", "wrong bytes")))
    assert "t/bad would go" in ok("gc", "--dry-run")
    assert json.loads(ok("gc", "--json"))["collected"]["models"] == ["t/bad"]
    assert refused("show", "bad").code is Code.NOT_FOUND
    assert "revoked" in ok("show", "digits")


def test_wishes_are_made_shown_and_taken_back(cluster: Loopback) -> None:
    assert "t/m: node/n1, disk, for 2h00m more" in ok("stage", "m", "--to", "node/name-n1", "--ttl", "2h")
    assert "pool/p, memory, until it is taken back" in ok("pin", "m", "--to", "pool/p", "--tier", "memory")
    staged = json.loads(ok("stage", "m", "--replicas", "3", "--json"))["staged"]
    assert [x["target"] for x in staged["wishes"]] == ["node/n1", "pool/p", "replicas"]
    assert staged["nodes"] == ["name-n1"]
    assert "wish" in ok("show", "m")
    assert "pool/p" not in ok("unpin", "m", "--to", "pool/p")
    assert "replicas" not in ok("unstage", "m", "--replicas")
    assert "nobody wishes it anywhere" in ok("unstage", "m")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("stage", "no", "--replicas", "1"), Code.NOT_FOUND, "t/no"),
        (("stage", "m"), Code.INVALID, "--to"),
        (("stage", "m", "--to", "pool/p", "--replicas", "2"), Code.INVALID, "--replicas"),
        (("stage", "m", "--to", "pool/no"), Code.NOT_FOUND, "'no'"),
        (("stage", "m", "--to", "node/no"), Code.NOT_FOUND, "'no'"),
        (("stage", "m", "--to", "region/eu"), Code.INVALID, "region/eu"),
        (("stage", "m", "--to", "pool/p", "--tier", "tape"), Code.INVALID, "tape"),
        (("stage", "m", "--to", "pool/p", "--ttl", "soon"), Code.INVALID, "--ttl"),
        (("stage", "m", "--to", "pool/p", "--ttl", "9999d"), Code.INVALID, "ttl_s"),
        (("stage", "m", "--to", "pool/p", "--within", "soon"), Code.INVALID, "--within"),
        (("stage", "m", "--to", "pool/p", "--watch", "--json"), Code.INVALID, "--watch"),
        (("stage", "m", "--replicas", "99999999"), Code.INVALID, "replicas"),
        (("stage", "Not A Name", "--replicas", "1"), Code.INVALID, "NAME"),
        (("unstage", "m", "--to", "pool/p"), Code.NOT_FOUND, "pool/p"),
        (("unstage", "m", "--to", "pool/p", "--replicas"), Code.INVALID, "--replicas"),
        (("unstage", "no"), Code.NOT_FOUND, "t/no"),
        (("unpin", "m", "--to", "p"), Code.INVALID, "'p'"),
        (("revoke", "no"), Code.NOT_FOUND, "t/no"),
        (("revoke", "m", "-m", "two\nlines"), Code.INVALID, "reason"),
        (("show", "no"), Code.NOT_FOUND, "t/no"),
        (("where", "m", "--within", "soon"), Code.INVALID, "--within"),
        (("where", "m", "--watch", "--json"), Code.INVALID, "--watch"),
        (("add", "x", "ftp://host/x"), Code.INVALID, "ftp"),
        (("add", "x", "nowhere/at/all"), Code.INVALID, "file://"),
        (("add", "x", "file:///tmp", "--rev", "main"), Code.INVALID, "revision"),
        (("add", "x", "file:///tmp", "--kind", "adapter"), Code.INVALID, "adapter"),
        (("add", "x", "push://x"), Code.INVALID, "push"),
        (("add", "m", "hf://"), Code.INVALID, "hf"),
        (("list", "--limit", "1", "--kind", "adapter"), None, ""),
    ],
)
def test_every_wrong_input_is_one_error_and_changes_nothing(
    cluster: Loopback, arguments: tuple[str, ...], code: Code | None, words: str
) -> None:
    async def records(leader: Leadership) -> tuple[dict[str, Model], dict[str, Any]]:
        return dict(leader.view.models), dict(leader.view.wishes)

    before = cluster.run(records)
    if code is None:
        assert "No models" in ok(*arguments)
    else:
        error = refused(*arguments)
        assert error.code is code
        assert words in error.what
    assert cluster.run(records) == before


def test_pickles_are_refused_unless_they_are_allowed(cluster: Loopback, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.ckpt").write_bytes(b"a")
    error = refused("add", "old", str(folder))
    assert (error.code, "--allow-pickle" in error.remedy) == (Code.INVALID, True)
    assert "attested" in ok("add", "old", str(folder), "--allow-pickle")
    assert "pickles" in ok("show", "old")


# --- progress ---------------------------------------------------------------------------------------------------------


def node(name: str, **cached: Any) -> cluster_pb2.ModelOnNode:
    ready_in_s = cached.pop("ready_in_s", -1.0)
    return cluster_pb2.ModelOnNode(
        node_id=f"id-{name}", node=name, pool="p", ready_in_s=ready_in_s, cached=fsd_pb2.CachedArtifact(**cached)
    )


def reply(*nodes: cluster_pb2.ModelOnNode) -> cluster_pb2.WhereModelReply:
    return cluster_pb2.WhereModelReply(nodes=nodes, bytes_from_origin=4 * GIB, bytes_total=4 * GIB)


FIRST = reply(
    node("a", bytes_disk=GIB, wanted=True, rate_bytes_s=1 << 20, ready_in_s=30.0, bytes_from_origin=GIB),
    node("b", wanted=True, waits_for="no route to any holder"),
)
SECOND = reply(node("a", ready=True, bytes_disk=4 * GIB), node("b", bytes_disk=2 * GIB, ready_in_s=5.0))
THIRD = reply(node("a", ready=True), node("b", ready=True, bytes_memory=4 * GIB))


def test_progress_counts_nodes_bytes_and_the_origin() -> None:
    assert progress_line(progress_of(FIRST, [])) == (
        "0 of 2 nodes ready, 12 %, 1.0 MiB/s, ready: cannot be said yet, origin read 1.00 times"
    )
    assert progress_line(progress_of(SECOND, [])) == (
        "1 of 2 nodes ready, 75 %, 0 B/s, ready in 5.0s, origin read 1.00 times"
    )
    done = progress_of(THIRD, ["a", "b"])
    assert (done.done, progress_line(done)) == (True, "2 of 2 nodes ready, 100 %, origin read 1.00 times")
    assert not progress_of(THIRD, ["a", "b", "c"]).done, "a node that has told nothing yet is not ready"
    assert progress_of(THIRD, ["a"]).nodes == 1
    assert progress_of(cluster_pb2.WhereModelReply(), []).done, "nobody brings it"


def test_rows_say_what_holds_a_node_up() -> None:
    assert [row[2] for row in rows_of(FIRST)] == ["25 %", "0 %"]
    assert [row[-1] for row in rows_of(FIRST)] == ["-", "no route to any holder"]
    assert [row[2] for row in rows_of(THIRD)] == ["ready", "ready, in memory"]


def test_following_tells_changes_and_ends_when_all_are_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [FIRST, FIRST, SECOND, THIRD]
    asked: list[cluster_pb2.WhereModelRequest] = []

    def unary(method: str, request: cluster_pb2.WhereModelRequest) -> cluster_pb2.WhereModelReply:
        asked.append(request)
        return replies[len(asked) - 1]

    monkeypatch.setattr(weights_where, "unary", unary)
    monkeypatch.setattr(weights_where, "POLL_S", 0.0)
    follow("t/m", ["a", "b"], timeout_s=60)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "0 of 2 nodes ready", "a ready", "1 of 2 nodes ready", "b ready", "2 of 2 nodes ready",
    ]  # fmt: skip
    assert len(asked) == 4
    assert asked[0].all, "nodes that have nothing yet are awaited, too"


def test_following_ends_with_an_error_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_where, "unary", lambda method, request: FIRST)
    monkeypatch.setattr(weights_where, "POLL_S", 0.0)
    with pytest.raises(FalError, match="0 of 2 nodes ready") as caught:
        follow("t/m", [], timeout_s=0.0)
    assert caught.value.code is Code.TIMEOUT


def test_many_rows_are_printed_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    from falctl.output import PRETTY_ROWS_MAX, print_table

    print_table(("A", "LONG"), [(str(number), "x") for number in range(PRETTY_ROWS_MAX + 1)], empty="")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A     LONG", "0     x"]
    assert len(lines) == PRETTY_ROWS_MAX + 2


def test_what_others_wrote_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closing tag that opens nothing would be an error of the printing library's markup."""
    from falctl.output import console, print_facts, print_table, status_line

    text = "no [/usr/bin/x] in [red]"
    print_table(("A",), [(text,)], empty="")
    print_facts([("reason", text)])
    console().print(text)
    monkeypatch.setenv("FORCE_COLOR", "1")  # taken for a terminal
    with status_line(text) as say:
        say(text)
    assert capsys.readouterr().out.count("[/usr/bin/x] in [red]") >= 4
