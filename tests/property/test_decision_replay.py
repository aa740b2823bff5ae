"""Replay: recorded decisions come out the same; what is decided otherwise is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decision_rig import recorded_deploys, recorded_world, replay_folder
from fal_scheduler.core.place import Placement, Placer
from fal_scheduler.core.records import Spec
from fal_scheduler.core.replayer import LoggedIds
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.core.told import BuildFailure
from fal_scheduler.decision_files import segments
from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.replay import replay


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32))
def test_random_histories_replay(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also over seams: what a segment came to is what the next one begins with."""
    folder = tmp_path_factory.mktemp("log")
    recorded_world(seed, folder, steps=80, segment_bytes_max=3_000, block_bytes=1_000)
    report = replay_folder(folder)
    assert report.same, [run.view for run in report.runs if run.difference]
    assert sum(run.steps for run in report.runs) > 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with eighteen placements, and more."""
    folder = tmp_path_factory.mktemp("log")
    recorded_deploys(folder)
    return folder


def test_another_process_decides_the_same(recorded: Path) -> None:
    """Order of sets and hashes of strings differ between processes: what depended on them would show."""
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "fal_scheduler.sim", "replay", str(recorded), "--json"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)["replay"]
        assert told["same"] is True
        assert told["decisions"] >= 18


class _Worst(Placer):
    """A changed rule: the last node that would do."""

    def place(self, spec: Spec, *rest: Any, **more: Any) -> Placement | None:
        best = super().place(spec, *rest, **more)
        if best is None or not best.gpus:
            return best
        fleet = self._fleet
        for node_id in sorted(fleet.facts, reverse=True):
            gpus = fleet.free_gpus(node_id)
            if fleet.facts[node_id].ready and len(gpus) >= len(best.gpus) and node_id != best.node_id:
                return replace(best, node_id=node_id, gpus=gpus[: len(best.gpus)])
        return best


class _Salted(Placer):
    """Nondeterminism: GPUs of the node by a chance that no input decides."""

    def place(self, spec: Spec, *rest: Any, **more: Any) -> Placement | None:
        best = super().place(spec, *rest, **more)
        if best is None or not best.gpus:
            return best
        gpus = SystemRandom().sample(self._fleet.free_gpus(best.node_id), len(best.gpus))
        return replace(best, gpus=tuple(gpus))


@pytest.mark.parametrize("placer", [_Worst, _Salted])
def test_what_is_decided_otherwise_is_found_and_named(placer: type[Placer], recorded: Path) -> None:
    def make(state: State, ids: LoggedIds) -> Core:
        return Core(state, placer(state.fleet), ids)

    report = replay(segments(recorded), make_core=make)
    (run,) = [one for one in report.runs if one.difference is not None]
    assert run.difference is not None
    assert run.difference.part.startswith("changes")
    assert "runner" in run.difference.then
    assert run.difference.then != run.difference.now
    assert run.view["difference"]["entry"] == run.differs_at > 0  # type: ignore[index]


def test_a_core_that_crashes_is_a_difference(recorded: Path) -> None:
    class Crashing(Core):
        __slots__ = ()

        def step(self, event, moment):  # type: ignore[no-untyped-def]
            raise KeyError("planted")

    report = replay(segments(recorded), make_core=lambda state, ids: Crashing(state, Placer(state.fleet), ids))
    (run,) = report.runs
    assert run.difference is not None
    assert "planted" in run.difference.now


def test_what_only_the_end_shows_is_a_difference(recorded: Path) -> None:
    class Forgetful(Core):
        __slots__ = ()

        def step(self, event, moment):  # type: ignore[no-untyped-def]
            outcome = super().step(event, moment)
            self.state.build_failures["ns", "key"] = BuildFailure("planted", "")
            return outcome

    report = replay(segments(recorded), make_core=lambda state, ids: Forgetful(state, Placer(state.fleet), ids))
    (run,) = report.runs
    assert run.difference is not None
    assert run.difference.part == "state at the term's end"
    assert "build_failures" in run.difference.now


def test_an_id_too_many_is_a_difference(recorded: Path) -> None:
    class Wasteful(Core):
        __slots__ = ()

        def step(self, event, moment):  # type: ignore[no-untyped-def]
            outcome = super().step(event, moment)
            if outcome.changes:
                self.ids.suffix()
            return outcome

    report = replay(segments(recorded), make_core=lambda state, ids: Wasteful(state, Placer(state.fleet), ids))
    assert [run.difference.part for run in report.runs if run.difference] == ["ids drawn"]


# --- falctl sim replay


def test_one_log_by_its_name_and_part_of_it(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = recorded.iterdir()
    assert main(["replay", str(path)]) == 0
    assert "the same" in capsys.readouterr().out
    assert main(["replay", str(path), "--from", "20", "--to", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [int(line.split()[0]) for line in lines if line.lstrip()[:1].isdigit()]
    assert numbers == list(range(20, 41))
    assert main(["replay", str(path), "--to", "40", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["replay"]
    assert told["entries"] == 40
    assert told["segments"][0]["difference"] is None


def test_a_difference_ends_with_1_and_shows_both(
    recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fal_scheduler.core.replayer.Placer", _Worst)
    assert main(["replay", str(recorded)]) == 1
    told = capsys.readouterr()
    assert "DIFFERS at entry" in told.out
    assert "  then   " in told.out
    assert "  now    " in told.out
    assert "differ" in told.err


@pytest.mark.parametrize("words", [["nowhere"], ["LOG", "--term", "77"], ["LOG", "--from", "5", "--to", "2"]])
def test_no_log_is_refused(words: list[str], recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *(str(recorded) if word == "LOG" else word for word in words)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", [[], ["x", "--from", "-1"], ["x", "--to", "soon"]])
def test_wrong_usage_is_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["replay", *words])
    assert caught.value.code == 2
