"""Text of containers on an operator's terminal, and the way out of a session."""

from __future__ import annotations

import os
import pty
import termios
import unicodedata
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falctl.terminal import Escape, harmless, raw_mode


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = harmless(text)
    assert not [c for c in shown if c != "\t" and unicodedata.category(c) == "Cc"]
    assert not set(shown) & set("\u200e\u200f\u202a\u202e\u2066\u2069")
    if text.isprintable():
        assert shown == text


def test_escape_sequences_are_shown() -> None:
    assert harmless("\x1b]0;owned\x07red \x1b[31m\r\tö 東") == r"\x1b]0;owned\x07red \x1b[31m\x0d" + "\tö 東"


@pytest.mark.parametrize(
    ("typed", "sent", "over"),
    [
        (b"ls\n~.", b"ls\n", True),
        (b"~.", b"", True),
        (b"a~.", b"a~.", False),
        (b"\r~~.", b"\r~.", False),
        (b"\r~x", b"\r~x", False),
        (b"~\r~.rest", b"~\r", True),
    ],
)
def test_the_way_out_is_only_behind_enter(typed: bytes, sent: bytes, over: bool) -> None:
    assert Escape().feed(typed) == (sent, over)
    escape, got, ended = Escape(), b"", False
    for byte in typed:  # as a terminal sends it
        part, ended = escape.feed(bytes([byte]))
        got += part
        if ended:
            break
    assert (got, ended) == (sent, over)


def test_the_terminal_is_as_before_however_it_ends() -> None:
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with suppress(KeyboardInterrupt), raw_mode(slave):
            assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
            raise KeyboardInterrupt
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
