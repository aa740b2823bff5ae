"""Commands beside a plain process, and what a plain process uses: the process driver's exec and top."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_runtime.container_use import ContainerUse, descendants
from fal_runtime.exec_process import HelperExec, Request, is_missing
from fal_runtime.exec_session import SHELLS, Terminal, check_exec, checked_terminal, no_shell
from fal_runtime.proc_table import parents, rows

_COUNT: Final = itertools.count(1)


async def open_exec(
    id: str, directory: Path, pid: int, env: dict[str, str], command: tuple[str, ...], terminal: Terminal | None
) -> HelperExec:
    """Start `command`, or a shell, beside process `pid`, with its environment. INVALID (command), DRIVER_FAILED."""
    check_exec(command)
    terminal = checked_terminal(terminal)
    if terminal is not None:
        env = {**env, "TERM": terminal.term}
    shells = list(dict.fromkeys([(env.get("SHELL", ""),)] * env.get("SHELL", "").startswith("/") + list(SHELLS)))
    tried: list[str] = []
    for argv in [command] if command else shells:
        request = Request(argv=argv, env=env, bound_to=pid)
        while (work_dir := directory / "exec" / str(next(_COUNT))).exists():
            pass  # of a caller before us
        try:
            return await HelperExec.start(f"{argv[0]} in container {id}", request, work_dir, terminal=terminal)
        except FalError as error:
            if command or not is_missing(error):
                raise
            tried.append(argv[0])
            last = error
    raise no_shell(tried, last)


def use(roots: tuple[int, ...], now_s: float) -> ContainerUse:
    """What the processes below `roots` use; without control groups nothing else is counted."""
    found = rows(sorted(descendants(parents(), roots))) if roots else ()
    return ContainerUse(
        time_s=now_s,
        cpu_s=sum(row.cpu_s for row in found),
        memory_bytes=sum(row.memory_bytes for row in found),
        pids=sum(row.threads for row in found),
        processes=found,
    )
