"""Commands that errors, remedies and documents name exist, with the options that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from falctl.main import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ops", "scheduler", "agent", "fsd", "runtime", "proto")
SPAN = re.compile(r"`(?:\$ )?falctl ([a-z][^`\n]*)`")
OPTION = re.compile(r"--[a-z][a-z-]*")


def wrong_in(words: list[str], root: Any) -> str:
    """The first word that no command knows; empty where all is well. `a|b` names both."""
    node = root
    for number, word in enumerate(words):
        commands = getattr(node, "commands", None)
        if commands is None:
            break
        if word.startswith("-"):
            return ""  # an option of the group
        chosen = re.split(r"\\?\|", word.strip(".,;:"))
        if unknown := [one for one in chosen if one not in commands]:
            return " ".join([*words[:number], unknown[0]])
        node = commands[chosen[0]]
    if hasattr(node, "commands") or node.name == "sim":
        return ""  # a group as a whole; the simulator's options are another program's
    known = {name for one in node.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    own = words[: words.index("--")] if "--" in words else words
    return next((found[0] for word in own if (found := OPTION.match(word)) and found[0] not in known), "")


@pytest.fixture(scope="module")
def root() -> Any:
    return typer.main.get_command(app)


def test_each_command_that_is_named_is_there(root: Any) -> None:
    files = [ROOT / "README.md"]
    for folder in FOLDERS:
        files += [one for kind in ("*.py", "*.md") for one in sorted((ROOT / folder).rglob(kind))]
    named, wrong = 0, []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            for span in SPAN.findall(line):
                named += 1
                if unknown := wrong_in(span.split(), root):
                    wrong.append(f"{file.relative_to(ROOT)}:{number}: falctl {span}: {unknown!r} is not there")
    assert not wrong, "\n".join(wrong)
    assert named > 100


@pytest.mark.parametrize(
    ("span", "wrong"),
    [
        ("logs --app a", "logs"),
        ("app rollout status|explode A", "app rollout explode"),
        ("node drain N --at-once", "--at-once"),
        ("runner exec R -- ls --all", ""),
        ("quota set|list", ""),
        ("app", ""),
    ],
)
def test_a_command_that_is_not_there_is_found(root: Any, span: str, wrong: str) -> None:
    assert wrong_in(span.split(), root) == wrong
