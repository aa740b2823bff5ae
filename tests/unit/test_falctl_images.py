"""`falctl image` on the real handlers and a real engine, without a network: what it prints and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fal_scheduler.api.service as service_module
from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2
from fal_scheduler.core.build_events import FailBuild
from fal_scheduler.core.builds import runner_of
from fal_scheduler.core.model_events import AddModel
from fal_scheduler.core.pack_events import PutImage
from fal_scheduler.core.packs import pack_of
from fal_scheduler.core.records import ImageFacts, Model, ModelState
from fal_scheduler.leadership import Leadership
from falctl import image_push, images, weights_stage, weights_where
from falctl.main import app
from loopback import Loopback
from scheduler_rig import ACTOR, join

SOURCE = "docker://registry/repo:1"
pytestmark = pytest.mark.timeout(60)
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with Loopback(tmp_path_factory.mktemp("leader")) as made, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(service_module, "_actor", lambda: ACTOR)
        for module in (images, weights_stage, weights_where):
            monkeypatch.setattr(module, "unary", made.unary)
        monkeypatch.setattr(images, "_last_line", lambda runner: "pulling 7 layers")
        monkeypatch.setattr(images, "POLL_S", 0.01)
        monkeypatch.setattr(images, "current_profile", lambda: None)
        made.run(lambda leader: join(leader, "n1"))
        yield made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["--team", "t", "image", *arguments])


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exception is None, (result.output, result.exception)
    return result.output


def refused(*arguments: str) -> FalError:
    result = run(*arguments)
    assert isinstance(result.exception, FalError), (result.output, result.exception)
    assert result.exception.remedy
    return result.exception


def model(name: str) -> Model:
    return Model(
        f"t/{name}", "image", SOURCE, ModelState.ATTESTED, "ef" * 32, 3 << 20, 2, artifact_id="12" * 32,
        resolved_uri="push://ingest", attestation="pack", attested_by="n1",
        image=ImageFacts(SOURCE, DIGEST, "erofs", "linux/amd64", (), 1 << 20),
    )  # fmt: skip


def finish(cluster: Loopback, name: str) -> None:
    async def body(leader: Leadership) -> None:
        found = pack_of(leader.view, f"t/{name}")
        assert found is not None
        runner = runner_of(leader.view, found[0])
        assert runner is not None
        await leader.engine.submit(PutImage(model(name), runner.id))

    cluster.run(body)


def fail(cluster: Loopback, name: str, why: str) -> None:
    async def body(leader: Leadership) -> None:
        found = pack_of(leader.view, f"t/{name}")
        assert found is not None
        runner = runner_of(leader.view, found[0])
        assert runner is not None
        await leader.engine.submit(FailBuild(runner.id, why))

    cluster.run(body)


def test_an_image_is_added_watched_shown_warmed_and_removed(cluster: Loopback) -> None:
    assert "No images" in ok("list")
    text = ok("add", "img", SOURCE, "--no-watch")
    assert "image t/img packing" in text
    assert "system/pack-" in text
    assert "packing" in ok("list")
    shown = json.loads(ok("show", "img", "--json"))["image"]
    assert (shown["id"], shown["state"], shown["model"]) == ("t/img", "packing", None)
    assert "has not been heard" in shown["reason"]  # n1 never spoke
    assert refused("where", "img").code is Code.FAILED_PRECONDITION
    assert "being packed" in str(refused("warm", "img", "--replicas", "1"))
    finish(cluster, "img")
    assert DIGEST in ok("add", "img", SOURCE)  # there already
    (row,) = [line for line in ok("list").splitlines() if "t/img" in line]
    assert "ready" in row
    assert "abababababab" in row
    assert json.loads(ok("list", "--json"))["images"][0]["model"]["image"]["format"] == "erofs"
    text = ok("show", "img")
    for part in ("3.0 MiB", "1.0 MiB in the registry", DIGEST, "no start was recorded", "pack; told by n1"):
        assert part in text
    assert "t/img: node/" in ok("warm", "img", "--to", "node/n1")
    staged = json.loads(ok("warm", "t/img", "--to", "pool/p", "--ttl", "2h", "--json"))["staged"]
    assert {"node/n1", "pool/p", "replicas"} == {wish["target"] for wish in staged["wishes"]}
    assert "No node has it" in ok("where", "img")
    assert json.loads(ok("where", "img", "--json"))["where"]["bytes_total"] == 3 << 20
    assert "no node has it" in ok("verify", "img")
    assert json.loads(ok("rm", "img", "--json"))["removed"]["outcome"] == "removed"
    assert "No images" in ok("list")


def test_waiting_ends_with_the_reason_and_the_last_lines(cluster: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = 0

    def unary(method: str, request: Any) -> Any:
        nonlocal polls
        view = cluster.unary(method, request)
        if method == "GetImage":
            polls += 1
            if polls == 2:
                raise FalError(Code.UNAVAILABLE, "a new leader", remedy="Again.")
            if polls == 3:
                fail(cluster, "bad", "no such tag")
            if view.state == "failed":
                view.log_tail.append("\x1b[2Jerror: no such tag")
        return view

    monkeypatch.setattr(images, "unary", unary)
    result = run("add", "bad", SOURCE)
    assert isinstance(result.exception, FalError)
    assert result.exception.code is Code.RUNNER_FAILED
    assert "no such tag" in str(result.exception)
    assert "pulling 7 layers" in result.output  # on the way
    assert "\x1b" not in result.output
    assert "failed" in ok("list")
    assert "could not be packed" in str(refused("verify", "bad"))
    assert "removed" in ok("rm", "bad")


def test_a_task_is_cancelled_by_name(cluster: Loopback) -> None:
    ok("add", "soon", SOURCE, "--no-watch")
    assert "image t/soon cancelled" in ok("rm", "soon")
    assert refused("show", "soon").code is Code.NOT_FOUND


def test_a_local_source_is_packed_here_and_pushed(cluster: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def push(profile: Any, id_: str, source: str, options: image_push.PushOptions, *, say: Any) -> None:
        say("unpacking 1 layers")
        asked.append((id_, source, options))

        async def body(leader: Leadership) -> None:
            pushed = replace(model("here"), uri="push://t/here", attestation="push", attested_by="ann")
            await leader.engine.submit(AddModel(pushed, ACTOR))

        cluster.run(body)

    monkeypatch.setattr(image_push, "push_image", push)
    result = run("add", "here", "rootfs:/srv/root", "--pool", "p", "--size-max", "1GiB", "--work", "/var/tmp")
    assert result.exception is None, result.exception
    assert "image t/here ready" in result.output
    ((id_, source, options),) = asked
    assert (id_, source, options.pool, options.bytes_max, options.work) == (
        "t/here", "rootfs:/srv/root", "p", 1 << 30, Path("/var/tmp"),
    )  # fmt: skip
    ok("rm", "here")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("add", "a/b/c", SOURCE), "b/c"),
        (("add", "img", "registry/repo"), "names no place"),
        (("add", "img", "ftp://registry/repo"), "is no registry's"),
        (("add", "img", "docker://u:hunter2@registry/repo"), "--auth-secret"),
        (("add", "img", SOURCE, "--within", "soon"), "--within"),
        (("add", "img", SOURCE, "--within", "90d"), "timeout_s"),
        (("add", "img", SOURCE, "--size-max", "much"), "--size-max"),
        (("add", "img", SOURCE, "--size-max", "0"), "--size-max"),
        (("add", "img", SOURCE, "--within", "0s"), "--within"),
        (("add", "img", SOURCE, "--pool", "nowhere"), "nowhere"),
        (("add", "img", SOURCE, "--platform", "plan9/mips"), "plan9/mips"),
        (("add", "img", SOURCE, "--auth-secret", "none"), "not set"),
        (("add", "img", SOURCE, "--work", "/tmp"), "--work"),
        (("add", "img", "rootfs:/x", "--auth-secret", "s"), "--auth-secret"),
        (("add", "img", "rootfs:/x", "--pool", "a", "--pool", "b"), "one pool"),
        (("add", "img", "rootfs:/x", "--work", "/nonexistent"), "--work"),
        (("show", "missing"), "missing"),
        (("warm", "missing", "--replicas", "1"), "missing"),
        (("where", "missing"), "missing"),
        (("verify", "missing"), "missing"),
        (("rm", "missing"), "missing"),
        (("rm", "system/x"), "system"),
    ],
)
def test_wrong_input_is_refused_with_one_clear_error(cluster: Loopback, arguments: tuple[str, ...], text: str) -> None:
    error = refused(*arguments)
    assert text in str(error)
    assert "hunter2" not in str(error)
    assert not cluster.run(_packs)


async def _packs(leader: Leadership) -> list[str]:
    return [task.image for task in leader.view.catalog.builds.values()]


def test_where_and_warm_refuse_what_their_models_would(cluster: Loopback) -> None:
    ok("add", "more", SOURCE, "--no-watch")
    finish(cluster, "more")
    assert "--to" in str(refused("warm", "more"))
    assert "nowhere" in str(refused("warm", "more", "--to", "pool/nowhere"))
    assert "--watch" in str(refused("where", "more", "--watch", "--json"))
    assert "n9" in str(refused("verify", "more", "--node", "n9"))
    ok("rm", "more")


def test_a_model_is_not_removed_as_an_image(cluster: Loopback) -> None:
    async def body(leader: Leadership) -> None:
        await leader.engine.submit(AddModel(replace(model("weights"), kind="model", image=None), ACTOR))

    async def there(leader: Leadership) -> bool:
        return "t/weights" in leader.view.models

    cluster.run(body)
    assert refused("rm", "weights").code is Code.NOT_FOUND
    assert cluster.run(there)


def test_facts_of_an_image_travel(cluster: Loopback) -> None:
    """Every field of the message has a place in the record."""
    facts = state_pb2.ImageFacts(
        source="s", digest="d", format="erofs", platform="p", first_pieces=[3, 1], layer_bytes=9
    )
    from fal_scheduler.codec_weights import image_from_pb, image_to_pb

    assert image_to_pb(image_from_pb(facts)) == facts
