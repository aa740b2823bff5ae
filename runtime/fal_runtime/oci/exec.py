"""Commands beside a container's own, in the same namespaces and control groups, with the same user and restrictions.

Invariant: the runtime starts the command from the container's own process description, of which only command, terminal
and $TERM differ, so nothing that was taken from the container (capabilities, new privileges, system calls) is given to
the command. Called by the oci driver.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import FalError
from fal_runtime.driver import driver_failed
from fal_runtime.exec_process import HelperExec, Request, is_missing
from fal_runtime.exec_session import SHELLS, Terminal, check_exec, checked_terminal, no_shell
from fal_runtime.oci import cgroups
from fal_runtime.oci.conmon import Runtime
from fal_runtime.oci.record import ContainerFiles

_COUNT: Final = itertools.count(1)


def process(config: dict[str, Any], command: tuple[str, ...], terminal: Terminal | None) -> dict[str, Any]:
    """The OCI process of `command` in a container with this `config.json`."""
    own: dict[str, Any] = config["process"]
    env = [entry for entry in own["env"] if not (terminal and entry.startswith("TERM="))]
    made = {**own, "args": list(command), "terminal": terminal is not None}
    if terminal is not None:
        env.append(f"TERM={terminal.term}")
        made["consoleSize"] = {"height": terminal.rows, "width": terminal.columns}
    return {**made, "env": env}


def shells(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """What to try when no command was named, the container's own choice first."""
    own = next((entry[6:] for entry in config["process"]["env"] if entry.startswith("SHELL=/")), "")
    return list(dict.fromkeys([(own,)] * bool(own) + list(SHELLS)))


async def open_exec(
    files: ContainerFiles, runtime: Runtime, command: tuple[str, ...], terminal: Terminal | None
) -> HelperExec:
    """Start it. INVALID (command), DRIVER_FAILED."""
    check_exec(command)
    terminal = checked_terminal(terminal)
    try:
        config = json.loads((files.paths().bundle / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise driver_failed(f"container {files.id} has lost its description", remedy="Stop it.") from error
    if command:
        return await _start(files, runtime, config, command, terminal)
    tried: list[str] = []
    for shell in shells(config):
        try:
            return await _start(files, runtime, config, shell, terminal)
        except FalError as error:
            if not is_missing(error):
                raise
            tried.append(shell[0])
            last = error
    raise no_shell(tried, last)


async def _start(
    files: ContainerFiles, runtime: Runtime, config: dict[str, Any], command: tuple[str, ...], terminal: Terminal | None
) -> HelperExec:
    record = files.record()
    request = Request(runtime=runtime.command(), container=files.runtime_id, process=process(config, command, terminal))
    return await HelperExec.start(
        f"{command[0]} in container {files.id}",
        request,
        _work_dir(files.directory),
        terminal=terminal,
        owner_uid=record.uid_start if record is not None else None,  # the runtime, as this root, gives them on
        enter=lambda pid: cgroups.enter(pid, cgroups.CONMON_CGROUP),
    )


def _work_dir(directory: Path) -> Path:
    while (path := directory / "exec" / str(next(_COUNT))).exists():
        pass  # of a caller before us
    return path
