"""User namespaces as file descriptors, for idmapped mounts (the container's own namespace is made by the runtime).

A namespace lives as long as a descriptor of it is open, so a helper process is needed only while one is made: `unshare`
(util-linux) in a namespace of its own, whose id map the parent writes. Called by the oci driver.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

from fal_runtime.driver import driver_failed

TIMEOUT_S: Final = 10.0
KEPT_MAX: Final = 64  # a full node; each costs a descriptor and a few KiB of the kernel


async def open_userns(start: int, count: int) -> int:
    """A descriptor of a new user namespace that maps ids 0..count-1 to start..start+count-1. The caller closes it."""
    helper = await asyncio.create_subprocess_exec(
        *("unshare", "--user", "--", "cat"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert helper.stdin is not None
    assert helper.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            # cat answers only from within the new namespace.
            helper.stdin.write(b"\n")
            await helper.stdin.drain()
            if await helper.stdout.read(1) != b"\n":
                raise driver_failed("a user namespace cannot be made here", remedy="Look at user.max_user_namespaces.")
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{helper.pid}/{name}").write_text(f"0 {start} {count}")
            return os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except (TimeoutError, OSError) as error:
        raise driver_failed(
            f"a user namespace for ids from {start} cannot be made: {error}", remedy="Run as root."
        ) from error
    finally:
        helper.stdin.close()
        if helper.returncode is None:
            helper.kill()
        await helper.wait()


class UsernsCache:
    """The last few namespaces by first id: ids are handed out lowest first, so most starts find theirs here."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._fds: OrderedDict[int, int] = OrderedDict()

    async def get(self, start: int) -> int:
        """A descriptor that stays open until this cache has handed out `KEPT_MAX` others or is closed."""
        if start not in self._fds:
            fd = await open_userns(start, self._count)
            if start in self._fds:  # another task was faster
                os.close(fd)
            else:
                self._fds[start] = fd
        self._fds.move_to_end(start)
        while len(self._fds) > KEPT_MAX:
            os.close(self._fds.popitem(last=False)[1])
        return self._fds[start]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])
