"""`falctl sim place`: what it prints, bad input, and a short run on the real trace where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fal_scheduler.core.fragmentation import WHOLE
from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.openb import arrivals, load, shares_of
from fal_scheduler.sim.placing import POLICIES, Run, once_through
from falctl.main import app

REPOSITORY = Path(__file__).resolve().parents[2]
OPENB = REPOSITORY.parent / "shared" / "data" / "openb"

NODES = "sn,cpu_milli,memory_mib,gpu,model\nb,16000,65536,2,T4\na,32000,65536,8,A10\nc,32000,65536,8,A10\n"
TASKS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"
    "t1,4000,1024,1,1000,\nt2,2000,1024,1,470,\nt3,2000,1024,1,320,T4|A10\nt4,1000,1024,0,0,\nt5,8000,1024,2,1000,A10\n"
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "nodes.csv").write_text(NODES)
    (tmp_path / "tasks.csv").write_text(TASKS)
    return {"nodes": tmp_path / "nodes.csv", "pods": tmp_path / "tasks.csv"}


def run(files: dict[str, Path], *words: str) -> int:
    return main(["place", "--nodes", str(files["nodes"]), "--pods", str(files["pods"]), *words])


def out(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told = json.loads(capsys.readouterr().out)
    assert isinstance(told, dict)
    return told


def test_every_policy_reports_its_figures(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "--policy", "all", "--seeds", "1-2,5", "--json") == 0
    told = out(capsys)["policies"]
    assert [one["policy"] for one in told] == list(POLICIES)
    for one in told:
        assert list(one["per_seed"]) == ["1", "2", "5"]
        assert 0 < one["min"] <= one["mean"] <= one["max"] <= 100
        assert one["decisions_per_s"] > 0


def test_the_same_seed_gives_the_same_result(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for _ in range(2):
        assert run(files, "--policy", "falctl", "--seeds", "7", "--priors", "learnt", "--json") == 0
        told.append(out(capsys)["policies"][0]["per_seed"])
    assert told[0] == told[1]


def test_tasks_that_leave_give_back_what_they_held(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "--policy", "all", "--seeds", "1", "--departures", "--json") == 0
    for one in out(capsys)["policies"]:
        assert one["load"] == 0.95
        assert 0 < one["mean"] <= 95.0 + 2 * 100 / 18  # one task more than the load, at most
        assert 0 <= one["refused_pct"] < 100


def test_bench_times_both_fleets(files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("fal_scheduler.sim.place.BENCH_NODES", 20)
    assert run(files, "--policy", "falctl", "--seeds", "1", "--bench", "--json") == 0
    small, large = out(capsys)["policies"][0]["bench"]
    assert (small["nodes"], small["gpus"], large["nodes"], large["gpus"]) == (3, 18, 20, 160)
    assert 0 < large["p50_ms"] <= large["p99_ms"] <= large["max_ms"]


def test_a_table_for_people(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "--seeds", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "POLICY"
    assert lines[1].split()[0] == "falctl"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "best"], "policy = 'best' is not known"),
        (["--policy", ","], "policy = ',' names none"),
        (["--seeds", "4-2"], "seeds = '4-2' is empty"),
        (["--seeds", "x"], "seeds = 'x' is neither"),
        (["--seeds", "1-9999999"], "more than 1000"),
        (["--arrival", "0"], "arrival = 0.0 is not above 0"),
        (["--arrival", "nan"], "arrival = nan"),
        (["--priors", "none"], "priors = 'none' is not known"),
        (["--nodes", "/nowhere.csv"], "/nowhere.csv cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert run(files, *words, "--json") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "tasks", "told"),
    [
        (NODES.replace("gpu,", "gpus,"), TASKS, "has no column gpu"),
        (NODES.replace("16000", "many"), TASKS, "nodes = 'many' in column cpu_milli, line 2"),
        (NODES, TASKS.replace("470", "1470"), "pods = '1470' in column gpu_milli, line 3"),
        (NODES, TASKS.replace("470", "0"), "must be 1..1000"),
        (NODES, TASKS.splitlines()[0], "has no rows"),
        (NODES, "name,cpu_milli\nt,1", "has no column memory_mib"),
        ("sn,cpu_milli,memory_mib,gpu,model\na,1,1,0,\n", TASKS, "has no GPU"),
        (NODES, TASKS + "t6,1\n", "in column num_gpu, line 7"),
    ],
)
def test_a_wrong_list_is_one_clear_error(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], nodes: str, tasks: str, told: str
) -> None:
    files["nodes"].write_text(nodes)
    files["pods"].write_text(tasks)
    assert run(files) == 1
    assert told in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["place"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        main(["nonsense"])
    assert usage.value.code == 2


def test_falctl_hands_its_words_and_the_exit_code_through(
    files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sim", "place", "--nodes", str(files["nodes"]), "--pods", str(files["pods"]), "--seeds", "1", "--json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert json.loads(capfd.readouterr().out)["policies"][0]["policy"] == "falctl"
    assert CliRunner().invoke(app, [*words, "--policy", "none"]).exit_code == 1
    assert "error: policy = 'none' is not known" in capfd.readouterr().err
    assert CliRunner().invoke(app, ["sim", "place"]).exit_code == 2


@pytest.mark.skipif(not OPENB.exists(), reason=f"the openb trace is not at {OPENB}")
def test_a_tenth_of_the_real_trace() -> None:
    """A tenth of the fleet, so that it saturates soon: ours fills more than FGD, FGD more than best fit."""
    trace = load(OPENB / "openb_node_list_gpu_node.csv", OPENB / "openb_pod_list_default.csv")
    assert trace.capacity_milli == 6212 * WHOLE
    assert len(trace.tasks) == 8152
    whole = arrivals(trace, 42, 1.3)
    assert 10_600 < len(whole) < 11_000
    assert 1.295 < sum(task.gpu_milli * task.num_gpus for task in whole) / trace.capacity_milli <= 1.3
    small = trace._replace(nodes=trace.nodes[::10])
    tasks = whole[:1200]
    filled = {}
    for name in ("falctl", "fgd", "best-fit", "random"):
        one = Run(name, shares_of(small, 42), trace.tasks, seed=42, learnt=False)
        played = once_through(one, tasks, capacity_milli=small.capacity_milli, at_pct=130)
        filled[name] = round(played.allocated_pct, 3)
    # Recorded: a change of any decision shows here.
    assert filled == {"falctl": 96.305, "fgd": 93.585, "best-fit": 93.332, "random": 84.286}
    assert filled["falctl"] > filled["fgd"] > filled["best-fit"] > filled["random"]
