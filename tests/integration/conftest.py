"""What integration tests share: one cluster of real processes, made when the first test asks for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e_cluster import Cluster, cluster
from e2e_network import forget_dead_runs

_CGROUP_TREE = Path("/sys/fs/cgroup")


@pytest.fixture(scope="session")
def agent_cgroup() -> Iterator[str]:
    """A cgroup for one agent, in every hierarchy that takes processes as it is; removed at the end."""
    name = f"fe2e-{os.getpid()}"
    wanted = ("pids", "systemd", "unified") if (_CGROUP_TREE / "pids").exists() else ("",)
    forget_dead_runs()
    made = [_CGROUP_TREE / hierarchy / name for hierarchy in wanted if (_CGROUP_TREE / hierarchy).exists()]
    for folder in made:
        folder.mkdir()
    yield name
    for folder in made:
        folder.rmdir()


@pytest.fixture(scope="session")
def shared_cluster(
    tmp_path_factory: pytest.TempPathFactory, agent_cgroup: str, kept_folders: set[Path]
) -> Iterator[Cluster]:
    """Two machines: `box` with containers, its agent in a cgroup of its own, and `lap` with plain processes."""
    folder = tmp_path_factory.mktemp("e")
    kept_folders.add(folder)
    with cluster(folder) as made:
        made.add_node("box", cgroup=agent_cgroup)
        made.add_node("lap", driver="process")
        yield made
    shutil.rmtree(made.root)


@pytest.fixture
def real(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster; the apps that a test makes are deleted after it."""
    before = shared_cluster.apps()
    yield shared_cluster
    for app in shared_cluster.apps() - before:
        shared_cluster.delete(app)
