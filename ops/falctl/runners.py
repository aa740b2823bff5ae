"""`falctl runner`: containers with their GPUs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import GLOBALS, call, listed, owned, pages, team, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Containers with their GPUs.", no_args_is_help=True)


@group.command("list")
def list_runners(
    app: Annotated[str, typer.Option(help="Only this app.")] = "",
    node: Annotated[str, typer.Option(help="Only this node, by id or name.")] = "",
    all_teams: Annotated[bool, typer.Option("--all-teams", help="Every team's.")] = False,
    json: JsonFlag = False,
) -> None:
    """A team's runners, orphans among them."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    request = pb.ListRunnersRequest(
        team="" if all_teams else team(), app=owned(app, field="--app") if app else "", node=node
    )
    views = listed("ListRunners", request, "runners")
    if json:
        print_json("runners", [to_json(view) for view in views])
        return
    print_table(
        ("RUNNER", "STATE", "NODE", "GPUS", "SERVED", "AGE", "REASON"),
        (
            (
                view.runner.id, state_text(view), view.node_name or "-", _gpus(view.runner),
                str(view.status.served), _age(view), view.reason,
            )
            for view in views
        ),
        empty="No runners.",
    )  # fmt: skip


def state_text(view: Any) -> str:
    """State as one word; an orphan says so."""
    from fal_contract.v1 import state_pb2
    from falctl.output import enum_word

    word = enum_word(state_pb2.RunnerState.Name(view.state))
    return f"{word} (orphan)" if view.orphan else word


def _age(view: Any) -> str:
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration

    if not view.runner.created_at_s:
        return "-"
    return format_duration(max(0.0, SystemClock().wall_s() - view.runner.created_at_s))


def _assignment(runner: Any) -> str:
    return f"{runner.assignment.id} (term {runner.assignment.term})" if runner.HasField("assignment") else ""


def _gpus(runner: Any) -> str:
    """How many: a share of one as a fraction."""
    return f"{runner.gpu_milli / 1000:g}" if runner.gpu_milli else str(len(runner.gpus))


def _next_try(view: Any) -> str:
    """When its app is tried again after a crash; empty where nothing waits for that."""
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration

    left_s = view.backoff_until_s - SystemClock().wall_s()
    return f"in {format_duration(left_s)}" if view.backoff_until_s and left_s > 0 else ""


@group.command("show")
def show(runner: str, json: JsonFlag = False) -> None:
    """One runner: where it is in its life and why; the last lines of a failure."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_facts, print_json, to_json
    from falctl.terminal import harmless

    view = unary("GetRunner", pb.GetRunnerRequest(id=owned(runner, field="RUNNER")))
    if json:
        print_json("runner", to_json(view))
        return
    status = view.status
    print_facts(
        [
            ("runner", view.runner.id),
            ("state", state_text(view)),
            ("reason", view.reason),
            ("app", ", ".join(f"{b.app}@{b.revision}" for b in view.runner.bindings)),
            ("node", f"{view.node_name} ({view.runner.node})" if view.runner.node else ""),
            ("GPUs", ", ".join(view.runner.gpus)),
            ("share", f"{view.runner.gpu_milli / 1000:g} of the GPU" if view.runner.gpu_milli else ""),
            ("models", ", ".join(r.model for r in view.runner.residencies)),
            ("assignment", _assignment(view.runner)),
            ("failures", str(view.failures) if view.failures else ""),
            ("next try", _next_try(view)),
            ("exit code", str(status.exit_code) if status.HasField("exit_code") else ""),
            ("out of memory", "yes" if status.oom_killed else ""),
            ("wounded", status.reason if status.wounded else ""),
            ("served", str(status.served)),
            ("GPU seconds", f"{status.gpu_seconds:.0f}"),
            ("phases", ", ".join(f"{phase.name} {phase.seconds:.2f}s" for phase in status.phases)),
            ("refused by", ", ".join(f"{why}: {n}" for why, n in sorted(view.placement.refused.items()))),
            ("nearest miss", view.placement.nearest_miss),
        ]
    )
    if status.log_tail:
        console().print("last lines:")
        for line in status.log_tail:
            typer.echo(f"  {harmless(line)}")


async def find_runner(stub: Any, word: str, *, ended: bool = False) -> str:
    """A runner's id from the id, the beginning of one, or an app that has one runner. NOT_FOUND, INVALID.

    `ended`: what no runner matches is taken for the id of one that has ended.
    """
    from fal_contract.errors import FalError, invalid, not_found
    from fal_contract.v1 import cluster_pb2 as pb

    id = owned(word, field="RUNNER")
    views = await pages(stub, "ListRunners", pb.ListRunnersRequest(team=id.split("/", 1)[0]), "runners")
    found = [view for view in views if view.runner.id.startswith(id)]
    if any(view.runner.id == id for view in found):
        return id
    of_app = [view for view in found if any(binding.app == id for binding in view.runner.bindings)]
    chosen = of_app or found
    if len(chosen) == 1:
        return str(chosen[0].runner.id)
    if chosen:
        names = ", ".join(view.runner.id for view in chosen[:5])
        raise invalid("RUNNER", word, f"may be {names}", remedy="Give more of its id.")
    if ended:
        return id
    error: FalError = not_found("runner", id, remedy="List runners with `falctl runner list`.")
    raise error


def _since_s(text: str) -> float:
    """`10m` (so long ago) or RFC 3339 → Unix seconds; empty: 0. INVALID."""
    from datetime import datetime

    from fal_contract.clock import SystemClock
    from fal_contract.errors import FalError, invalid
    from fal_contract.units import parse_duration_s

    if not text:
        return 0.0
    try:
        return SystemClock().wall_s() - parse_duration_s(text, field="--since")
    except FalError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        remedy = "Say how long ago, such as 10m, or a time such as 2026-11-21T10:00:00Z."
        raise invalid("--since", text, "is no time", remedy=remedy) from None


@group.command("logs")
def logs(
    runner: Annotated[str, typer.Argument(help="A runner, the beginning of its id, or an app with one runner.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    tail: Annotated[int, typer.Option(help="Lines from the end to begin with.", min=0, max=100_000)] = 100,
    since: Annotated[str, typer.Option(help="Only lines from then on: 10m (ago) or an RFC 3339 time.")] = "",
    request: Annotated[str, typer.Option(help="Only lines that name this request id.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Control characters as they are, also to a terminal.")] = False,
    json: JsonFlag = False,
) -> None:
    """A runner's output, also of one that has ended; with --json one object a line."""
    import sys

    from fal_contract.errors import Code, FalError
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json_line, to_json
    from falctl.terminal import harmless

    since_s = _since_s(since)

    async def work(stub: Any) -> None:
        asked = pb.RunnerLogsRequest(
            id=await find_runner(stub, runner, ended=True),
            tail_lines=tail,
            follow=follow,
            since_s=since_s,
            request_id=request,
        )
        async for chunk in stub.RunnerLogs(asked, timeout=None if follow else GLOBALS.timeout_s):
            for line in chunk.lines:
                if json:
                    print_json_line(to_json(line))
                    continue
                stream = sys.stderr if line.stream == "stderr" else sys.stdout
                typer.echo(harmless(line.text) if stream.isatty() and not raw else line.text, file=stream)
            if chunk.error:
                raise FalError(Code.UNAVAILABLE, chunk.error.rstrip("."), remedy="Ask again.")

    call(work)


def _stop(runner: str, *, kill: bool, reason: str, json: bool) -> None:
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("StopRunner", pb.StopRunnerRequest(id=owned(runner, field="RUNNER"), kill=kill, reason=reason))
    if json:
        print_json("runner", to_json(view))
    else:
        console().print(f"runner {view.runner.id} is being {'killed' if kill else 'stopped'}")


@group.command("stop")
def stop(
    runner: str,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")] = "",
    json: JsonFlag = False,
) -> None:
    """Finish its requests, then stop it; the app replaces it while it still wants one."""
    _stop(runner, kill=False, reason=reason, json=json)


@group.command("kill")
def kill(
    runner: str,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for others.")] = "",
    json: JsonFlag = False,
) -> None:
    """Kill it at once; requests under way fail."""
    _stop(runner, kill=True, reason=reason, json=json)
