"""Every test that ops/docs/isolation.md names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "ops/docs/isolation.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def functions_of(name: str) -> set[str]:
    """Functions of the test files of this name; there are no two of one name that both matter here."""
    found: set[str] = set()
    for path in (REPOSITORY / "tests").rglob(name):
        tree = ast.parse(path.read_text())
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def promises() -> list[str]:
    lines = PAGE.read_text().split("## Promised")[1].split("## Not promised")[0].splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]


def test_each_promise_names_tests_and_each_exists() -> None:
    assert len(promises()) > 20
    assert [line for line in promises() if not NAMED.search(line)] == []
    missing = [f"{file}::{test}" for file, test in NAMED.findall(PAGE.read_text()) if test not in functions_of(file)]
    assert missing == []


def test_every_hostile_test_is_on_the_page() -> None:
    shown = {test for file, test in NAMED.findall(PAGE.read_text()) if file == "test_hostile.py"}
    assert shown == {name for name in functions_of("test_hostile.py") if name.startswith("test_")}
