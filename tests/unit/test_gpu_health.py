"""One GPU's health as a pure state machine: what counts at once, what only after a time, and who gives it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_agent.core import gpu_health
from fal_agent.core.gpu_health import Fault, Health, Look, Stage
from fal_agent.core.xids import XIDS, XidClass, xid_of
from fal_contract.limits import (
    GPU_APPLICATION_RUNNERS_MAX,
    GPU_APPLICATION_WINDOW_S,
    GPU_COOL_C,
    GPU_DIAGNOSE_WAIT_MAX_S,
    GPU_DIAGNOSE_WAIT_S,
    GPU_DIAGNOSES_MAX,
    GPU_FOREIGN_S,
    GPU_GONE_S,
    GPU_HOT_C,
    GPU_HOT_S,
    GPU_SLOW_S,
)

GPU = "GPU-1"
WALL_S = 1_700_000_000.0
BUSY = {"holders": ("t/a-1",), "utilisation_percent": 99}


def look(**changes: Any) -> Look:
    return replace(Look(GPU, device_id=GPU, model="H100-80GB"), **changes)


def seen(*steps: tuple[float, Look], health: Health | None = None) -> Health:
    """After looks at these seconds."""
    health = health or Health(GPU)
    for now_s, one in steps:
        health = gpu_health.see(health, one, now_s=now_s, wall_s=WALL_S + now_s)
    return health


def lasting(one: Look, seconds: float, *, every_s: float = 5.0) -> Health:
    """Seen again and again for so long."""
    steps = int(seconds / every_s)
    return seen(*((at * every_s, one) for at in range(steps + 1)))


def told(*codes: int, runner: str = "", health: Health | None = None) -> Health:
    health = health or Health(GPU)
    for code in codes:
        health = gpu_health.xid(health, code, runner=runner, now_s=0.0, wall_s=WALL_S)
    return health


# ---- XIDs


@pytest.mark.parametrize("code", [13, 31, 43, 45, 94])
def test_a_programs_fault_is_no_fault_of_the_gpu(code: int) -> None:
    assert told(code, code, code, code, runner="t/a-1").ok


@pytest.mark.parametrize("code", [48, 63, 64, 74, 95, 119, 120, 140, 149, 154])
def test_what_asks_for_a_reset_quarantines_at_once(code: int) -> None:
    health = told(code)
    assert (health.stage, health.fault, health.wants_reset) == (Stage.QUARANTINED, Fault.RESET, True)
    assert health.reason.startswith(f"XID {code}: ")
    assert health.since_s == WALL_S


def test_one_that_fell_off_the_bus_is_dead_and_never_diagnosed_by_itself() -> None:
    health = told(79)
    assert (health.fault, health.quarantined) == (Fault.DEAD, True)
    assert not gpu_health.due(health, look(), now_s=1e9)


def test_an_xid_that_nobody_knows_makes_it_suspect_and_moves_nobody() -> None:
    health = told(4711)
    assert (health.stage, health.quarantined) == (Stage.SUSPECT, False)
    assert gpu_health.due(health, look(), now_s=0.0)
    assert not gpu_health.due(health, look(holders=("t/a-1",)), now_s=0.0)


def test_notes_change_nothing_but_the_list() -> None:
    health = told(106)
    assert health.ok
    assert [one.code for one in health.xids] == [106]


def test_programs_of_several_runners_in_a_row_make_it_suspect() -> None:
    health = Health(GPU)
    for number in range(GPU_APPLICATION_RUNNERS_MAX):
        assert health.ok
        health = told(31, 31, 43, runner=f"t/a-{number}", health=health)
    assert health.stage is Stage.SUSPECT
    assert "t/a-0" in health.reason


def test_programs_that_failed_long_ago_count_no_more() -> None:
    health = Health(GPU)
    for number in range(10):
        at_s = number * GPU_APPLICATION_WINDOW_S
        health = gpu_health.xid(health, 31, runner=f"t/a-{number}", now_s=at_s, wall_s=WALL_S + at_s)
    assert health.ok


def test_the_worst_fault_stands_and_the_first_moment() -> None:
    health = seen((0.0, look(uncorrected=2)))
    assert (health.fault, health.since_s) == (Fault.RESET, WALL_S)
    health = gpu_health.xid(health, 79, runner="", now_s=50.0, wall_s=WALL_S + 50.0)
    assert (health.fault, health.since_s) == (Fault.DEAD, WALL_S)
    assert gpu_health.xid(health, 48, runner="", now_s=60.0, wall_s=WALL_S + 60.0).fault is Fault.DEAD


def test_every_code_has_a_class_and_a_sentence() -> None:
    assert all(one.code == code and one.text for code, one in XIDS.items())
    assert {one.kind for one in XIDS.values()} == set(XidClass)
    assert xid_of(999_999).kind is XidClass.SUSPECT


# ---- what is seen


@pytest.mark.parametrize(
    ("one", "after_s", "fault", "word"),
    [
        (look(present=False), GPU_GONE_S, Fault.DEAD, "bus"),
        (look(temperature_c=GPU_HOT_C), GPU_HOT_S, Fault.SLOW, "cooling"),
        (look(**BUSY, throttled=("heat",)), GPU_SLOW_S, Fault.SLOW, "heat"),
        (look(**BUSY, clock_mhz=500, fellows_clock_mhz=1900), GPU_SLOW_S, Fault.SLOW, "fellows"),
        (look(**BUSY, pcie_width=4, pcie_width_max=16), GPU_SLOW_S, Fault.SLOW, "4 of 16"),
        (look(holders=("t/a-1",), strangers=(77,)), GPU_FOREIGN_S, Fault.FOREIGN, "77"),
        (look(pids=(77, 78)), GPU_FOREIGN_S, Fault.FOREIGN, "77, 78"),
        (look(memory_used_bytes=2 << 30), GPU_FOREIGN_S, Fault.MEMORY, "2048 MiB"),
    ],
)  # fmt: skip
def test_what_lasts_counts_after_its_time_and_not_before(one: Look, after_s: float, fault: Fault, word: str) -> None:
    assert lasting(one, after_s - 5.0).ok
    health = lasting(one, after_s)
    assert (health.stage, health.fault) == (Stage.QUARANTINED, fault)
    assert word in health.reason
    # One look without it, and the time begins anew.
    gap = seen((0.0, one), (after_s - 5.0, look()), (after_s, one), (after_s + 5.0, one))
    assert gap.ok


@pytest.mark.parametrize(
    "one",
    [
        look(throttled=("heat",), utilisation_percent=3),
        look(clock_mhz=300, fellows_clock_mhz=1900, utilisation_percent=0),
        look(pcie_width=1, pcie_width_max=16, utilisation_percent=0),
        look(**BUSY, clock_mhz=1500, fellows_clock_mhz=1900),
        look(**BUSY, clock_mhz=100),
        look(temperature_c=GPU_HOT_C - 1),
        look(holders=("t/a-1",), pids=(1, 2), memory_used_bytes=70 << 30),
        look(memory_used_bytes=500 << 20),
    ],
)  # fmt: skip
def test_what_is_no_fault(one: Look) -> None:
    assert lasting(one, 600.0).ok


@pytest.mark.parametrize("fault", [{"uncorrected": 1}, {"remap_pending": True}, {"remap_failed": True}])
def test_memory_faults_count_at_once(fault: dict[str, Any]) -> None:
    assert seen((0.0, look(**fault))).fault is Fault.RESET


def test_a_container_that_cannot_be_killed() -> None:
    health = seen((0.0, look(holders=("t/a-1",), stuck="process 9 waits in nv_wait")))
    assert (health.fault, health.reason) == (Fault.STUCK, "process 9 waits in nv_wait")


def test_one_that_was_hot_counts_as_hot_until_it_is_cool() -> None:
    warm = (GPU_HOT_C + GPU_COOL_C) // 2
    health = lasting(look(temperature_c=GPU_HOT_C), GPU_HOT_S)
    health = seen((20.0, look(temperature_c=warm)), health=health)
    assert gpu_health.blocked(health, look(temperature_c=warm)) == f"it has {warm} °C"
    health = seen((25.0, look(temperature_c=GPU_COOL_C - 1)), health=health)
    assert gpu_health.due(health, look(), now_s=30.0)


def test_nvlinks_that_went_down() -> None:
    health = seen((0.0, look(nvlinks=36)), (5.0, look(nvlinks=34)), (5.0 + GPU_SLOW_S, look(nvlinks=34)))
    assert (health.fault, "34 of 36" in health.reason) == (Fault.RESET, True)


def test_fellows_are_others_of_the_model_at_work_on_other_devices() -> None:
    mine = look(clock_mhz=500)
    others: Sequence[Look] = [
        Look(f"GPU-{n}", f"GPU-{n}", "H100-80GB", utilisation_percent=90, clock_mhz=clock)
        for n, clock in ((2, 1900), (3, 1700))
    ]
    assert gpu_health.fellows_clock_mhz(mine, [mine, *others]) == 1800
    assert gpu_health.fellows_clock_mhz(mine, [mine, others[0]]) == -1
    idle = replace(others[0], utilisation_percent=0)
    other = replace(others[0], model="L4-24GB")
    sibling = replace(others[0], device_id=GPU)
    assert gpu_health.fellows_clock_mhz(mine, [mine, others[1], idle, other, sibling]) == -1


# ---- diagnoses


@pytest.mark.parametrize(
    "one",
    [look(holders=("t/a-1",)), look(pids=(7,)), look(memory_used_bytes=2 << 30), look(present=False)],
)
def test_what_is_in_use_is_not_diagnosed(one: Look) -> None:
    health = told(48)
    assert gpu_health.due(health, look(), now_s=0.0)
    assert not gpu_health.due(health, one, now_s=0.0)
    assert gpu_health.blocked(health, one)


def test_one_that_passes_comes_back_clean_and_remembers_its_xids() -> None:
    health = gpu_health.begin(told(13, 48))
    assert not health.ok
    health = gpu_health.finish(health, passed=True, verdict="fine", now_s=9.0, wall_s=WALL_S + 9.0)
    assert (health.stage, health.fault, health.reason, health.tries) == (Stage.OK, None, "", 0)
    assert health.verified_s == WALL_S + 9.0
    assert [one.code for one in health.xids] == [13, 48]


def test_diagnoses_that_fail_wait_longer_each_time_and_end() -> None:
    health, now_s, waits = told(48), 0.0, []
    while gpu_health.due(health, look(), now_s=now_s):
        health = gpu_health.begin(health)
        health = gpu_health.finish(health, passed=False, verdict="wrong bits", now_s=now_s, wall_s=WALL_S)
        assert not gpu_health.due(health, look(), now_s=now_s)
        waits.append(health.next_try_s - now_s)
        now_s = health.next_try_s
    assert waits == [min(GPU_DIAGNOSE_WAIT_S * 2.0**n, GPU_DIAGNOSE_WAIT_MAX_S) for n in range(GPU_DIAGNOSES_MAX)]
    assert health.text == "XID 48: uncorrectable memory error; diagnosed: wrong bits"
    # An operator's word begins anew.
    assert gpu_health.finish(
        gpu_health.begin(health, asked=True), passed=True, verdict="fine", now_s=now_s, wall_s=WALL_S
    ).ok


def test_what_comes_while_it_is_diagnosed_spoils_it() -> None:
    health = told(74, health=gpu_health.begin(told(48)))
    assert health.stage is Stage.DIAGNOSING
    health = gpu_health.finish(health, passed=True, verdict="fine", now_s=1.0, wall_s=WALL_S)
    assert (health.stage, health.fault) == (Stage.QUARANTINED, Fault.RESET)
    worse = gpu_health.finish(
        told(79, health=gpu_health.begin(told(48))), passed=True, verdict="fine", now_s=1.0, wall_s=WALL_S
    )
    assert worse.fault is Fault.DEAD


def test_the_checks_own_process_is_no_stranger() -> None:
    health = gpu_health.begin(told(48))
    health = seen(*((float(at), look(pids=(99,), memory_used_bytes=60 << 30)) for at in range(100)), health=health)
    assert gpu_health.finish(health, passed=True, verdict="fine", now_s=100.0, wall_s=WALL_S).ok


def test_a_suspect_that_fails_is_quarantined() -> None:
    health = gpu_health.begin(told(4711))
    health = gpu_health.finish(health, passed=False, verdict="wrong", now_s=0.0, wall_s=WALL_S)
    assert (health.stage, health.fault, health.quarantined) == (Stage.QUARANTINED, Fault.RESET, True)


def test_an_operator_gives_it_back_unseen() -> None:
    assert gpu_health.clear(told(79), wall_s=WALL_S).ok


# ---- over a restart


def restored(health: Health, *, same_boot: bool, now_s: float = 1000.0) -> Health:
    return gpu_health.restore(GPU, gpu_health.keep(health), now_s=now_s, same_boot=same_boot)


def test_a_fault_outlives_the_agent_and_a_boot_counts_as_a_reset() -> None:
    health = gpu_health.finish(gpu_health.begin(told(48)), passed=False, verdict="no", now_s=5.0, wall_s=WALL_S)
    again = restored(health, same_boot=True)
    assert (again.stage, again.fault, again.text, again.tries) == (health.stage, health.fault, health.text, 1)
    assert not gpu_health.due(again, look(), now_s=1000.0), "the wait begins anew"
    assert again.wants_reset
    after = restored(health, same_boot=False)
    assert not after.wants_reset
    assert gpu_health.due(after, look(), now_s=1000.0)


def test_a_diagnose_that_the_agents_end_cut_is_none() -> None:
    assert restored(gpu_health.begin(told(48)), same_boot=True).stage is Stage.QUARANTINED


CODES = st.sampled_from([13, 31, 48, 63, 79, 92, 94, 106, 4711])
LOOKS = st.builds(
    Look,
    st.just(GPU),
    device_id=st.just(GPU),
    present=st.booleans(),
    holders=st.sampled_from([(), ("t/a-1",), ("t/a-2",)]),
    pids=st.sampled_from([(), (5,)]),
    strangers=st.sampled_from([(), (5,)]),
    memory_used_bytes=st.sampled_from([0, 4 << 30]),
    uncorrected=st.sampled_from([0, 0, 0, 1]),
    temperature_c=st.sampled_from([40, 88, 99]),
    utilisation_percent=st.sampled_from([0, 90]),
    throttled=st.sampled_from([(), ("heat",)]),
)
MOVES = st.lists(
    st.one_of(
        LOOKS,
        CODES,
        st.sampled_from(["pass", "fail", "clear", "restart", "boot"]),
    ),
    max_size=40,
)


@given(MOVES, st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_comes_it_is_given_back_only_by_a_diagnose_or_a_word(moves: list[Any], data: st.DataObject) -> None:
    health, now_s, last = Health(GPU), 0.0, look()
    for move in moves:
        now_s += data.draw(st.sampled_from([0.0, 5.0, 70.0]))
        before = health
        if isinstance(move, Look):
            health, last = gpu_health.see(health, move, now_s=now_s, wall_s=WALL_S + now_s), move
        elif isinstance(move, int):
            health = gpu_health.xid(health, move, runner="t/a-1", now_s=now_s, wall_s=WALL_S + now_s)
        elif move in ("pass", "fail"):
            if gpu_health.due(health, last, now_s=now_s):
                assert not last.holders
                assert health.fault is not Fault.DEAD
                health = gpu_health.begin(health)
                assert health.tries <= GPU_DIAGNOSES_MAX
                health = gpu_health.finish(
                    health, passed=move == "pass", verdict=move, now_s=now_s, wall_s=WALL_S + now_s
                )
                assert health.ok == (move == "pass")
        elif move == "clear":
            health = gpu_health.clear(health, wall_s=WALL_S + now_s)
            assert health.ok
        else:
            health = restored(health, same_boot=move == "restart", now_s=now_s)
            assert (health.stage, health.fault, health.reason) == (before.stage, before.fault, before.reason)
        if health.ok and not before.ok:
            assert move in ("pass", "clear")
        assert (health.fault is None) == health.ok
        assert bool(health.reason) == (not health.ok)
        assert len(health.xids) <= 16
