"""Wrong words on falctl's command line: one error that names them, before anybody is asked. And how `run` reads on."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import falctl.context
from fal_contract.errors import Code, FalError
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2
from falctl import cost, run
from falctl.main import app
from falctl.planning import is_pool


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: object, **options: object) -> object:
        raise AssertionError("the scheduler was asked")

    monkeypatch.setattr(falctl.context, "call", asked)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("quota set t --gpus 0.0001", "--gpus = 0.0001 is finer than a thousandth"),
        ("quota set t --gpus nan", "--gpus = nan is out of bounds"),
        ("quota set t --gpus=-1", "--gpus = -1.0 is out of bounds"),
        ("node drain n --no-deadline --deadline 5m", "--deadline = '5m' means nothing with --no-deadline"),
        ("node drain n --no-deadline --force", "--no-deadline"),
        ("node label n a=1 a=2", "'a=2' names the label a again"),
        ("node label n a=1 a-", "'a-' names the label a again"),
        ("node label n a- a-", "'a-' names the label a again"),
        ("node label n -", "'-' is no label"),
        ("node label n =", "'=' is no label"),
        ("gpu quarantine n 0 --reason=", "--reason = '' says nothing"),
        ("gpu mig n 0 --layout 1g.10gb --off", "exclude each other"),
        ("node show ", "node '' does not exist"),
        ("gpu show  0", "node '' does not exist"),
        ("gpu topo ", "node '' does not exist"),
        ("quota show ", "TEAM = '' is not a name"),
        ("--team A! app list", "--team = 'A!' is not a name"),
        ("cost --by team --details", "--by = 'team' means nothing with --details"),
        ("cost --of-team A!", "--of-team = 'A!' is not a name"),
        ("cost --since 1h --until 2h", "--since = '1h' is not before --until 2h"),
    ],
)
def test_wrong_words_are_refused_before_anybody_is_asked(words: str, told: str) -> None:
    done = CliRunner().invoke(app, words.split(" "))
    assert isinstance(done.exception, FalError), done.output
    assert told in str(done.exception)
    assert done.exception.remedy
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize(
    ("keys", "pool"),
    [
        ({"name"}, True),
        ({"name", "labels"}, True),
        ({"name", "gpu_hour_price"}, True),
        ({"name", "hour_prise"}, True),
        ({"name", "model"}, False),
        ({"name", "modle"}, False),
        ({"name", "labels", "comand"}, False),
        (set(), False),
    ],
)
def test_plan_tells_a_pools_manifest_from_an_apps_also_with_a_typing_error(keys: set[str], pool: bool) -> None:
    assert is_pool(keys) is pool


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("pool.toml", 'name = "p"\nhour_prise = 1\n', "unknown key 'hour_prise'. Did you mean 'gpu_hour_price'?"),
        ("app.toml", 'name = "a"\nmodle = "m"\n', "unknown key 'modle'. Did you mean 'model'?"),
        ("number.yaml", "1: 2\n", "number.yaml"),
        ("list.yaml", "- 1\n", "holds no table"),
        ("text.yaml", "words\n", "holds no table"),
        ("open.yaml", "a: [1\n", "cannot be parsed"),
        ("empty.toml", "", "name is missing"),
        ("app.txt", "", "neither TOML nor YAML"),
    ],
)
def test_plan_refuses_with_2_what_is_no_manifest(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["plan", str(tmp_path / name)])
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert told in done.output
    assert len(done.output.splitlines()) == 1


def test_three_decimals_of_a_gpu_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unary(method: str, request: pb.SetQuotaRequest) -> pb.QuotaView:
        asked.append(request.gpu_milli)
        return pb.QuotaView(team=request.team)

    monkeypatch.setattr("falctl.quotas.unary", unary)
    for gpus in ("2.001", "0", "1000000", "16.3"):
        assert CliRunner().invoke(app, ["quota", "set", "t", "--gpus", gpus]).exit_code == 0
    assert asked == [2001, 0, 1_000_000_000, 16_300]


@pytest.mark.parametrize("options", [[], ["--by", "pool"], ["--details"]])
def test_a_csv_without_rows_has_the_columns_of_one_with_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    heads = []
    usage = state_pb2.Usage(assignment="a1", app="t/a", gpu_ms=2000)
    row = state_pb2.UsageRow(app="t/a", pool="p", gpu_ms=2000)
    for reply in (pb.GetUsageReply(), pb.GetUsageReply(rows=[row], usages=[usage])):
        monkeypatch.setattr(cost, "unary", lambda method, request, reply=reply: reply)
        file = tmp_path / "cost.csv"
        done = CliRunner().invoke(app, ["cost", "--csv", str(file), *options])
        assert done.exit_code == 0, done.output
        lines = file.read_text().splitlines()
        assert len(lines) == 1 + len(reply.rows)
        heads.append(lines[0])
    assert heads[0] == heads[1]


def _event(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class _Answer:
    """An answer in pieces; `whole` once it was read to its end."""

    def __init__(self, *pieces: bytes | FalError) -> None:
        self.pieces, self.whole = pieces, False

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, FalError):
                raise piece
            yield piece
        self.whole = True


PICTURE = [_event("step", {"i": 1, "n": 1}), _event("output", {"image": base64.b64encode(b"png").decode()})]
BROKEN = FalError(Code.RUNNER_FAILED, "it broke off", remedy="Again.")


def _followed(answer: Any) -> dict[str, Any]:
    return asyncio.run(run._follow(answer, lambda step, steps: None))


def test_an_answer_is_read_to_its_end_so_that_it_counts_as_served() -> None:
    answer = _Answer(*PICTURE, _event("completed", {}), b"")
    assert "image" in _followed(answer)
    assert answer.whole


def test_a_picture_that_is_here_is_not_lost_by_what_comes_after_it() -> None:
    answer = _Answer(*PICTURE, _event("completed", {}), BROKEN)
    assert "image" in _followed(answer)
    with pytest.raises(FalError, match="broke off"):
        _followed(_Answer(PICTURE[0], BROKEN))


def test_an_answer_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for piece in (*PICTURE, _event("completed", {})):
            yield piece
        await asyncio.Event().wait()

    monkeypatch.setattr(run, "_END_WAIT_S", 0.01)
    assert "image" in _followed(SimpleNamespace(chunks=endless))
