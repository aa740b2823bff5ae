"""Style that matters is a test: short functions, small modules, no vague names, pure cores."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = (
    "proto/fal_contract", "scheduler/fal_scheduler", "scheduler/fal_gateway", "agent/fal_agent",
    "runtime/fal_runtime", "fsd/fal_fsd", "ops/falctl",
)  # fmt: skip
LINES_PER_FUNCTION_MAX = 60
LINES_PER_MODULE_MAX = 450
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
IMPURE = {"asyncio", "time", "random", "socket", "logging", "structlog", "grpc", "aiohttp", "sqlite3", "subprocess"}


def modules() -> list[Path]:
    return [path for root in ROOTS for path in sorted((REPOSITORY / root).rglob("*.py")) if "_pb2" not in path.name]


def test_functions_fit_on_a_screen() -> None:
    offenders = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LINES_PER_FUNCTION_MAX:
                    offenders.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name} is {length} lines")
    assert not offenders, "\n".join(offenders)


def test_modules_are_one_room() -> None:
    offenders = [
        f"{path.relative_to(REPOSITORY)} has {count} lines"
        for path in modules()
        if (count := path.read_text().count("\n")) > LINES_PER_MODULE_MAX
    ]
    assert not offenders, "\n".join(offenders)


def test_no_module_has_a_vague_name() -> None:
    assert not [str(path) for path in modules() if path.stem in VAGUE or path.parent.name in VAGUE]


def test_every_module_says_what_it_is() -> None:
    offenders = [
        str(path.relative_to(REPOSITORY))
        for path in modules()
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not offenders, "no module docstring: " + ", ".join(offenders)


def test_pure_modules_import_nothing_impure() -> None:
    """A core package, and every module whose docstring says so, decides without clock, I/O and chance."""
    offenders = []
    for path in modules():
        tree = ast.parse(path.read_text())
        says_pure = re.search(r"\bPure\b", ast.get_docstring(tree) or "") is not None
        if "core" not in path.parts and not says_pure:
            continue
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # A type such as random.Random may be named; nothing may be drawn from the module itself.
                names = [] if node.module == "random" else [node.module]
            offenders += [
                f"{path.relative_to(REPOSITORY)}:{node.lineno} imports {name}"
                for name in names
                if name.split(".")[0] in IMPURE
            ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("package", [Path(root).name for root in ROOTS])
def test_packages_import(package: str) -> None:
    importlib.import_module(package)
