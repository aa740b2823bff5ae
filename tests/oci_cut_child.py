"""A process that kills and removes a container, and is itself killed with SIGKILL at its n-th step.

For each line `STATE ID CUT` on its standard input it forks such a process (imports are the slow part) and says
`STEPS`, how many steps that one got to, or `killed`. A step is anything that changes the system: a call that the kernel
sees as a write (files, signals, processes), or the driver's own unmounting. CUT -1 cuts nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from fal_runtime.oci.driver import OciDriver

CALLS = {
    "unlink",
    "remove",
    "rmdir",
    "rename",
    "replace",
    "link",
    "mkdir",
    "write",
    "kill",
    "pidfd_send_signal",
    "fork_exec",
}
OURS = {"unmount_all", "unmount_below", "take_away", "keep", "release", "dismantle"}


class Cutter:
    """Counts steps as a profile function of every thread."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        by_us = event == "call" and "fal_runtime" in frame.f_code.co_filename and frame.f_code.co_name in OURS
        if by_us or (event == "c_call" and arg.__name__ in CALLS):
            if self.steps == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.steps += 1


def take_away(state: Path, id: str, cutter: Cutter) -> None:
    """What an agent does with a runner's container: it ends, then it goes."""

    async def main() -> None:
        driver = OciDriver(state)
        threading.setprofile(cutter)
        sys.setprofile(cutter)
        await driver.kill(id)
        await driver.remove(id)
        sys.setprofile(None)

    asyncio.run(main())


def main() -> None:
    for line in sys.stdin:
        state, id, at = line.split()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            cutter = Cutter(int(at))
            try:
                take_away(Path(state), id, cutter)
                os.write(writer, b"%d" % cutter.steps)
            finally:
                os._exit(1)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        said = os.read(reader, 16).decode()
        os.close(reader)
        os.write(1, f"{said or ('killed' if os.WIFSIGNALED(status) else 'failed')}\n".encode())


if __name__ == "__main__":
    main()
