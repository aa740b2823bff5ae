"""Starting conmon, the monitor that outlives the agent: it creates the container, holds its log, writes its exit code.

Invariant: from its birth conmon is in a cgroup of its own (`cgroups.CONMON_CGROUP`) in every hierarchy, so that killing
every process of the agent's cgroup, as systemd does, misses it (see `nursery`). Called by the oci driver only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fal_runtime.driver import driver_failed
from fal_runtime.exec_process import remedy_of
from fal_runtime.oci.nursery import Nursery
from fal_runtime.oci.rotation import part_bytes

CREATE_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of one container; conmon ends without a word when `attach` does not exist."""

    bundle: Path
    log: Path
    pidfile: Path
    conmon_pidfile: Path
    exits: Path
    persist: Path
    attach: Path


@dataclass(frozen=True, slots=True)
class Runtime:
    """An OCI runtime's program and where it keeps its state."""

    program: str
    root: Path

    def command(self, *words: str) -> tuple[str, ...]:
        return (self.program, "--root", str(self.root), *words)


@dataclass(frozen=True, slots=True)
class Mode:
    """How containers are made on this machine: the runtime's program, and whether each has a user namespace."""

    program: str
    user_namespace: bool


def command(id: str, runtime: Runtime, paths: Paths, log_bytes_max: int) -> tuple[str, ...]:
    """conmon's command line."""
    return (
        *("conmon", "--api-version", "1", "-c", id, "-u", id, "-n", id),
        *("-r", runtime.program, "--runtime-arg", "--root", "--runtime-arg", str(runtime.root)),
        *("-b", str(paths.bundle), "-p", str(paths.pidfile), "-P", str(paths.conmon_pidfile)),
        *("--exit-dir", str(paths.exits), "--persist-dir", str(paths.persist)),
        *("--socket-dir-path", str(paths.attach), "--full-attach"),
        *("-l", f"k8s-file:{paths.log}", "--log-size-max", str(part_bytes(log_bytes_max)), "--no-sync-log"),
    )


async def create(id: str, runtime: Runtime, paths: Paths, log_bytes_max: int, nursery: Nursery) -> int:
    """Create the container under a new conmon; returns the pid of its first process, which waits to be started.

    DRIVER_FAILED with the runtime's own words.
    """
    try:
        answer = await nursery.ask(command(id, runtime, paths, log_bytes_max), paths.bundle, "sync", CREATE_TIMEOUT_S)
    except TimeoutError:
        raise driver_failed(
            f"container {id} was not created within {CREATE_TIMEOUT_S:.0f} s", remedy="Look at the machine's load."
        ) from None
    return _pid_of(id, answer)


def _pid_of(id: str, answer: bytes) -> int:
    try:
        said: dict[str, Any] = json.loads(answer or b"{}")
    except ValueError:
        said = {"message": answer.decode("utf-8", "replace")}
    pid = int(said.get("data", said.get("pid", -1)))
    if pid <= 0:
        message = _plain(str(said.get("message") or "conmon ended without a word"))
        remedy = remedy_of(message) if "exec: " in message else "Check the command, its mounts and the limits."
        raise driver_failed(f"container {id} was not created: {message}", remedy=remedy)
    return pid


def _plain(message: str) -> str:
    """runc's log line without its frame: `time=… level=error msg="text"` → text."""
    _before, found, text = message.strip().rpartition('msg="')
    return text.rstrip('"').replace('\\"', '"') if found else text
