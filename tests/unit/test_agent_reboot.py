"""The command that reboots a machine: run once, what it says is told, what cannot run is refused at the start."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from fal_agent import reboot
from fal_agent.reboot import Rebooter, check_command
from fal_contract.errors import Code, FalError


def test_a_command_that_fails_is_told_with_its_words() -> None:
    async def go() -> None:
        with pytest.raises(FalError) as failed:
            await Rebooter((sys.executable, "-c", "import sys; print('no power'); sys.exit(3)"))()
        assert (failed.value.code, failed.value.what) == (
            Code.FAILED_PRECONDITION,
            "its reboot command ended with 3: no power",
        )

    asyncio.run(go())


def test_two_calls_run_it_once_and_a_machine_that_stays_up_was_not_rebooted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reboot, "REBOOT_PATIENCE_S", 0.05)
    log = tmp_path / "log"

    async def go() -> None:
        rebooter = Rebooter((sys.executable, "-c", f"open({str(log)!r}, 'a').write('x')"))
        errors = await asyncio.gather(rebooter(), rebooter(), return_exceptions=True)
        assert [error.code for error in errors if isinstance(error, FalError)] == [Code.TIMEOUT] * 2
        assert "still up" in str(errors[0])

    asyncio.run(go())
    assert log.read_text() == "x"


def test_a_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reboot, "REBOOT_COMMAND_TIMEOUT_S", 0.2)

    async def go() -> None:
        with pytest.raises(FalError, match="did not end within"):
            await Rebooter(("sleep", "60"))()

    asyncio.run(go())


def test_without_a_command_it_may_not() -> None:
    with pytest.raises(FalError, match="reboot_command is not set"):
        asyncio.run(_call(Rebooter(())))


async def _call(rebooter: Rebooter) -> None:
    await rebooter()


def test_a_command_line_is_read_as_a_shell_would() -> None:
    assert check_command("") == ()
    assert check_command("env 'a b' c") == ("env", "a b", "c")


@pytest.mark.parametrize("text", ["no-such-program-anywhere now", "env 'a"])
def test_what_cannot_run_is_refused(text: str) -> None:
    with pytest.raises(FalError) as refused:
        check_command(text)
    assert (refused.value.code, refused.value.field) == (Code.INVALID, "reboot_command")
