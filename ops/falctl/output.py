"""What falctl prints: tables for people, one JSON object under a noun for programs, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from fal_contract.errors import FalError
from falctl.terminal import harmless

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

# Enum values lose their type's prefix: RUNNER_STATE_IDLE → IDLE.
PRETTY_ROWS_MAX: Final = 1000
_ENUM_PREFIXES: Final = ("RUNNER_STATE_", "MODEL_STATE_", "GPU_HEALTH_", "GOAL_")


def console() -> Console:
    """A console on stdout; plain and as wide as needed where stdout is no terminal.

    Without markup: what is printed was mostly written by others, and a `[/` in it would be an error. Nor does the
    terminal obey it: a container's last words may be sequences that write to the operator's clipboard.
    """
    from rich.console import Console

    class Harmless(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(_harmless(one) if isinstance(one, str) else one for one in objects), **options)

    return Harmless(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)


def _harmless(text: str) -> str:
    """Lines stay lines."""
    return "\n".join(harmless(line) for line in text.split("\n"))


def print_error(error: FalError) -> None:
    """`error: WHAT. REMEDY`."""
    sys.stderr.write(_harmless(f"error: {error}") + "\n")


def print_json(noun: str, value: object) -> None:
    """One object under a noun, nothing else."""
    sys.stdout.write(json.dumps({noun: value}, indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: object) -> None:
    """One object on one line, for streams."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """A table; `empty` is said instead when there are no rows."""
    from rich import box
    from rich.table import Table

    rows = [[_harmless(cell) for cell in row] for row in rows]
    if not rows:
        console().print(empty)
        return
    if len(rows) > PRETTY_ROWS_MAX:
        _print_plain(columns, rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _print_plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The same for many rows: a rich table of 100,000 rows takes half a minute, this a tenth of a second."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (columns, *rows))
    sys.stdout.write("\n".join(lines) + "\n")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """`name  value` lines; empty values are left out."""
    shown = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        console().print(f"[bold]{name:<{width}}[/bold]  {_escaped(value)}", markup=True)


@contextmanager
def status_line(first: str, *, stderr: bool = False) -> Iterator[Callable[[str], None]]:
    """On a terminal one line that is rewritten by what is yielded; the text is taken as it is."""
    from rich.console import Console
    from rich.text import Text

    out = Console(stderr=True, highlight=False) if stderr else console()
    with out.status(Text(first)) as status:
        yield lambda text: status.update(Text(_harmless(text)))


def _escaped(value: str) -> str:
    from rich.markup import escape

    return escape(value)


def to_json(message: Message) -> dict[str, Any]:
    """A message as plain JSON: every field, numbers as numbers, enums without prefix, bytes in hexadecimal.

    The canonical protobuf mapping writes 64-bit integers as text, which no shell tool expects.
    """
    shown: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            shown[field.name] = None
            continue
        shown[field.name] = _field_value(field, getattr(message, field.name))
    return shown


def _field_value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        plain = _scalar(field.message_type.fields_by_name["value"])
        return {key: plain(value[key]) for key in sorted(value)}
    plain = _scalar(field)
    return [plain(one) for one in value] if field.is_repeated else plain(value)


def _scalar(field: Any) -> Callable[[Any], Any]:
    if field.message_type is not None:
        return to_json
    if field.enum_type is not None:
        names = field.enum_type.values_by_number
        return lambda number: enum_word(names[number].name)
    if field.type == field.TYPE_BYTES:
        return lambda value: value.hex()
    return lambda value: value


def enum_word(name: str) -> str:
    """`RUNNER_STATE_IDLE` → `IDLE`."""
    for prefix in _ENUM_PREFIXES:
        name = name.removeprefix(prefix)
    return name
