"""`falctl runner exec|shell|top`: into a runner's container."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import GLOBALS, call
from falctl.pools import JsonFlag
from falctl.runners import find_runner, group

TtyFlag = Annotated[bool | None, typer.Option("--tty/--no-tty", "-t/-T", help="With a terminal; else if here is one.")]


@group.command("exec")
def exec_command(
    runner: Annotated[str, typer.Argument(help="A runner, the beginning of its id, or an app with one runner.")],
    command: Annotated[list[str], typer.Argument(help="After `--`: the command and its arguments.")],
    tty: TtyFlag = None,
) -> None:
    """Run a command in a runner's container; its exit code is falctl's. `Enter ~ .` ends a session that hangs."""
    _run(runner, tuple(command), tty)


@group.command("shell")
def shell(
    runner: Annotated[str, typer.Argument(help="A runner, the beginning of its id, or an app with one runner.")],
    tty: TtyFlag = None,
) -> None:
    """A shell in a runner's container: the first of $SHELL, bash, sh and busybox that it has."""
    _run(runner, (), tty)


def _run(runner: str, command: tuple[str, ...], tty: bool | None) -> None:
    import os

    from fal_contract.errors import invalid
    from falctl.remote_command import Streams, run_remote

    here = os.isatty(0) and os.isatty(1)
    if tty and not os.isatty(0):
        raise invalid("--tty", "true", "needs a terminal on standard input", remedy="Leave it out.")

    async def work(stub: Any) -> int:
        runner_id = await find_runner(stub, runner)
        return await run_remote(stub, runner_id, command, Streams(terminal=here if tty is None else tty))

    raise typer.Exit(call(work))


@group.command("top")
def top(
    runner: Annotated[str, typer.Argument(help="A runner, the beginning of its id, or an app with one runner.")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again until interrupted.")] = False,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.5, max=3600)] = 2.0,
    json: JsonFlag = False,
) -> None:
    """A runner's processes, and what its container uses; with --watch --json one object a line."""
    import asyncio

    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_json_line, to_json

    async def work(stub: Any) -> None:
        request = pb.TopRunnerRequest(id=await find_runner(stub, runner))
        before: Any = None
        while True:
            reply = await stub.TopRunner(request, timeout=GLOBALS.timeout_s)
            if json and not watch:
                print_json("top", to_json(reply))
            elif json:
                print_json_line(to_json(reply))
            else:
                _show(reply, before, clear=watch)
            if not watch:
                return
            before = reply
            await asyncio.sleep(every_s)

    call(work)


def _show(reply: Any, before: Any, *, clear: bool) -> None:
    import sys

    from fal_contract.units import format_bytes
    from falctl.output import print_facts, print_table
    from falctl.terminal import harmless

    if clear and sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")
    memory = format_bytes(reply.memory_bytes)
    if reply.memory_bytes_max:
        memory += f" of {format_bytes(reply.memory_bytes_max)}"
    print_facts(
        [
            ("CPU", f"{reply.cpu_s:.1f}s{_share(reply, before)}"),
            ("memory", memory),
            ("tasks", f"{reply.pids} of {reply.pids_max}" if reply.pids_max else str(reply.pids)),
            ("disk", f"{format_bytes(reply.read_bytes)} read, {format_bytes(reply.written_bytes)} written"),
            ("out of memory", f"{reply.oom_kills} killed" if reply.oom_kills else ""),
        ]
    )
    earlier = {row.pid: row for row in before.processes} if before is not None else {}
    print_table(
        ("PID", "ON HOST", "UID", "STATE", "CPU", "MEMORY", "THREADS", "COMMAND"),
        (
            (
                str(row.pid_inside), str(row.pid), str(row.uid), row.state,
                f"{row.cpu_s:.1f}s{_row_share(row, earlier.get(row.pid), reply, before)}",
                format_bytes(row.memory_bytes), str(row.threads), harmless(row.command),
            )
            for row in reply.processes
        ),
        empty="No processes.",
    )  # fmt: skip


def _share(reply: Any, before: Any) -> str:
    """CPU use since the last look, as a share of one CPU."""
    if before is None or reply.time_s <= before.time_s:
        return ""
    return f" ({(reply.cpu_s - before.cpu_s) / (reply.time_s - before.time_s):.0%})"


def _row_share(row: Any, earlier: Any, reply: Any, before: Any) -> str:
    if earlier is None or reply.time_s <= before.time_s:
        return ""
    return f" ({(row.cpu_s - earlier.cpu_s) / (reply.time_s - before.time_s):.0%})"
