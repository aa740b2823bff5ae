"""What others wrote is shown by falctl and never obeyed by the operator's terminal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fal_contract.errors import Code, FalError
from falctl import output

# It clears the screen, writes to the clipboard, begins a sequence with one byte of C1, turns text around.
HOSTILE = "it ended \x1b[2J\x1b]52;c;ZXZpbA==\x07 \x9b31m \u202e \r done"
SHOWN = "it ended \\x1b[2J\\x1b]52;c;ZXZpbA==\\x07 \\x9b31m \\x202e \\x0d done"
MANY = output.PRETTY_ROWS_MAX + 1

PRINTED: dict[str, Callable[[], None]] = {
    "facts": lambda: output.print_facts([("reason", HOSTILE)]),
    "table": lambda: output.print_table(("a",), [[HOSTILE]], empty=""),
    "long table": lambda: output.print_table(("a",), [[HOSTILE]] * MANY, empty=""),
    "line": lambda: output.console().print(HOSTILE),
    "error": lambda: output.print_error(FalError(Code.INTERNAL, HOSTILE, remedy="Look.")),
}


@pytest.mark.parametrize("how", PRINTED)
def test_control_characters_are_shown_not_obeyed(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    PRINTED[how]()
    said = capsys.readouterr()
    text = said.out + said.err
    assert SHOWN in text
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print("one\n\ttwo")
    assert capsys.readouterr().out.splitlines()[0] == "one"
