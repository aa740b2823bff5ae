"""The engine's decision log: whatever store, nodes and rules do, every term of it replays; also a killed process's."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from core_world import spec_of
from decision_rig import replay_folder
from engine_rig import Rig, deploy
from fal_contract.errors import Code, FalError
from fal_scheduler.core import invariants
from fal_scheduler.core.events import ApplyApp, DeleteApp, ScaleApp
from fal_scheduler.core.invariants import Violation
from fal_scheduler.core.log_entries import Entry, Failed, Froze, Stepped, TakenBack, TermRaised
from fal_scheduler.core.records import Change, Runner, RunnerState, ScaleOverride
from fal_scheduler.core.state import State
from fal_scheduler.decision_files import segments
from fal_scheduler.decision_log import DecisionLog
from fal_scheduler.store.faults import Fault, FaultKind
from scheduler_process import Process, RemoteAgent, cluster, init, joined, node_ready, ready, scheduler
from scheduler_rig import app_request
from virtual_time import run_virtually


def recorded(folder: Path, **bounds: int) -> Rig:
    """An engine that writes its log there."""
    rig = Rig()

    def recorder() -> DecisionLog:
        return DecisionLog(folder, cluster_id="c1", wall_s=rig.clock.wall_s(), **bounds)

    rig.engine._options = replace(rig.engine._options, recorder=recorder, strict=False)
    return rig


def entries(folder: Path) -> list[Entry]:
    return [entry for segment in segments(folder) for entry in segment.entries()]


async def _trouble(rig: Rig) -> None:
    """Deploys, a commit that fails with what was built on it, a higher term, the end of an app."""
    await rig.found(2)
    await rig.engine.submit(deploy("default/a", least=2))
    rig.tell(RunnerState.IDLE)
    rig.store.add(Fault(FaultKind.FAIL, 1.0))
    first = asyncio.create_task(rig.engine.submit(deploy("default/b")))
    await asyncio.sleep(0.5)
    scaled = asyncio.create_task(rig.engine.submit(ScaleApp("default/a", ScaleOverride(min_concurrency=4))))
    failed = await asyncio.gather(first, scaled, return_exceptions=True)
    assert [getattr(one, "code", one) for one in failed] == [Code.STORE_FAILED] * 2
    with pytest.raises(FalError):
        await rig.engine.submit(DeleteApp("default/nothing"))
    await asyncio.sleep(5.0)
    rig.heartbeat("n-0", "n-1")
    await rig.hello("n-0", cluster_id="c1", term_seen=41)
    await rig.engine.submit(deploy("default/b"))
    await rig.engine.submit(DeleteApp("default/a"))
    await asyncio.sleep(5.0)
    await rig.engine.stop()


@pytest.mark.parametrize("segment_bytes_max", [1 << 20, 500], ids=("one segment", "many"))
def test_failed_commits_and_raised_terms_replay(tmp_path: Path, segment_bytes_max: int) -> None:
    """With small segments a snapshot also falls between a decision and its commit."""
    bounds = {"segment_bytes_max": segment_bytes_max, "block_bytes": 200}
    run_virtually(_trouble(recorded(tmp_path, **bounds)))
    kinds = {type(entry) for entry in entries(tmp_path)}
    assert {Failed, TermRaised} <= kinds
    report = replay_folder(tmp_path)
    assert report.same, report.view
    assert (len(report.runs) > 2) is (segment_bytes_max < 10_000)


def test_a_killed_scheduler_leaves_a_log_that_replays(tmp_path: Path) -> None:
    data = tmp_path / "s"
    init(data)

    async def work(process: Process) -> None:
        own = await joined(process, "alpha")
        async with RemoteAgent(process, own), cluster(process) as stub:
            await node_ready(stub)
            await stub.ApplyApp(app_request(runners=2), timeout=10)
            await ready(stub, "t/a", 2)
            async with asyncio.timeout(30):
                while not _runners(data / "decisions"):  # noqa: ASYNC110  (another process writes it)
                    await asyncio.sleep(0.05)

    with scheduler(data) as process:
        asyncio.run(work(process))
        process.end(signal.SIGKILL)
    report = replay_folder(data / "decisions")
    assert report.same, report.view
    assert len(_runners(data / "decisions")) == 2


def _runners(folder: Path) -> set[str]:
    """Runners that the log says were placed."""
    if not list(folder.glob("*.log")):
        return set()
    changes = [change for entry in entries(folder) if isinstance(entry, Stepped) for change in entry.changes]
    return {after.id for _, after in changes if isinstance(after, Runner) and after.node}


def test_a_broken_rule_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = invariants.check

    def check(state: State, changes: Sequence[Change]) -> list[Violation]:
        bad = [one.after.id for one in changes if isinstance(one.after, Runner) and one.after.app == "default/bad"]
        return [*real(state, changes), *(Violation("planted", "no such runner", (id_,)) for id_ in bad)]

    monkeypatch.setattr(invariants, "check", check)

    async def go() -> None:
        rig = recorded(tmp_path)
        await rig.found(1)
        spec, digest = spec_of(gpus=1, least=1)
        with pytest.raises(FalError) as caught:
            await rig.engine.submit(ApplyApp("default/bad", spec, digest))
        assert caught.value.code is Code.INVARIANT
        await rig.engine.submit(deploy("default/good"))
        await rig.engine.stop()

    run_virtually(go())
    told = entries(tmp_path)
    assert {TakenBack, Froze} <= {type(entry) for entry in told}
    assert any(isinstance(entry, Stepped) and entry.error.startswith("INVARIANT: planted") for entry in told)
    report = replay_folder(tmp_path)
    assert report.same, report.view
