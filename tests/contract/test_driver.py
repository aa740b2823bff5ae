"""One contract for all container drivers (fal_runtime.driver.Driver)."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import Bench, fake_bench, oci_bench, oci_missing, prepared_bench, process_bench
from fal_contract.errors import Code, FalError
from fal_runtime.driver import ContainerSpec, Image, LogLine, Phase

TIMEOUT_S = 30.0


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main

    asyncio.run(bounded())


@pytest.fixture(
    params=[
        "fake",
        "process",
        pytest.param("oci", marks=[pytest.mark.oci, pytest.mark.root]),
        pytest.param("oci-prepared", marks=[pytest.mark.oci, pytest.mark.root]),
    ],
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made: Bench
    if request.param == "fake":
        made = fake_bench(tmp_path)
    elif request.param == "process":
        made = process_bench(tmp_path)
    elif oci_missing():
        pytest.skip(f"no containers here: {oci_missing()}")
    else:
        made = oci_bench(tmp_path) if request.param == "oci" else prepared_bench(tmp_path)
    yield made
    run(_clean(made))


async def _clean(bench: Bench) -> None:
    await bench.again().clean(frozenset())
    assert await bench.driver.list() == []


async def _lines(bench: Bench, id: str, *, tail_lines: int = 100, follow: bool = False) -> list[LogLine]:
    return [line async for line in bench.driver.logs(id, tail_lines=tail_lines, follow=follow)]


async def _first_line(bench: Bench, id: str) -> str:
    async with aclosing(bench.driver.logs(id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError(f"{id} ended without a word")


def test_a_container_goes_through_its_phases(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("phases", "forever")
        assert await driver.status(spec.id) is None
        await driver.create(spec)
        created = await driver.status(spec.id)
        assert created is not None
        assert (created.phase, created.started_at_s, created.exit_code) == (Phase.CREATED, None, None)
        assert bench.was_prepared(spec.id) == bench.prepares
        await driver.start(spec.id)
        running = await driver.status(spec.id)
        assert running is not None
        assert running.phase is Phase.RUNNING
        assert running.pid
        assert running.started_at_s
        assert [s.id for s in await driver.list()] == [spec.id]
        ended = await driver.kill(spec.id)
        assert (ended.phase, ended.exit_code, ended.pid) == (Phase.EXITED, 137, None)
        assert ended.finished_at_s is not None
        assert ended.finished_at_s >= running.started_at_s
        await driver.remove(spec.id)
        assert await driver.status(spec.id) is None
        assert await driver.list() == []

    run(main())


def test_every_call_twice_is_like_once(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("twice", "say=once", "forever")
        await driver.create(spec)
        await driver.create(spec)
        await driver.start(spec.id)
        first = await driver.status(spec.id)
        await driver.start(spec.id)
        assert await driver.status(spec.id) == first
        assert await _first_line(bench, spec.id) == "once"
        assert (await driver.stop(spec.id, grace_s=10)).phase is Phase.EXITED
        assert (await driver.stop(spec.id, grace_s=10)).phase is Phase.EXITED
        await driver.start(spec.id)  # an exited container never runs again
        assert [line.text for line in await _lines(bench, spec.id)] == ["once"]
        await driver.remove(spec.id)
        await driver.remove(spec.id)

    run(main())


def test_who_ended_it_is_told(bench: Bench) -> None:
    if bench.name == "fake":
        pytest.skip("its scripts choose the words")

    async def main() -> None:
        driver = bench.driver
        deaf, killed = bench.spec("deaf", "ignore-term", "say=up", "forever"), bench.spec("killed", "forever")
        itself = bench.spec("itself", "signal=9")
        for spec in (deaf, killed, itself):
            await driver.create(spec)
            await driver.start(spec.id)
        assert await _first_line(bench, deaf.id) == "up"
        assert (
            await driver.stop(deaf.id, grace_s=0.2)
        ).reason == "stopped: SIGTERM was ignored for 0.2 s, then SIGKILL"
        assert (await driver.kill(killed.id)).reason == "killed by us (SIGKILL)"
        assert (await bench.again().status(deaf.id)) == await driver.status(deaf.id)
        if bench.name == "process":  # process 1 of a container cannot kill itself
            assert (await driver.wait(itself.id)).reason == "killed by SIGKILL (signal 9), not by us"

    run(main())


def test_the_output_of_a_removed_container_is_kept_for_a_while(bench: Bench) -> None:
    async def main() -> None:
        driver, spec, silent = (
            bench.driver,
            bench.spec("told", "say=why I died", "exit=3"),
            bench.spec("mute", "exit=1"),
        )
        for one in (spec, silent):
            await driver.create(one)
            await driver.start(one.id)
            await driver.wait(one.id)
            await driver.remove(one.id)
        driver = bench.again()
        await driver.clean(frozenset())
        assert [line.text for line in await _lines(bench, spec.id, follow=True)] == ["why I died"]
        for id in (silent.id, "nobody"):
            with pytest.raises(FalError) as caught:
                await _lines(bench, id)
            assert caught.value.code is Code.NOT_FOUND

    run(main())


def test_exit_codes_and_logs_are_kept(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("exit", "say=one", "say=two", "say=three", "exit=3")
        await driver.create(spec)
        await driver.start(spec.id)
        status = await driver.wait(spec.id)
        assert (status.phase, status.exit_code, status.oom_killed) == (Phase.EXITED, 3, False)
        assert "3" in status.reason
        assert [line.text for line in await _lines(bench, spec.id)] == ["one", "two", "three"]
        assert [line.text for line in await _lines(bench, spec.id, tail_lines=2)] == ["two", "three"]
        assert await _lines(bench, spec.id, tail_lines=0) == []
        assert all(abs(line.time_s - (status.finished_at_s or 0)) < TIMEOUT_S for line in await _lines(bench, spec.id))

    run(main())


def test_follow_ends_with_the_container(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("follow", "say=first", "sleep=0.2", "exit=0")
        await driver.create(spec)
        await driver.start(spec.id)
        assert [line.text for line in await _lines(bench, spec.id, follow=True)] == ["first"]
        status = await driver.status(spec.id)
        assert status is not None
        assert status.phase is Phase.EXITED

    run(main())


def test_a_new_driver_takes_everything_back(bench: Bench) -> None:
    async def main() -> None:
        done, live = bench.spec("done", "say=kept", "exit=7"), bench.spec("live", "say=here", "forever")
        ready = bench.spec("ready", "exit=0")
        for spec in (done, live, ready):
            await bench.driver.create(spec)
        await bench.driver.start(done.id)
        await bench.driver.wait(done.id)
        await bench.driver.start(live.id)
        assert await _first_line(bench, live.id) == "here"
        before = {s.id: s for s in await bench.driver.list()}
        again = bench.again()
        after = {s.id: s for s in await again.list()}
        assert after == before
        assert {id: s.phase for id, s in after.items()} == {
            done.id: Phase.EXITED,
            live.id: Phase.RUNNING,
            ready.id: Phase.CREATED,
        }
        assert (await again.wait(done.id)).exit_code == 7
        assert [line.text for line in await _lines(bench, done.id)] == ["kept"]
        await again.start(ready.id)
        assert (await again.wait(ready.id)).exit_code == 0
        assert (await again.stop(live.id, grace_s=10)).exit_code == 0

    run(main())


def test_wait_started_before_the_exit_returns(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("wait", "forever")
        await driver.create(spec)
        await driver.start(spec.id)
        waiting = asyncio.create_task(driver.wait(spec.id))
        await driver.kill(spec.id)
        assert (await waiting).exit_code == 137

    run(main())


def test_stop_kills_after_the_grace(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("stubborn", "ignore-term", "say=up", "forever")
        await driver.create(spec)
        await driver.start(spec.id)
        assert await _first_line(bench, spec.id) == "up"
        assert (await driver.stop(spec.id, grace_s=0.2)).exit_code == 137

    run(main())


def test_a_created_container_that_is_stopped_never_runs(bench: Bench) -> None:
    async def main() -> None:
        driver, spec = bench.driver, bench.spec("never", "say=ran")
        await driver.create(spec)
        assert (await driver.stop(spec.id, grace_s=1)).phase is Phase.EXITED
        await driver.start(spec.id)
        assert await _lines(bench, spec.id) == []

    run(main())


def test_a_missing_program_is_one_clear_error(bench: Bench) -> None:
    async def main() -> None:
        driver = bench.driver
        spec = ContainerSpec(id=bench.spec("missing").id, command=("/no/such/program",))
        with pytest.raises(FalError) as caught:  # noqa: PT012  (either call may refuse)
            await driver.create(spec)
            await driver.start(spec.id)
        assert caught.value.code is Code.DRIVER_FAILED
        assert caught.value.remedy
        await driver.remove(spec.id)
        assert await driver.list() == []

    run(main())


def test_unknown_containers(bench: Bench) -> None:
    async def main() -> None:
        driver = bench.driver
        for call in (driver.start("nobody"), driver.wait("nobody"), driver.kill("nobody")):
            with pytest.raises(FalError) as caught:
                await call
            assert caught.value.code is Code.NOT_FOUND
        await driver.remove("nobody")
        assert await driver.status("nobody") is None

    run(main())


def test_bad_specs_are_refused_before_anything_changes(bench: Bench) -> None:
    async def main() -> None:
        bad = (
            ContainerSpec(id="../escape", command=("true",)),
            ContainerSpec(id="empty", command=()),
            ContainerSpec(id="env", command=("true",), env={"A=B": "1"}),
            ContainerSpec(id="log", command=("true",), log_bytes_max=1),
        )
        for spec in bad:
            with pytest.raises(FalError) as caught:
                await bench.driver.create(spec)
            assert caught.value.code is Code.INVALID
            assert caught.value.field
        assert await bench.driver.list() == []

    run(main())


def test_clean_keeps_what_it_is_told_to(bench: Bench) -> None:
    async def main() -> None:
        keep, drop = bench.spec("keep", "forever"), bench.spec("drop", "forever")
        for spec in (keep, drop):
            await bench.driver.create(spec)
            await bench.driver.start(spec.id)
        removed = await bench.again().clean(frozenset({keep.id}))
        assert any(drop.id in words for words in removed)
        assert [(s.id, s.phase) for s in await bench.driver.list()] == [(keep.id, Phase.RUNNING)]

    run(main())


def test_models_come_and_go(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        source = tmp_path / "source"
        source.mkdir()
        spec = bench.spec("models", "forever", models_dir=tmp_path / "m")
        await bench.driver.create(spec)
        inside = await bench.driver.attach_model(spec.id, "digits", source)
        assert inside == bench.driver.inside(spec, "/models/digits")
        await bench.driver.attach_model(spec.id, "digits", source)
        await bench.driver.detach_model(spec.id, "digits")
        await bench.driver.detach_model(spec.id, "digits")
        for name in ("..", "a/b", ""):
            with pytest.raises(FalError):
                await bench.driver.attach_model(spec.id, name, source)

    run(main())


def test_twenty_cycles_leave_nothing(bench: Bench, tmp_path: Path) -> None:
    async def cycle(number: int) -> None:
        directory = tmp_path / f"s{number}"
        spec = ContainerSpec(id=bench.spec(f"cycle{number}").id, command=("/bin/echo", "hi"), socket_dir=directory)
        await bench.driver.create(spec)
        await bench.driver.start(spec.id)
        assert (await bench.driver.wait(spec.id)).exit_code == 0
        await bench.driver.remove(spec.id)
        assert not directory.exists()

    async def main() -> None:
        await cycle(0)
        gc.collect()  # what tests before this one left to the collector is not of these cycles
        before = _open_files()
        for number in range(1, 21):
            await cycle(number)
        assert _open_files() == before
        assert Path("/proc/self/mountinfo").read_text().count(str(tmp_path)) == 0

    run(main())


def _open_files() -> int:
    """Descriptors, but for user namespaces: the oci driver keeps a bounded number, one for each range of ids."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += not os.readlink(f"/proc/self/fd/{name}").startswith("user:[")
    return count


def test_probe_says_whether_it_isolates(bench: Bench) -> None:
    async def main() -> None:
        capabilities = await bench.driver.probe()
        assert capabilities.driver == bench.driver.name == bench.name
        assert capabilities.isolates == bench.driver.isolates
        assert capabilities.runtime
        if bench.name == "process":
            assert not capabilities.isolates
            assert "none" in capabilities.details["isolation"]

    run(main())


def test_an_image_that_nothing_uses_may_be_told_finished_and_one_is_no_host(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        image = Image("ab" * 32, tmp_path / "absent")
        await bench.driver.image_finished(image)
        await bench.driver.image_finished(image)
        assert await bench.driver.list() == []
        if bench.name == "process":
            with pytest.raises(FalError) as caught:
                await bench.driver.create(bench.spec("i", image=image))
            assert caught.value.field == "image"
        with pytest.raises(FalError):  # without an image there must be a command
            await bench.driver.create(replace(bench.spec("c"), command=()))

    run(main())
