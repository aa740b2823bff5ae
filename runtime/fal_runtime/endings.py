"""Why a container ended, in one sentence that an operator can act on. Pure.

What is known: its exit code (128 + n after signal n, by convention; a program may also exit with such a number), how
often the kernel killed one of its processes for memory, what we did to it, and what it said last.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fal_contract.units import format_bytes

_LIBRARY: Final = re.compile(r"error while loading shared libraries: ([^:]+): cannot open")
_NOT_FOUND: Final = re.compile(r"(?:^|: |exec: )\"?([^\s:\"]+)\"?: (?:command )?not found")
_FORMAT: Final = re.compile(r"exec format error", re.IGNORECASE)
_VICTIM: Final = re.compile(r"oom-kill:.*\btask_memcg=([^,]+),task=([^,]+),pid=(\d+)")


@dataclass(frozen=True, slots=True)
class Told:
    """What we did to it before it ended: signals in order, seconds of grace after the first."""

    signals: tuple[str, ...] = ()
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory kills: how many, the limit in bytes (0: none or not known), and the last victim as `name (pid n)`."""

    kills: int = 0
    limit_bytes: int = 0
    victim: str = ""


def reason(code: int | None, *, told: Told = Told(), memory: Memory = Memory(), last_lines: Sequence[str] = ()) -> str:
    """The sentence."""
    if memory.kills:
        return _out_of_memory(code, memory)
    if told.signals:
        return _as_told(code, told)
    if code is None:
        return "exit code lost"
    if code in (126, 127) and (hint := _hint(last_lines)):
        return f"exited with code {code}: {hint}"
    if name := _signal_name(code):
        return f"killed by {name} (signal {code - 128}), not by us"
    return f"exited with code {code}"


def _out_of_memory(code: int | None, memory: Memory) -> str:
    limit = f" at its limit of {format_bytes(memory.limit_bytes)}" if memory.limit_bytes else ""
    who = memory.victim or ("its main process" if code == 137 else "one of its processes")
    more = f" ({memory.kills} in all)" if memory.kills > 1 else ""
    text = f"out of memory{limit}: the kernel killed {who}{more}"
    return text if code == 137 else f"{text}; it exited with code {code}"


def _as_told(code: int | None, told: Told) -> str:
    if told.signals[0] == "SIGKILL":
        return "killed by us (SIGKILL)"
    if "SIGKILL" in told.signals and code == 137:
        return f"stopped: SIGTERM was ignored for {told.grace_s:g} s, then SIGKILL"
    return f"stopped by us (SIGTERM): exited with code {code}"


def _hint(lines: Sequence[str]) -> str:
    """What a shell or the dynamic loader said of a program that did not run."""
    for line in reversed(lines):
        if found := _LIBRARY.search(line):
            return f"shared library {found[1]} is missing in the image"
        if found := _NOT_FOUND.search(line):
            return f"{found[1]} was not found in the image"
        if _FORMAT.search(line):
            return "its program is not for this machine's processor"
    return ""


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(code - 128).name if code > 128 else ""
    except ValueError:
        return ""


def victim_in(messages: str, cgroup_path: str) -> str:
    """The last process that the kernel's messages say was killed for memory in this control group; empty: none."""
    found = [match for match in _VICTIM.finditer(messages) if match[1] == cgroup_path]
    return f"{found[-1][2]} (pid {found[-1][3]})" if found else ""
