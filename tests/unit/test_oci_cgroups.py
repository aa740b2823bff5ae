"""Where the kernel's count of deaths for memory is read, in trees of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fal_runtime.oci import cgroups


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is remembered of this machine's tree is not for the trees here, nor theirs for it."""
    cgroups._oom_files.cache_clear()
    yield
    cgroups._oom_files.cache_clear()


def tree(folder: Path, monkeypatch: pytest.MonkeyPatch, *, v1: bool, v2: bool) -> None:
    """A fake tree: cpu of v1 and, as wanted, memory of v1 and the unified hierarchy."""
    (folder / "cpu").mkdir()
    wanted = [folder / "cpu"]
    if v1:
        (folder / "memory").mkdir()
        (folder / "memory" / "memory.oom_control").write_text("oom_kill 0\n")
        wanted.append(folder / "memory")
    if v2:
        (folder / "unified").mkdir()
        (folder / "unified" / "cgroup.controllers").write_text("memory\n")
        wanted.append(folder / "unified")
    monkeypatch.setattr(cgroups, "hierarchies", lambda: wanted)


@pytest.mark.parametrize("kind", ["v1", "v2", "hybrid"])
def test_deaths_are_read_where_they_are_counted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, monkeypatch, v1=kind != "v2", v2=kind != "v1")
    where = ("unified", "memory.events") if kind == "v2" else ("memory", "memory.oom_control")
    file = tmp_path / where[0] / "falctl" / "one" / where[1]
    assert cgroups.oom_kills("/falctl/one") == 0  # it is gone, or was never there
    file.parent.mkdir(parents=True)
    file.write_text("low 0\nunder_oom 0\noom_kill 3\n")
    assert cgroups.oom_kills("/falctl/one") == 3


def test_in_a_hybrid_tree_the_unified_hierarchy_may_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, monkeypatch, v1=True, v2=True)
    file = tmp_path / "unified" / "falctl" / "one" / "memory.events"
    file.parent.mkdir(parents=True)
    file.write_text("oom 1\noom_kill 1\noom_group_kill 0\n")
    assert cgroups.oom_kills("/falctl/one") == 1
