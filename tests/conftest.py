"""Options and fixtures of the whole suite.

`--all` runs the counts that were promised (200 crash points, 100 simulation seeds …) and every slow test; without it a
tenth of the counts, with seeds that rotate by the day, and half of the files with slow tests, the other half the
next day. The session ends with both numbers. `--seed N` repeats a run.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from node_leftovers import left_below, own_namespaces

# Before anything imports gRPC: its handlers wait for its own threads whenever a test forks, and a fork that does not
# execute another program at once has been seen to break the channels of the process that it left.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

# A machine that does other things too makes single examples slow; how fast something is belongs to tests/bench.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

_COUNTS: dict[str, tuple[int, int]] = {}
_SLOW: set[tuple[int, int]] = set()  # slow tests that run, of how many
_SLOW_DAYS = 3  # after so many days every slow test has run
_EVERY_DAY = ("test_e2e_life", "test_worker_real", "test_ha", "test_crash_points")

_END_S = 10.0

# Files that take longest, longest first, so that no worker is left alone with one of them at the end.
_LONGEST_FIRST = (
    "test_worker_real", "test_e2e_life", "test_e2e_falctl", "test_oci_driver", "test_e2e_network", "test_e2e_caches",
    "test_scheduler_process", "test_e2e_kills", "test_weights_faults_container", "test_weights_faults_origin",
    "test_weights_faults_node", "test_driver", "test_agent_process", "test_scheduler_failover", "test_swarm",
    "test_fsd_swarm_faults", "test_proxy_nat", "test_proxy_process", "test_fsd_process", "test_mount",
    "test_scheduler_footprint", "test_store_drills", "test_crash_points", "test_disk_kills", "test_peer_faults",
    "test_fsd_swarm", "test_push", "test_simulation", "test_planted_bugs", "test_store_etcd", "test_falctl",
    "test_core_world", "test_data_path", "test_swarm_state", "test_cdi_container", "test_oci_limits",
    "test_device_attach", "test_fleet_plants", "test_ha", "test_ha_network", "test_e2e_nodes", "test_e2e_sharing",
    "test_e2e_gpus", "test_fleet", "test_core_scaling", "test_core_sharing", "test_core_place", "test_decision_replay",
    "test_core_waiting",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the full counts instead of a tenth")
    parser.addoption("--seed", type=int, default=None, help="base seed; default: the number of today")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        # The same for every worker process of one run, another one tomorrow.
        today = datetime.now(UTC).toordinal()  # noqa: TID251  (rotation of seeds, nothing that is decided)
        config.option.seed = int(os.environ.setdefault("FAL_TEST_SEED", str(today)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; without slow tests of another day; skip, with the reason, what this machine cannot do."""
    if not config.getoption("--all"):
        _leave_out(config, items)
    rank = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))  # stable: a file's own order stays
    lacking = {
        "root": None if os.geteuid() == 0 else "needs root",
        "oci": _missing("conmon") or (None if shutil.which("runc") or shutil.which("crun") else "needs runc or crun"),
        "etcd": _missing("etcd"),
        "netns": _missing("ip") if os.geteuid() == 0 else "needs root",
        "gpu": None if Path("/dev/nvidiactl").exists() else "needs an NVIDIA GPU",
    }
    for item in items:
        for marker, why in lacking.items():
            if why is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=why))


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests of files that are another day's; a file that is named on the command line is always today's."""
    named = {Path(argument.partition("::")[0]).stem for argument in config.args}
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    day = int(config.getoption("--seed"))
    files = sorted({item.path.stem for item in slow} - set(_EVERY_DAY))
    today = {stem for number, stem in enumerate(files) if (number + day) % _SLOW_DAYS == 0} | set(_EVERY_DAY) | named
    left_out = [item for item in slow if item.path.stem not in today]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items[:1]:  # a worker process tells by its first report
        item.user_properties.append(("slow", (len(slow) - len(left_out), len(slow))))


def _missing(program: str) -> str | None:
    return None if shutil.which(program) else f"needs {program}"


@pytest.fixture
def base_seed(request: pytest.FixtureRequest) -> int:
    """First seed of this run."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How many of `full` cases this run does: all with --all, else a tenth (at least one)."""

    def count(full: int) -> int:
        run = full if request.config.getoption("--all") else max(1, full // 10)
        request.node.user_properties.append(("scaled", (run, full)))
        return run

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for key, value in report.user_properties:
            if key == "scaled":
                _COUNTS[report.nodeid] = tuple(value)  # type: ignore[assignment]
            elif key == "slow":
                _SLOW.add(tuple(value))  # type: ignore[arg-type]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _COUNTS:
        terminalreporter.section(f"scaled counts (base seed {config.getoption('--seed')})")
        for nodeid, (run, full) in sorted(_COUNTS.items()):
            terminalreporter.write_line(f"{run:>5} of {full:<5} {nodeid}")
    for run, full in sorted(_SLOW):
        if run < full:
            days = f"each runs every {_SLOW_DAYS} days, all with --all"
            terminalreporter.write_line(f"{run:>5} of {full:<5} slow tests; {days}")


@pytest.fixture(scope="session")
def kept_folders() -> set[Path]:
    """Folders of what lives longer than one file of tests; who made it also sees to its end."""
    return set()


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory, kept_folders: set[Path]) -> Iterator[None]:
    """A file of tests ends its processes and threads, and unmounts what it mounted."""
    folder, threads = tmp_path_factory.getbasetemp(), set(threading.enumerate())

    def found() -> set[str]:
        return {*left_below(folder, but=kept_folders), *own_namespaces(), *_new_threads(threads)}

    before = found()  # told of the file that left it
    yield
    until_s = time.monotonic() + _END_S
    while left := found() - before:
        if time.monotonic() > until_s:
            pytest.fail(f"still on this machine: {sorted(left)}")
        time.sleep(0.05)  # what was told to end needs a moment, and nothing tells when it did


def _new_threads(before: set[threading.Thread]) -> list[str]:
    """Threads that began since; gRPC's and those of xdist live as long as the process."""
    new = set(threading.enumerate()) - before
    return [f"thread {thread.name}" for thread in new if thread.is_alive() and not thread.daemon]


@pytest.fixture(scope="session", autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    """Tests start from an environment without falctl's own variables."""
    kept = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("FAL_") and key != "FAL_TEST_SEED"}
    yield
    os.environ.update(kept)
