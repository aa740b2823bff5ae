"""An operator's terminal during a remote command: raw mode that is always undone, the way out, harmless text.

`Escape` and `harmless` are pure. Imports stay light; termios is loaded when a terminal is used.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Final

# Everything that a terminal could obey: C0 but tab, DEL, C1, and marks that turn the direction of text.
_OBEYED: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Text that a container wrote, for printing: control characters are shown, not obeyed."""
    return _OBEYED.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class Escape:
    """Finds `Enter ~ .` in what is typed: the end of a session whose other side does not answer."""

    def __init__(self) -> None:
        self._at = 1  # 0: inside a line, 1: at its beginning, 2: after "~"

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """(what goes to the command, whether the session is to end). A lone "~" is held back until the next byte."""
        out = bytearray()
        for byte in typed:
            if self._at == 2:
                if byte == ord("."):
                    return bytes(out), True
                self._at = 0
                out += b"~" if byte != ord("~") else b""
            if self._at == 1 and byte == ord("~"):
                self._at = 2
                continue
            out.append(byte)
            self._at = int(byte in b"\r\n")
        return bytes(out), False


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Every byte goes to the command, Ctrl-C too; the terminal is as before however this ends."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # what was typed already is not lost
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def size(fd: int) -> tuple[int, int]:
    """Rows and columns."""
    columns, rows = os.get_terminal_size(fd)
    return rows, columns
