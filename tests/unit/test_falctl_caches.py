"""`falctl cache` on the real handlers and a real engine, without a network: what it prints and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fal_scheduler.api.service as service_module
from cache_facts import GOOD
from fal_contract.cache_key import cache_key
from fal_contract.errors import Code, FalError
from fal_scheduler.core.build_events import FailBuild
from fal_scheduler.core.builds import runner_of_build
from fal_scheduler.leadership import Leadership
from falctl import caches
from falctl.main import app
from loopback import Loopback
from scheduler_rig import ACTOR, join

KEY = cache_key(GOOD)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with Loopback(tmp_path_factory.mktemp("leader")) as made, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(service_module, "_actor", lambda: ACTOR)
        monkeypatch.setattr(caches, "unary", made.unary)
        monkeypatch.setattr(caches, "POLL_S", 0.01)
        made.run(lambda leader: join(leader, "n1"))
        yield made


@pytest.fixture
def facts(tmp_path: Path) -> str:
    file = tmp_path / "facts.toml"
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in GOOD.items()))
    return str(file)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments])


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exception is None, (result.output, result.exception)
    return result.output


def refused(*arguments: str) -> FalError:
    result = run(*arguments)
    assert isinstance(result.exception, FalError), (result.output, result.exception)
    assert result.exception.remedy
    return result.exception


async def fail(leader: Leadership) -> None:
    runner = runner_of_build(leader.view, "cluster", KEY)
    assert runner is not None
    await leader.engine.submit(FailBuild(runner.id, "no compiler"))


def test_a_build_is_begun_shown_and_told_when_it_failed(cluster: Loopback, facts: str) -> None:
    assert "No entries" in ok("list")
    assert refused("lookup", "cluster", "--facts", facts).code is Code.NOT_FOUND
    text = ok("build", "cluster", "--facts", facts, "--detach", "--", "python3", "-m", "compile")
    assert f"cluster {KEY} building, runner system/build-" in text
    assert "building" in ok("list")
    seen = json.loads(ok("lookup", "cluster", "--facts", facts, "--json"))["entry"]
    assert (seen["state"], seen["key"], seen["entry"]) == ("building", KEY, None)
    assert "system/build-" in ok("show", "cluster", KEY[:8])
    cluster.run(fail)
    assert json.loads(ok("list", "--json"))["entries"][0]["reason"] == "no compiler"
    assert "no compiler" in ok("show", "cluster", KEY[:8])
    error = refused("build", "cluster", "--facts", facts, "--pool", "nowhere", "--", "true")
    assert error.field == "pools"


def test_a_build_that_is_waited_for_ends_with_its_error(
    cluster: Loopback, facts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unary(method: str, request: object) -> object:
        view = cluster.unary(method, request)
        asked.append(view.state)
        if asked == ["building"]:
            cluster.run(fail)
        return view

    monkeypatch.setattr(caches, "unary", unary)
    error = refused("build", "cluster", "--facts", facts, "--", "true")
    assert error.code is Code.RUNNER_FAILED
    assert "no compiler" in error.what
    assert asked == ["building", "failed"]


def test_options_win_over_the_file(cluster: Loopback, facts: str) -> None:
    ok("build", "team/a", "--facts", facts, "--fact", "dtype=float16", "--detach", "--", "true")
    (view,) = json.loads(ok("list", "--namespace", "team/a", "--json"))["entries"]
    assert view["key"] == cache_key(GOOD | {"dtype": "float16"})


BAD = [
    ("namespace", ["build", "mine", "--", "true"]),
    ("facts", ["build", "cluster", "--fact", "weights=1", "--", "true"]),
    ("facts", ["lookup", "cluster"]),
    ("--fact", ["lookup", "cluster", "--fact", "dtype"]),
    ("--facts", ["lookup", "cluster", "--facts", "/nonexistent/facts.toml"]),
    ("--within", ["build", "cluster", "--within", "soon", "--", "true"]),
    ("--size-max", ["build", "cluster", "--size-max", "big", "--", "true"]),
    ("namespace", ["list", "--namespace", "x"]),
    ("key", ["evict", "cluster", "abc"]),
]


@pytest.mark.parametrize(("field", "arguments"), BAD, ids=[" ".join(arguments[:3]) for _, arguments in BAD])
def test_wrong_input_names_the_field(cluster: Loopback, field: str, arguments: list[str]) -> None:
    error = refused(*arguments)
    assert (error.code, error.field) == (Code.INVALID, field)


def test_what_is_not_there(cluster: Loopback) -> None:
    assert refused("show", "cluster", "00").code is Code.NOT_FOUND
    assert refused("evict", "cluster", "ab" * 32).code is Code.NOT_FOUND
    assert run("build", "cluster").exit_code == 2


@pytest.mark.parametrize("text", ["a = 1", "a = [", '{"a": "b"}', 'a = "' + "x" * 300_000 + '"'])
def test_a_facts_file_that_is_none(cluster: Loopback, tmp_path: Path, text: str) -> None:
    file = tmp_path / "facts.toml"
    file.write_text(text)
    assert refused("lookup", "cluster", "--facts", str(file)).field == "--facts"


def test_a_facts_file_may_be_json(cluster: Loopback, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(GOOD | {"dtype": "int8"}))
    assert cache_key(GOOD | {"dtype": "int8"}) in refused("lookup", "cluster", "--facts", str(file)).what
