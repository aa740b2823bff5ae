"""A command run beside a container's own: the values and the protocol that drivers and the agent share.

Invariant: a session never ends its container. What runs in it counts to the container's limits, ends with the container
and, within seconds, with the process that opened the session. Implementations: `fal_runtime.exec_process` (containers
and plain processes) and `fal_runtime.fake_exec`; tests/contract/test_exec.py holds them to the words below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from fal_contract.errors import FalError, invalid

# An empty command asks for a shell: the first of these that exists inside, $SHELL before them.
SHELLS: Final[tuple[tuple[str, ...], ...]] = (("/bin/bash",), ("/bin/sh",), ("/bin/busybox", "sh"))
TERM_DEFAULT: Final = "xterm"
ROWS_DEFAULT: Final = 24
COLUMNS_DEFAULT: Final = 80
_SIZE_MAX: Final = 4096
COMMAND_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Terminal:
    """A terminal's size in characters and its kind ($TERM)."""

    rows: int = ROWS_DEFAULT
    columns: int = COLUMNS_DEFAULT
    term: str = TERM_DEFAULT


class ExecSession(Protocol):
    """One command under way. One reader, one writer; `close` at the end, whatever happened."""

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes] | None:
        """Up to 32 KiB of output as soon as there is some; None once no more comes. A terminal has stdout only."""
        ...

    async def write(self, data: bytes) -> None:
        """Give it input; returns when it was taken. What nobody reads any more is dropped."""
        ...

    def close_input(self) -> None:
        """No more input comes; a terminal is sent its end-of-file character."""
        ...

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has a new size; nothing happens without one."""
        ...

    def kill(self) -> None:
        """SIGKILL to the command and all of its session; `wait` tells the end."""
        ...

    async def wait(self) -> int:
        """The exit code, 128 + n after signal n. DRIVER_FAILED when it was lost."""
        ...

    async def close(self) -> None:
        """Kill it if it runs, and let go of everything."""
        ...


def check_exec(command: tuple[str, ...]) -> None:
    """Raise INVALID, naming the field, unless a driver could run this; empty means a shell."""
    if command and not command[0]:
        raise invalid("command", command, "names no program", remedy="Give a program to run.")
    if any("\0" in word for word in command):
        raise invalid("command", command[0], "holds a NUL character", remedy="Remove it.")
    if sum(len(word.encode("utf-8", "surrogateescape")) for word in command) > COMMAND_BYTES_MAX:
        raise invalid("command", command[0], "is too long", remedy=f"At most {COMMAND_BYTES_MAX} bytes.")


def checked_terminal(terminal: Terminal | None) -> Terminal | None:
    """With the defaults for what a client left out; sizes that no terminal has are cut."""
    if terminal is None:
        return None
    rows, columns = terminal.rows or ROWS_DEFAULT, terminal.columns or COLUMNS_DEFAULT
    term = terminal.term if terminal.term.isascii() and terminal.term.isprintable() else ""
    return Terminal(min(rows, _SIZE_MAX), min(columns, _SIZE_MAX), term[:64] or TERM_DEFAULT)


def no_shell(tried: list[str], last: FalError) -> FalError:
    """None of the shells exists inside."""
    return invalid(
        "command",
        "",
        f"means a shell, and the container has none of {', '.join(tried)} ({last.what})",
        remedy="Name a command that its image has: `falctl runner exec RUNNER -- COMMAND`.",
    )
