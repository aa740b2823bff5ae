"""The end of a command's session whose helper does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fal_runtime.exec_process import HelperExec, Request

TIMEOUT_S = 30.0


def open_pipes_and_sockets() -> int:
    names = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(name).startswith(("pipe:", "socket:")) for name in names if os.path.lexists(name))


def test_a_close_that_is_cancelled_leaves_no_descriptor(tmp_path: Path) -> None:
    async def main() -> None:
        work = tmp_path / "work"
        before = open_pipes_and_sockets()
        session = await HelperExec.start("sleep", Request(argv=("sleep", "60"), env={}), work, terminal=None)
        assert session._helper is not None
        helper = session._helper.pid
        assert open_pipes_and_sockets() > before
        os.kill(helper, signal.SIGSTOP)
        try:
            closing = asyncio.create_task(session.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert open_pipes_and_sockets() == before
            assert not work.exists()
            await session.close()  # once more is fine
        finally:
            os.kill(helper, signal.SIGCONT)
            await asyncio.wait_for(session._helper.wait(), TIMEOUT_S)

    asyncio.run(main())
