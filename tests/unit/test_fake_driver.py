"""The fake driver's scripts, on virtual time: hours pass, no test waits."""

from __future__ import annotations

import asyncio

import pytest

from fal_contract.clock import ManualClock
from fal_contract.errors import Code, FalError
from fal_runtime.driver import ContainerSpec, Phase
from fal_runtime.fake import FakeDriver, Machine, Script
from virtual_time import run_virtually


def driver_of(**scripts: Script) -> FakeDriver:
    return FakeDriver(Machine(clock=ManualClock(), script_of=lambda spec: scripts.get(spec.id, Script())))


async def up(driver: FakeDriver, id: str) -> None:
    await driver.create(ContainerSpec(id=id, command=("x",)))
    await driver.start(id)


def test_exit_after_hours_takes_virtual_hours() -> None:
    async def main() -> float:
        driver = driver_of(slow=Script(exit_after_s=7200.0, exit_code=5))
        await up(driver, "slow")
        assert (await driver.wait("slow")).exit_code == 5
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(7200.0, abs=1.0)


def test_stop_waits_the_grace_for_the_stubborn_only() -> None:
    async def main() -> float:
        driver = driver_of(stubborn=Script(ignore_term=True))
        for id in ("stubborn", "polite"):
            await up(driver, id)
        assert (await driver.stop("polite", grace_s=600.0)).exit_code == 0
        assert (await driver.stop("stubborn", grace_s=600.0)).exit_code == 137
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(600.0, abs=1.0)


def test_refusals_and_delays() -> None:
    async def main() -> float:
        driver = driver_of(
            no=Script(refuse_create="disk full"),
            stuck=Script(refuse_start="no device"),
            late=Script(create_s=60.0, start_s=60.0),
        )
        with pytest.raises(FalError, match="disk full") as caught:
            await driver.create(ContainerSpec(id="no", command=("x",)))
        assert caught.value.code is Code.DRIVER_FAILED
        await driver.create(ContainerSpec(id="stuck", command=("x",)))
        with pytest.raises(FalError, match="no device"):
            await driver.start("stuck")
        status = await driver.status("stuck")
        assert status is not None
        assert status.phase is Phase.CREATED
        await up(driver, "late")
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(120.0, abs=1.0)


def test_a_restarted_agent_sees_the_same_machine_until_power_is_lost() -> None:
    async def main() -> float:
        machine = Machine(clock=ManualClock())
        await up(FakeDriver(machine), "kept")
        again = FakeDriver(machine)
        assert [status.id for status in await again.list()] == ["kept"]
        waiting = asyncio.create_task(again.wait("kept"))
        await asyncio.sleep(1.0)
        machine.exit("kept", 139, "crashed")
        assert (await waiting).exit_code == 139
        assert machine.running_max == 1
        machine.reboot()
        assert await again.list() == []
        return 0.0

    run_virtually(main())


def test_whoever_waits_for_a_container_that_is_removed_is_told() -> None:
    async def main() -> float:
        driver = driver_of()
        await driver.create(ContainerSpec(id="gone", command=("x",)))
        waiting = asyncio.create_task(driver.wait("gone"))
        await asyncio.sleep(1.0)
        driver.machine.drop("gone")
        with pytest.raises(FalError) as caught:
            await waiting
        assert caught.value.code is Code.NOT_FOUND
        return 0.0

    run_virtually(main())


def test_the_log_keeps_its_last_lines() -> None:
    async def main() -> float:
        driver = driver_of()
        await up(driver, "chatty")
        for number in range(3000):
            driver.machine.log("chatty", str(number))
        lines = [line.text async for line in driver.logs("chatty", tail_lines=5000, follow=False)]
        assert lines == [str(n) for n in range(2000, 3000)]
        return 0.0

    run_virtually(main())
