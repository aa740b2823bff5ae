"""`falctl runner`: containers with their GPUs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.context import GLOBALS, call, owned, team, unary
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
    views = unary("ListRunners", request).runners
    if json:
        print_json("runners", [to_json(view) for view in views])
        return
    print_table(
        ("RUNNER", "STATE", "NODE", "GPUS", "SERVED", "AGE", "REASON"),
        (
            (
                view.runner.id, state_text(view), view.node_name or "-", str(len(view.runner.gpus)),
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
            ("models", ", ".join(r.model for r in view.runner.residencies)),
            ("assignment", _assignment(view.runner)),
            ("failures", str(view.failures) if view.failures else ""),
            ("next try", _next_try(view)),
            ("exit code", str(status.exit_code) if status.HasField("exit_code") else ""),
            ("out of memory", "yes" if status.oom_killed else ""),
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
            typer.echo(f"  {line}")


@group.command("logs")
def logs(
    runner: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    tail: Annotated[int, typer.Option(help="Lines from the end to begin with.", min=0, max=100_000)] = 100,
    json: JsonFlag = False,
) -> None:
    """A runner's output; with --json one object a line."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json_line, to_json

    request = pb.RunnerLogsRequest(id=owned(runner, field="RUNNER"), tail_lines=tail, follow=follow)

    async def work(stub: Any) -> None:
        async for chunk in stub.RunnerLogs(request, timeout=None if follow else GLOBALS.timeout_s):
            for line in chunk.lines:
                if json:
                    print_json_line(to_json(line))
                else:
                    typer.echo(line.text, err=line.stream == "stderr")

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
