"""`falctl sim serve`: the reference's rows, ours on the real trace, a small trace by hand, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_scheduler.core.dispatch_order import Settings
from fal_scheduler.sim.__main__ import main
from fal_scheduler.sim.serve import PRESETS, read_trace, simulate
from fal_scheduler.sim.serve_cluster import Cluster, Request
from fal_scheduler.sim.serve_told import serve_bound, serve_told, sized

TRACE = Path(__file__).parents[3] / "shared" / "data" / "gentd26" / "requests_nov.csv"
HEADER = "gmt_create,predict_type,predict_status,exec_time_seconds,checkpoint_model_version_id\n"
LINES = (
    "2024-11-15 10:00:06,T,SUCCEED,4.0,M1\n2024-11-15 10:00:00,T,SUCCEED,10.0,M0\n2024-11-15 10:00:01,T,FAILED,9.0,M0\n"
)

real = pytest.mark.skipif(not TRACE.is_file(), reason=f"the GenTD26 trace is not at {TRACE}")


def run(
    requests: list[Request], policy: str, gpus: int = 16, settings: Settings | None = None, told_ms: int = 30_000
) -> dict[str, float]:
    return simulate(requests, policy, gpus=gpus, load_ms=22_000, settings=settings or Settings(), told_ms=told_ms)


@pytest.fixture(scope="module")
def trace() -> list[Request]:
    return read_trace(TRACE, 6.0)


@real
@pytest.mark.parametrize(
    ("policy", "loads", "mean_s", "p95_s", "max_s"),
    [
        ("random", 0.803, 93.2, 371, 702),
        ("affinity", 0.639, 86.9, 370, 707),
        ("no-load", 0.0, 1.4, 10.8, 54),
        ("reorder", 0.293, 25.5, 85.5, 246),
    ],
)
def test_reference_rows(
    trace: list[Request], policy: str, loads: float, mean_s: float, p95_s: float, max_s: float
) -> None:
    """Arrivals 6 times closer, services as long as the trace says, succeeded ones only: that reading gives the rows."""
    ours = run(trace, policy)
    assert ours["requests"] == 14_033
    assert ours["loads_per_request"] == pytest.approx(loads, abs=0.015)
    assert ours["mean_wait_s"] == pytest.approx(mean_s, rel=0.03)
    assert ours["p95_wait_s"] == pytest.approx(p95_s, rel=0.03)
    assert ours["max_wait_s"] == pytest.approx(max_s, rel=0.15)


@real
@pytest.mark.parametrize(
    ("preset", "loads", "mean_s"),
    [("few-loads", 0.20, 16.0), pytest.param("short-wait", 0.28, 15.3, marks=pytest.mark.slow)],
)
def test_ours_on_the_real_trace(trace: list[Request], preset: str, loads: float, mean_s: float) -> None:
    """Fewer loads and shorter waits than every reference policy that loads; nobody waits long (adr/0018)."""
    ours = run(trace, "falctl", settings=PRESETS[preset])
    assert ours["requests"] == 14_033
    assert ours["loads_per_request"] <= loads
    assert ours["mean_wait_s"] <= mean_s
    assert ours["max_wait_s"] <= 250.0


@real
def test_the_bound_on_the_real_trace(trace: list[Request]) -> None:
    """16 GPUs to which loads cost nothing: no row of the table is below it."""
    assert run(trace, "bound")["mean_wait_s"] == pytest.approx(0.88, abs=0.01)


@real
@pytest.mark.slow
def test_twelve_seconds_are_had_by_who_is_told_ten_seconds_ahead(trace: list[Request]) -> None:
    """What adr/0018 says of foresight."""
    assert run(trace, "told", settings=PRESETS["short-wait"], told_ms=10_000)["mean_wait_s"] <= 12.0
    assert run(trace, "told", settings=PRESETS["short-wait"], told_ms=4_000)["mean_wait_s"] > 12.0


def test_who_is_told_loads_ahead_and_who_is_not_makes_it_wait() -> None:
    requests = [Request(0, 1_000, "M0"), Request(60_000, 1_000, "M1")]
    assert run(requests, "told", 1)["max_wait_s"] == 22.0  # the first, which nobody could be told of early
    assert run(requests, "told", 1)["mean_wait_s"] == 11.0
    assert run(requests, "told", 1, told_ms=10_000)["mean_wait_s"] == (22 + 12) / 2
    assert run(requests, "told", 1, told_ms=0)["mean_wait_s"] == 22.0
    assert run(requests, "bound", 1)["mean_wait_s"] == 0.0


def test_the_bound_serves_the_shortest_first() -> None:
    requests = [Request(0, 10_000, "M0"), Request(1, 9_000, "M1"), Request(2, 1_000, "M2")]
    assert run(requests, "bound", 1)["mean_wait_s"] == round((0 + 10.999 + 9.998) / 3, 2)


def test_who_is_told_keeps_what_is_asked_for_soon() -> None:
    """M0 comes again; what is dropped for M2 is M1, that nobody asks for any more."""
    first = [Request(0, 1_000, "M0"), Request(0, 1_000, "M1")]
    then = [Request(60_000, 1_000, "M2"), Request(61_000, 1_000, "M0")]
    assert run([*first, *then], "told", 2)["loads_per_request"] == 0.75


TRACES = st.lists(
    st.builds(Request, st.integers(0, 200_000), st.integers(0, 90_000), st.sampled_from(["M0", "M1", "M2", "M3"])),
    min_size=1,
    max_size=15,
)


@given(TRACES, st.integers(1, 3), st.integers(0, 60_000), st.sampled_from([0, 22_000]), st.integers(0, 400_000))
@settings(max_examples=60, deadline=None)
def test_whoever_is_told_serves_everything_and_nothing_before_it_came(
    requests: list[Request], gpus: int, told_ms: int, load_ms: int, price_ms: int
) -> None:
    requests.sort(key=lambda x: x.at_ms)
    cluster = Cluster(sized(requests), gpus, load_ms)
    outcome = serve_told(cluster, told_ms, price_ms, 100_000)
    assert len(outcome.waits_ms) == len(requests)
    assert min(outcome.waits_ms) >= 0
    bound = serve_bound(Cluster(sized(requests), gpus, load_ms))
    assert len(bound.waits_ms) == len(requests)
    assert bound.loads == 0
    if len(requests) <= gpus:
        assert max(bound.waits_ms) == 0


def test_a_trace_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One GPU: M0 loads 22 s and runs 10; M1, which came at 1 s, waits for both and its own load: 54 s less 1."""
    path = tmp_path / "t.csv"
    path.write_text(HEADER + LINES)
    assert main(["serve", "--trace", str(path), "--gpus", "1", "--policy", "falctl", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loads_per_request"] == 1.0
    assert figures["mean_wait_s"] == pytest.approx((22 + 53) / 2)
    assert figures["max_wait_s"] == 53.0
    assert main(["serve", "--trace", str(path), "--gpus", "2", "--policy", "random"]) == 0
    assert "mean_wait_s        22.0" in capsys.readouterr().out


def test_same_models_share_a_load() -> None:
    requests = [Request(at, 1_000, "M0") for at in range(0, 10_000, 1_000)]
    assert run(requests, "falctl", 1)["loads_per_request"] == 0.1


def test_size_columns_make_size_classes_and_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + LINES)
    assert {x.size for x in read_trace(path, 1.0)} == {"//T/"}
    path.write_text(f"num_images_per_prompt,{HEADER}8.0,2024-11-15 10:00:06,T,SUCCEED,4.0,M1\n")
    assert [x.size for x in read_trace(path, 1.0)] == ["8.0//T/"]


def test_the_short_ones_of_a_model_go_first_once_their_class_is_known() -> None:
    """Classes take 60 and 2 s; both wait behind a first one. Told apart, the short ones do not wait for the long."""
    warm_up = [Request(n * 70_000, (60_000, 2_000)[n % 2], "M0", "ls"[n % 2]) for n in range(20)]
    burst = [Request(2_000_000 + n, (60_000, 2_000)[n % 2], "M0", "ls"[n % 2]) for n in range(10)]
    told = run([*warm_up, *burst], "falctl", 1)
    untold = run([x._replace(size="") for x in (*warm_up, *burst)], "falctl", 1)
    assert told["mean_wait_s"] < 0.8 * untold["mean_wait_s"]


def test_the_last_one_is_served_though_no_load_is_worth_its_price() -> None:
    """Nothing happens any more, and only its age makes it due."""
    figures = run([Request(0, 1_000, "M0")], "falctl", 1, Settings(prefer_resident_ms=10**9, bypass_ms=60_000))
    assert figures["max_wait_s"] == 60 + 22


@pytest.mark.parametrize(
    ("arguments", "text", "wrong"),
    [
        (["--gpus", "0"], HEADER + LINES, "gpus"),
        (["--speedup", "nan"], HEADER + LINES, "speedup"),
        (["--load-s", "-1"], HEADER + LINES, "load_s"),
        (["--told-s", "-1"], HEADER + LINES, "told_s"),
        (["--bypass-s", "0"], HEADER + LINES, "bypass_s"),
        ([], "a,b\n1,2\n", "gmt_create"),
        ([], HEADER, "holds 0 requests"),
        ([], HEADER + "2024-11-15 10:00:06,T,SUCCEED,soon,M1\n", "line 2: 'soon' in column exec_time_seconds"),
        ([], HEADER + "yesterday,T,SUCCEED,1.0,M1\n", "line 2: 'yesterday' in column gmt_create"),
        ([], HEADER + "2024-11-15 10:00:06,T,SUCCEED\n", "line 2"),
        ([], None, "cannot be read"),
    ],
)
def test_wrong_input_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str | None, wrong: str
) -> None:
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    assert main(["serve", "--trace", str(path), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert wrong in err
    assert err.count("\n") == 1


def test_presets_differ_in_settings_only() -> None:
    assert set(PRESETS) == {"few-loads", "short-wait"}
    assert all(isinstance(preset, Settings) for preset in PRESETS.values())
