"""`falctl plan` takes its manifests as words, with `-f` as `app apply` does, or where nothing is named, app.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fal_contract.v1 import cluster_pb2 as pb
from falctl import planning
from falctl.main import app


@pytest.mark.parametrize(
    ("words", "planned"),
    [
        ("a.toml b.toml", ["a", "b"]),
        ("-f b.toml --file a.toml", ["b", "a"]),
        ("b.toml -f a.toml", ["b", "a"]),
        ("", ["app"]),
    ],
)
def test_its_files_are_words_or_options(
    words: str, planned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unary(method: str, request: pb.PlanRequest) -> pb.PlanReply:
        asked.extend(item.app.id for item in request.items)
        return pb.PlanReply(items=[pb.PlannedItem(kind="app", name=name, outcome="unchanged") for name in asked])

    for name in ("a", "b", "app"):
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nteam = "t"\nimage = "host"\ncommand = ["true"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "unary", unary)
    done = CliRunner().invoke(app, ["plan", *words.split()])
    assert (done.exit_code, asked) == (0, [f"t/{name}" for name in planned]), done.output


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan"])
    assert (done.exit_code, "app.toml" in done.output) == (2, True), done.output
