"""`falctl weights where`: which nodes have a model, which are bringing it, how fast, from whom, and when they are done.

`follow` asks every second. On a terminal a table is rewritten; elsewhere one line a second says how far all of it is,
and one line a node when it is ready, so that a log of 1,000 nodes stays readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from falctl.context import owned, unary
from falctl.pools import JsonFlag
from falctl.weights import group

POLL_S: Final = 1.0
ROWS_SHOWN_MAX: Final = 20  # of a table that is rewritten
COLUMNS: Final = ("NODE", "POOL", "HERE", "RATE", "READY IN", "FROM ORIGIN", "FROM PEERS", "BECAUSE")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model is on the nodes that should have it. Bytes; `ready_in_s` of the slowest, -1: cannot be said."""

    ready: int
    nodes: int
    bytes_done: int
    bytes_total: int
    rate_bytes_s: int
    bytes_from_origin: int
    model_bytes: int
    ready_in_s: float

    @property
    def done(self) -> bool:
        """Whether all have it."""
        return self.ready >= self.nodes


def progress_of(reply: Any, names: Sequence[str]) -> Progress:
    """From a WhereModelReply, of the nodes `names`; none named: of those that tell something."""
    chosen = [one for one in reply.nodes if not names or one.node in names]
    size = reply.bytes_total
    waits = [one.ready_in_s for one in chosen if not one.cached.ready]
    missing = len(set(names) - {one.node for one in chosen})  # those that have told nothing yet
    return Progress(
        ready=sum(1 for one in chosen if one.cached.ready),
        nodes=len(chosen) + missing,
        bytes_done=sum(size if one.cached.ready else min(size, one.cached.bytes_disk) for one in chosen),
        bytes_total=size * (len(chosen) + missing),
        rate_bytes_s=sum(one.cached.rate_bytes_s for one in chosen if not one.cached.ready),
        bytes_from_origin=reply.bytes_from_origin,
        model_bytes=size,
        ready_in_s=-1.0 if missing or any(wait < 0 for wait in waits) else max(waits, default=0.0),
    )


def progress_line(progress: Progress) -> str:
    """`3 of 8 nodes ready, 41 %, 1.2 GiB/s, ready in 42s, origin read 1.00 times`."""
    from fal_contract.units import format_bytes, format_duration

    share = 100 * progress.bytes_done // progress.bytes_total if progress.bytes_total else 100
    parts = [f"{progress.ready} of {progress.nodes} nodes ready", f"{share} %"]
    if not progress.done:
        parts.append(f"{format_bytes(progress.rate_bytes_s)}/s")
        known = progress.ready_in_s >= 0
        parts.append(f"ready in {format_duration(progress.ready_in_s)}" if known else "ready: cannot be said yet")
    if progress.model_bytes:
        parts.append(f"origin read {progress.bytes_from_origin / progress.model_bytes:.2f} times")
    return ", ".join(parts)


def rows_of(reply: Any) -> Iterator[tuple[str, ...]]:
    """A row a node, as `COLUMNS`."""
    from fal_contract.units import format_bytes, format_duration

    for one in reply.nodes:
        cached = one.cached
        if cached.ready:
            here, when = "ready", "-"
            if cached.bytes_memory:
                here = "ready, in memory"
        else:
            share = 100 * cached.bytes_disk // reply.bytes_total if reply.bytes_total else 0
            here = f"{share} %" if cached.bytes_disk or cached.wanted else "-"
            when = format_duration(one.ready_in_s) if one.ready_in_s >= 0 else "?"
        yield (
            one.node or one.node_id,
            one.pool,
            here,
            f"{format_bytes(cached.rate_bytes_s)}/s" if cached.rate_bytes_s else "-",
            when,
            format_bytes(cached.bytes_from_origin),
            format_bytes(cached.bytes_from_peers),
            cached.waits_for or one.because or "-",
        )


@group.command("where")
def where(
    name: str,
    every: Annotated[bool, typer.Option("--all", help="Also nodes that have nothing of it.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow until all that bring it have it.")] = False,
    within: Annotated[str, typer.Option("--within", help="How long to follow: 90s, 15m, 6h.")] = "6h",
    json: JsonFlag = False,
) -> None:
    """Which nodes have a model, and how long each would take to have it."""
    from fal_contract.errors import invalid
    from fal_contract.units import parse_duration_s
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    within_s = parse_duration_s(within, field="--within")
    if watch and json:
        raise invalid("--json", True, "does not go with --watch", remedy="Leave one of both out.")
    model = owned(name, field="NAME")
    if watch:
        follow(model, [], timeout_s=within_s)
        return
    reply = unary("WhereModel", pb.WhereModelRequest(id=model, all=every))
    if json:
        print_json("where", to_json(reply))
        return
    print_table(COLUMNS, rows_of(reply), empty="No node has it, and none brings it.")
    if reply.nodes:
        typer.echo(progress_line(progress_of(reply, [])), err=True)


def follow(model: str, names: Sequence[str], *, timeout_s: float) -> None:
    """Ask every second until all of `names` (none: all that bring it) have it. Raises FalError(TIMEOUT)."""
    import time

    from fal_contract.errors import Code, FalError
    from fal_contract.v1 import cluster_pb2 as pb

    deadline = time.monotonic() + timeout_s
    with _shown(names) as show:
        while True:
            reply = unary("WhereModel", pb.WhereModelRequest(id=model, all=bool(names)))
            progress = progress_of(reply, names)
            show(reply, progress)
            if progress.done:
                return
            if time.monotonic() > deadline:
                raise FalError(
                    Code.TIMEOUT,
                    f"{model} is not there after {timeout_s:g} s: {progress_line(progress)}",
                    remedy=f"It goes on in the background; see `falctl weights where {model}`.",
                )
            time.sleep(POLL_S)


Show = Callable[[Any, Progress], None]


@contextmanager
def _shown(names: Sequence[str]) -> Iterator[Show]:
    from falctl.output import console

    screen = console()
    if not screen.is_terminal:
        yield _lines(names, lambda text: screen.print(text, markup=False))
        return
    from rich.live import Live

    with Live(console=screen, auto_refresh=False) as live:

        def show(reply: Any, progress: Progress) -> None:
            live.update(_table(reply, progress), refresh=True)

        yield show


def _lines(names: Sequence[str], say: Callable[[str], object]) -> Show:
    """Tells changes only."""
    ready: set[str] = set()
    last = ""

    def show(reply: Any, progress: Progress) -> None:
        nonlocal last
        for one in reply.nodes:
            if one.cached.ready and one.node not in ready and (not names or one.node in names):
                ready.add(one.node)
                say(f"{one.node} ready")
        line = progress_line(progress)
        if line != last:
            say(line)
            last = line

    return show


def _table(reply: Any, progress: Progress) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=progress_line(progress), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    unfinished = [row for row in rows_of(reply) if not row[2].startswith("ready")]
    for row in unfinished[:ROWS_SHOWN_MAX]:
        table.add_row(*row)
    if len(unfinished) > ROWS_SHOWN_MAX:
        table.add_row(f"… {len(unfinished) - ROWS_SHOWN_MAX} more", *[""] * (len(COLUMNS) - 1))
    return table
