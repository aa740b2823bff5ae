"""`falctl sim whatif`: a log made by the model itself comes out as it was; changes change what they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from core_world import GIB, CountingIds, sim_gpus, spec_of
from decision_rig import RecordedCore
from fal_contract.errors import Code, FalError
from fal_scheduler.core.events import ApplyApp, NodeHello
from fal_scheduler.core.model_events import AddModel
from fal_scheduler.core.place import Placer
from fal_scheduler.core.records import Change, Meta, Model, Node, Pool, Scaling, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.core.told import Capabilities, Inventory
from fal_scheduler.decision_files import segments
from fal_scheduler.decision_log import DecisionLog
from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.whatif import Added, Changes, compare, figures, parse_knob, parse_nodes
from fal_scheduler.sim.whatif_log import Durations, Recorded, read
from fal_scheduler.sim.whatif_model import Fleet, Outcome

WALL_S = 1_700_000_000.0
NOW_S = 5000.0
LASTS_S = 1800.0
PRICE_MICROS = 2_000_000


def state_of(nodes: int) -> State:
    """A pool with a price and nodes with two GPUs each; the term's grace is over."""
    state = State()
    state.term, state.term_began_s, state.grace_over = 1, NOW_S - 1000.0, True
    records = [
        Pool("p", gpu_hour_price_micros=PRICE_MICROS),
        *(Node(f"n-{at}", f"node{at}", "p") for at in range(nodes)),
    ]
    state.apply(Change("meta", None, Meta("c1", 1, "store", 0.0)))
    for record in records:
        state.apply(Change(key_of(record), None, record))
    return state


def record(folder: Path, *, nodes: int = 2, apart_s: float = 25.0, lasts_s: float = LASTS_S) -> Outcome:
    """Two apps on a modelled fleet for a while, with a decision log; what really came of it."""
    state, rng = state_of(nodes), Random(5)
    durations = Durations(
        cold={"default/a": [40.0], "default/b": [60.0]}, warm={"default/a": [15.0], "default/b": [20.0]},
        busy_s={"default/a": 4.0, "default/b": 6.0}, served={"default/a": 1, "default/b": 1},
    )  # fmt: skip
    fleet = Fleet(state, durations, start_s=WALL_S, offset_s=WALL_S - NOW_S)
    log = DecisionLog(folder, cluster_id="c1", wall_s=WALL_S)
    fleet.core = RecordedCore(Core(state, Placer(state.fleet), CountingIds()), log)
    for at in range(nodes):
        inventory = Inventory(1, sim_gpus(f"n-{at}", 2, "H100-80GB", 80), "555", "12.4", 64_000, 512 * GIB)
        hello = NodeHello(f"n-{at}", "", f"boot-{at}", 0.0, inventory=inventory, capabilities=Capabilities("process"))
        fleet.at(WALL_S, fleet.hello, hello)
    fleet.at(WALL_S + 0.5, fleet.command, AddModel(Model("default/m", "model", "s3://b/m", artifact_id="1" * 64)))
    for app, model in (("default/a", "default/m"), ("default/b", "")):
        spec, digest = spec_of(gpus=1, least=0, most=6)
        scaling = Scaling(keep_alive_s=20.0, max_concurrency=6)
        fleet.at(WALL_S + 1.0, fleet.command, ApplyApp(app, replace(spec, scaling=scaling, model=model), digest))
    number, at_s = 0, WALL_S + 5.0
    while (at_s := at_s + rng.expovariate(1 / apart_s)) < WALL_S + lasts_s:
        fleet.at(at_s, fleet.request, rng.choice(("default/a", "default/a", "default/b")), number)
        number += 1
    outcome = fleet.run(WALL_S + lasts_s)
    log.close()
    return outcome


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("log")
    return folder, record(folder)


@pytest.fixture(scope="module")
def recorded(made: tuple[Path, Outcome]) -> Recorded:
    return recorded_of(made[0])


def recorded_of(folder: Path) -> Recorded:
    return read(entry for segment in segments(folder) for entry in segment.entries())


def test_what_the_log_tells_is_what_was(recorded: Recorded, made: tuple[Path, Outcome]) -> None:
    assert recorded.told_by == "gateways"
    assert len(recorded.requests) == len(made[1].waits)
    assert recorded.durations.start_s("default/a", warm=False) == pytest.approx(40.0, abs=0.5)
    assert recorded.durations.start_s("default/a", warm=True) == pytest.approx(15.0, abs=0.5)
    assert recorded.durations.request_s("default/a") == pytest.approx(4.0, rel=0.05)
    assert recorded.durations.request_s("default/b") == pytest.approx(6.0, rel=0.05)


def test_the_baseline_comes_out_as_it_was(recorded: Recorded, made: tuple[Path, Outcome]) -> None:
    was, now = figures(made[1]), figures(compare(recorded, Changes(knobs=(("keep_alive_s", 20.0),))).baseline)
    assert now["requests"] == was["requests"]
    assert 0 < was["loads"] < was["runner_starts"]  # one of the apps has a model
    for name in ("mean_wait_s", "runner_starts", "loads", "gpu_hours", "cost_micros"):
        assert now[name] == pytest.approx(was[name], rel=0.1), name
    assert was["cost_micros"] == pytest.approx(was["gpu_hours"] * PRICE_MICROS, rel=0.01)


def test_the_same_knobs_change_nothing(recorded: Recorded) -> None:
    compared = compare(recorded, Changes(knobs=(("keep_alive_s", 20.0),)))
    assert figures(compared.baseline) == figures(compared.changed)


def test_longer_keep_alive_buys_shorter_waits(recorded: Recorded) -> None:
    compared = compare(recorded, Changes(knobs=(("keep_alive_s", 600.0),)))
    before, after = figures(compared.baseline), figures(compared.changed)
    assert after["mean_wait_s"] < before["mean_wait_s"] / 2
    assert after["runner_starts"] < before["runner_starts"]
    assert after["gpu_hours"] > before["gpu_hours"]
    assert after["gpu_busy"] < before["gpu_busy"]
    only = compare(recorded, Changes(knobs=(("keep_alive_s", 600.0),), app="default/a"))
    assert figures(only.changed)["gpu_hours"] < after["gpu_hours"]


def test_nodes_added_serve_and_nodes_removed_do_not(tmp_path: Path) -> None:
    record(tmp_path, nodes=1, apart_s=1.5, lasts_s=400.0)  # two GPUs, and more work than they can do
    compared = compare(recorded_of(tmp_path), Changes(added=(Added(2, "H100"),)))
    before, after = figures(compared.baseline), figures(compared.changed)
    assert after["mean_wait_s"] < before["mean_wait_s"] / 4
    assert before["unserved"] > after["unserved"]
    record(tmp_path / "two", nodes=2, apart_s=1.5, lasts_s=400.0)
    compared = compare(recorded_of(tmp_path / "two"), Changes(removed=("node1",)))
    assert figures(compared.changed)["mean_wait_s"] > 2 * figures(compared.baseline)["mean_wait_s"]


def test_a_gpu_that_the_fleet_has_not_is_made(recorded: Recorded) -> None:
    compared = compare(recorded, Changes(added=(Added(1, "H200", 4, "p"),)))
    assert figures(compared.changed)["mean_wait_s"] <= figures(compared.baseline)["mean_wait_s"] * 1.5


@pytest.mark.parametrize(
    "changes",
    [
        Changes(removed=("nobody",)),
        Changes(knobs=(("keep_alive_s", 1.0),), app="default/nothing"),
        Changes(added=(Added(1, "H200", 8, "moon"),)),
    ],
    ids=("node", "app", "pool"),
)
def test_names_that_are_not_there_are_refused(recorded: Recorded, changes: Changes) -> None:
    with pytest.raises(FalError) as caught:
        compare(recorded, changes)
    assert caught.value.code is Code.NOT_FOUND


def test_a_log_without_requests_is_refused(tmp_path: Path) -> None:
    record(tmp_path, apart_s=1e9)
    with pytest.raises(FalError, match="no request"):
        recorded_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "added"),
    [("4xH200", Added(4, "H200")), ("2xH100:4@east", Added(2, "H100", 4, "east")),
     ("1xRTX 5090@p", Added(1, "RTX 5090", None, "p"))],
)  # fmt: skip
def test_nodes_are_parsed(text: str, added: Added) -> None:
    assert parse_nodes(text) == added


@pytest.mark.parametrize("text", ["", "H200", "0xH200", "4x", "4xH200:0", "999999xH200", "4xH200:8:9"])
def test_wrong_nodes_are_refused(text: str) -> None:
    with pytest.raises(FalError, match="--add-nodes"):
        parse_nodes(text)


def test_knobs_are_parsed() -> None:
    assert parse_knob("app.keep_alive=300") == ("keep_alive_s", 300.0)
    assert parse_knob("app.max_concurrency=7") == ("max_concurrency", 7)
    assert parse_knob("app.concurrency_buffer_perc=20") == ("concurrency_buffer_perc", 20)


@pytest.mark.parametrize(
    "text", ["keep_alive=3", "app.mood=3", "app.keep_alive=", "app.keep_alive=nan", "app.max_concurrency=1.5",
             "app.keep_alive=-1", "app.max_multiplexing=0", "app.max_concurrency=99999"],
)  # fmt: skip
def test_wrong_knobs_are_refused(text: str) -> None:
    with pytest.raises(FalError, match="--set"):
        parse_knob(text)


def test_falctl_sim_whatif(made: tuple[Path, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["whatif", str(made[0]), "--add-nodes", "1xH100", "--set", "app.keep_alive=120"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["whatif"]
    assert set(told) == {"baseline", "changed", "notes"}
    assert (
        set(told["baseline"])
        == set(told["changed"])
        >= {"mean_wait_s", "p95_wait_s", "max_wait_s", "loads", "cost_micros"}
    )
    assert main(words) == 0
    assert "gpu_hours" in capsys.readouterr().out
    assert main(["whatif", str(made[0])]) == 1
    assert capsys.readouterr().err.startswith("error: nothing is to be changed")
    both = ["--set", "app.min_concurrency=5", "--set", "app.max_concurrency=2"]
    assert main(["whatif", str(made[0]), *both]) == 1
    assert "a min_concurrency of 5 above its max_concurrency, 2" in capsys.readouterr().err
