"""What is kept ready for the next start: the policy, and its hand on the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fal_agent.core.pool import FREE_BYTES_MIN, SHAPES_MAX, WARM_BYTES, Want, remembered, wanted
from fal_agent.spares import RETRY_MAX_S, RETRY_S, SETTLED_S, Spares, free_bytes
from fal_contract.clock import SystemClock
from fal_runtime.driver import ContainerSpec, Prepared, Resources
from fal_runtime.fake import FakeDriver, Machine
from virtual_time import LoopClock, run_virtually

PLENTY = 64 << 30


@given(st.lists(st.integers(0, 9), max_size=40))
def test_the_last_shapes_are_remembered_most_recent_first(starts: list[int]) -> None:
    recent: tuple[int, ...] = ()
    for shape in starts:
        recent = remembered(recent, shape)
    assert list(recent) == list(dict.fromkeys(reversed(starts)))[:SHAPES_MAX]


@given(
    st.lists(st.booleans(), max_size=SHAPES_MAX),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 8 << 30),
)
def test_memory_bounds_what_is_warm(warmable: list[bool], prepared: int, warm: int, free: int) -> None:
    found = wanted(range(len(warmable)), prepared=prepared, warm=warm, can_warm=warmable, free_bytes=free)
    if free < FREE_BYTES_MIN:
        assert found == ()
    assert sum(want.count for want in found if want.warm) * WARM_BYTES <= max(0, free - FREE_BYTES_MIN)
    assert len({want.shape for want in found}) == len(found)
    for want in found:
        assert 0 < want.count <= (warm if want.warm else prepared)
        assert warmable[want.shape] or not want.warm


def test_a_shape_gets_warm_ones_where_it_can() -> None:
    found = wanted("ab", prepared=2, warm=1, can_warm=[True, False], free_bytes=PLENTY)
    assert found == (Want("a", 1, True), Want("b", 2, False))


def test_what_was_started_is_made_ready_again(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine()
        driver = FakeDriver(machine)
        spares = Spares(driver, SystemClock(), prepared=2, warm=0, in_setup=lambda: False)
        job = asyncio.create_task(spares.run())
        spec = ContainerSpec(id="a", command=("x",), env={"SECRET": "1"}, socket_dir=tmp_path, resources=Resources(9))
        spares.used(spec)
        spares.used(replace(spec, id="b", env={}))  # the same shape
        spares.used(replace(spec, secrets={"a": b"b"}, resources=Resources(8)))
        assert b"b" not in spares._recent[0].secrets.values()  # not kept here
        async with asyncio.timeout(10):
            while machine.prepared != [Resources(8)] * 2 + [Resources(9)] * 2:  # noqa: ASYNC110  (the fake has no event for it)
                await asyncio.sleep(0.01)
        await driver.create(spec)
        assert (machine.prepared_used, machine.prepared) == (1, [Resources(8), Resources(8), Resources(9)])
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        assert machine.prepared == []

    asyncio.run(main())


def test_nothing_is_made_ahead_while_a_runner_sets_up_and_just_after(tmp_path: Path) -> None:
    async def main() -> None:
        machine, clock, setup = Machine(), LoopClock(), [True]
        spares = Spares(FakeDriver(machine), clock, prepared=1, warm=1, in_setup=lambda: setup[0])
        job = asyncio.create_task(spares.run())
        began_s = clock.monotonic_s()
        spares.used(ContainerSpec(id="a", command=("x",), socket_dir=tmp_path, resources=Resources(9)))
        await asyncio.sleep(30.0)
        assert machine.prepared == []
        setup[0] = False
        await asyncio.sleep(SETTLED_S - 0.5)
        assert machine.prepared == []
        while not machine.prepared:  # noqa: ASYNC110  (virtual time)
            await asyncio.sleep(0.1)
        assert clock.monotonic_s() - began_s < 30 + SETTLED_S + 1
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)

    run_virtually(main())


class BrokenDriver(FakeDriver):
    """`prepare` fails in a way that nobody expects; the moments of its calls."""

    def __init__(self, machine: Machine, clock: LoopClock) -> None:
        super().__init__(machine)
        self._broken_clock = clock
        self.tried_s: list[float] = []

    async def prepare(self, wanted: Sequence[Prepared]) -> None:
        self.tried_s.append(self._broken_clock.monotonic_s())
        raise OSError("Input/output error")


def test_an_error_that_nobody_expects_is_tried_again_ever_later_and_ends_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        clock = LoopClock()
        driver = BrokenDriver(Machine(), clock)
        spares = Spares(driver, clock, prepared=1, warm=0, in_setup=lambda: False)
        job = asyncio.create_task(spares.run())
        spares.used(ContainerSpec(id="a", command=("x",), socket_dir=tmp_path, resources=Resources(9)))
        await asyncio.sleep(4 * 3600.0)
        assert not job.done()
        waits = [later - sooner for sooner, later in pairwise(driver.tried_s)]
        assert len(waits) > 8
        assert waits[0] < waits[1] < waits[2] < waits[3]
        assert RETRY_MAX_S <= waits[-1] <= RETRY_MAX_S + 2 * RETRY_S
        tries = len(driver.tried_s)
        job.cancel()
        [end] = await asyncio.gather(job, return_exceptions=True)
        assert isinstance(end, asyncio.CancelledError)
        assert len(driver.tried_s) == tries + 1

    run_virtually(main())


def test_free_memory_is_read(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  8 kB\nMemAvailable:  4 kB\n")
    assert free_bytes(file) == 4096
    assert free_bytes(tmp_path / "none") == 0
