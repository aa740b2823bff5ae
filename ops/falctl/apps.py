"""`falctl app` and `falctl init`: what operators deploy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import listed, owned, team, unary
from falctl.pools import JsonFlag

if TYPE_CHECKING:
    from fal_contract.v1 import cluster_pb2

group = typer.Typer(help="Apps: what you deploy.", no_args_is_help=True)

FileOption = Annotated[Path, typer.Option("--file", "-f", help="App manifest, TOML or YAML.")]
WaitOption = Annotated[bool, typer.Option("--wait/--detach", help="Wait until the runners are ready.")]
WaitTimeout = Annotated[float, typer.Option("--wait-timeout", help="Seconds to wait at most.", min=1)]


def _request(file: Path, *, expected: int | None = None) -> cluster_pb2.ApplyAppRequest:
    from fal_contract.manifest import AppManifest, read_manifest
    from fal_contract.v1 import cluster_pb2 as pb

    manifest = read_manifest(AppManifest, file)
    request = pb.ApplyAppRequest(id=manifest.id, spec=manifest.to_proto())
    if expected is not None:
        request.expected_generation = expected
    return request


@group.command("apply")
def apply(
    file: FileOption = Path("app.toml"),
    expected: Annotated[
        int | None,
        typer.Option("--expected-generation", help="Refuse unless the app is at this generation; 0: it is new.", min=0),
    ] = None,
    reset_scale: Annotated[
        bool, typer.Option("--reset-scale", help="Forget scaling values set at run time; the manifest's hold.")
    ] = False,
    wait: WaitOption = True,
    wait_timeout_s: WaitTimeout = 600.0,
    json: JsonFlag = False,
) -> None:
    """Deploy: make a revision and let it run."""
    from falctl.output import console, print_json, to_json
    from falctl.waiting import wait_until_ready

    request = _request(file, expected=expected)
    request.reset_scale = reset_scale
    reply = unary("ApplyApp", request)
    view = reply.app
    if not json:
        console().print(f"app {view.app.id} {reply.outcome}: revision {view.app.revision}")
        for change in reply.changes if reply.outcome == "changed" else ():
            typer.echo(f"  {change.field}: {change.before or '-'} → {change.after or '-'}")
        for warning in reply.warnings:
            typer.echo(f"warning: {warning}", err=True)
    if wait:
        revision = view.app.revision
        view = wait_until_ready(view.app.id, timeout_s=wait_timeout_s, quiet=json, revision=revision)
    if json:
        print_json("app", {**to_json(view), "outcome": reply.outcome})


@group.command("plan")
def plan(file: FileOption = Path("app.toml"), json: JsonFlag = False) -> None:
    """Show what apply would do; change nothing."""
    from falctl.output import console, print_json, to_json

    reply = unary("PlanApp", _request(file))
    if json:
        print_json("plan", to_json(reply))
        return
    console().print(f"would be {reply.outcome}")
    for change in reply.changes:
        typer.echo(f"  {change.field}: {change.before or '-'} → {change.after or '-'}")
    print_placement(reply.placement)
    for warning in reply.warnings:
        typer.echo(f"warning: {warning}", err=True)


def print_placement(placement: Any) -> None:
    """How many nodes fit, and why the others do not."""
    typer.echo(f"nodes that could take a runner now: {placement.feasible}")
    for reason, count in sorted(placement.refused.items()):
        typer.echo(f"  refused by {reason}: {count}")
    if placement.nearest_miss:
        typer.echo(f"  nearest miss: {placement.nearest_miss}")


@group.command("list")
def list_apps(
    all_teams: Annotated[bool, typer.Option("--all-teams", help="Every team's.")] = False,
    json: JsonFlag = False,
) -> None:
    """A team's apps."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = listed("ListApps", pb.ListAppsRequest(team="" if all_teams else team()), "apps")
    if json:
        print_json("apps", [to_json(view) for view in views])
        return
    print_table(
        ("APP", "REVISION", "READY", "MODEL", "GPUS", "REASON"),
        (
            (
                view.app.id, str(view.app.revision), ready_text(view), view.revision.spec.model or "-",
                str(view.revision.spec.num_gpus), view.reason,
            )
            for view in views
        ),
        empty="No apps. Begin with: falctl init NAME",
    )  # fmt: skip


def ready_text(view: Any) -> str:
    """`2/3`: ready of wanted."""
    return f"{len(ready_runners(view))}/{view.wanted}"


def rollout_text(app: Any) -> str:
    """`canary, 3 to 4`; empty without one."""
    if not app.HasField("rollout"):
        return ""
    found = app.rollout
    return f"{found.phase}{', paused' if found.paused else ''}, {found.from_revision} to {found.to_revision}"


def ready_runners(view: Any) -> list[Any]:
    """Runners of the current revision that take requests."""
    from fal_contract.v1 import state_pb2

    ready = (state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_RUNNING)
    return [
        runner
        for runner in view.runners
        if runner.state in ready and any(b.revision == view.app.revision for b in runner.runner.bindings)
    ]


@group.command("show")
def show(name: str, json: JsonFlag = False) -> None:
    """One app with its runners."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_facts, print_json, print_table, to_json
    from falctl.runners import state_text

    view = unary("GetApp", pb.GetAppRequest(id=owned(name, field="NAME")))
    if json:
        print_json("app", to_json(view))
        return
    spec, scaling = view.revision.spec, view.scaling
    print_facts(
        [
            ("app", view.app.id),
            ("revision", f"{view.app.revision} by {view.revision.created_by}"),
            ("generation", str(view.app.generation)),
            ("ready", ready_text(view)),
            ("reason", view.reason),
            ("rollout", rollout_text(view.app)),
            ("deleting", "yes" if view.app.deleting else ""),
            ("image", spec.image),
            ("command", " ".join(spec.command)),
            ("model", spec.model),
            ("LoRAs", ", ".join(spec.loras)),
            ("GPUs", f"{spec.num_gpus} × {' or '.join(spec.machine_type) or 'any'}"),
            ("runners", runners_text(scaling)),
            ("requests", f"{scaling.max_multiplexing} at once, {scaling.request_timeout_s:g} s each"),
        ]
    )
    print_table(
        ("RUNNER", "STATE", "REVISION", "NODE", "REASON"),
        (
            (
                runner.runner.id, state_text(runner), ", ".join(str(b.revision) for b in runner.runner.bindings),
                runner.node_name or "-", runner.reason,
            )
            for runner in view.runners
        ),
        empty="No runners.",
    )  # fmt: skip


def runners_text(scaling: Any) -> str:
    """`0 to 4, idle ones stay 60 s, 2 or 10 % spare, after 5 s of waiting, 1 by forecast`."""
    spare = [str(scaling.concurrency_buffer)] if scaling.concurrency_buffer else []
    spare += [f"{scaling.concurrency_buffer_perc} %"] if scaling.concurrency_buffer_perc else []
    words = [f"{scaling.min_concurrency} to {scaling.max_concurrency}, idle ones stay {scaling.keep_alive_s:g} s"]
    words += [f"{' or '.join(spare)} spare"] if spare else []
    words += [f"after {scaling.scaling_delay_s:g} s of waiting"] if scaling.scaling_delay_s else []
    words += [f"{scaling.forecast_concurrency} by forecast"] if scaling.forecast_concurrency else []
    return ", ".join(words)


@group.command("scale")
def scale(
    name: str,
    min_concurrency: Annotated[int | None, typer.Option("--min", help="Runners that are always there.", min=0)] = None,
    max_concurrency: Annotated[int | None, typer.Option("--max", help="Runners never exceeded.", min=0)] = None,
    keep_alive_s: Annotated[
        float | None, typer.Option("--keep-alive", help="Seconds an idle one stays.", min=0)
    ] = None,
    buffer: Annotated[int | None, typer.Option("--buffer", help="Spare runners above demand.", min=0)] = None,
    buffer_perc: Annotated[
        int | None,
        typer.Option("--buffer-perc", help="Spare runners in percent of requests; the larger counts.", min=0),
    ] = None,
    scaling_delay_s: Annotated[
        float | None, typer.Option("--scaling-delay", help="Seconds a request waits before a runner starts.", min=0)
    ] = None,
    request_timeout_s: Annotated[
        float | None, typer.Option("--request-timeout", help="Seconds one request may take; of new runners.", min=0)
    ] = None,
    forecast: Annotated[
        int | None, typer.Option("--forecast", help="Runners that the forecast may start ahead of need.", min=0)
    ] = None,
    reset: Annotated[bool, typer.Option("--reset-scale", help="Forget values set at run time first.")] = False,
    wait: WaitOption = True,
    wait_timeout_s: WaitTimeout = 600.0,
    json: JsonFlag = False,
) -> None:
    """Set scaling values at run time; they survive redeploys."""
    from fal_contract.v1 import cluster_pb2 as pb
    from fal_contract.v1 import state_pb2
    from falctl.output import console, print_json, to_json
    from falctl.waiting import wait_until_ready

    override = state_pb2.ScaleOverride(
        min_concurrency=min_concurrency,
        max_concurrency=max_concurrency,
        keep_alive_s=keep_alive_s,
        concurrency_buffer=buffer,
        concurrency_buffer_perc=buffer_perc,
        scaling_delay_s=scaling_delay_s,
        request_timeout_s=request_timeout_s,
        forecast_concurrency=forecast,
    )
    if not reset and not override.ListFields():
        raise invalid(
            "scale", name, "is given nothing to set", remedy="Add --min, --max, --keep-alive or --reset-scale."
        )
    view = unary("ScaleApp", pb.ScaleAppRequest(id=owned(name, field="NAME"), scale=override, reset=reset))
    if not json:
        console().print(f"app {view.app.id}: {runners_text(view.scaling)}")
    if wait:
        view = wait_until_ready(view.app.id, timeout_s=wait_timeout_s, quiet=json)
    if json:
        print_json("app", to_json(view))


@group.command("delete")
def delete(
    name: str,
    wait: Annotated[bool, typer.Option("--wait/--detach", help="Wait until its runners are gone.")] = True,
    wait_timeout_s: WaitTimeout = 120.0,
    json: JsonFlag = False,
) -> None:
    """Stop an app's runners and forget it."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json
    from falctl.waiting import wait_until_gone

    app = owned(name, field="NAME")
    reply = unary("DeleteApp", pb.DeleteAppRequest(id=app))
    if wait:
        wait_until_gone(app, timeout_s=wait_timeout_s)
    if json:
        print_json("app", {"id": app, "outcome": "deleted" if wait else "deleting", "runners": reply.runners})
    else:
        console().print(f"app {app} {'deleted' if wait else 'is being deleted'} ({reply.runners} runners stopped)")


def init(
    name: str,
    file: Annotated[Path, typer.Option("--file", "-f", help="File to write.")] = Path("app.toml"),
) -> None:
    """Write a commented manifest to start from."""
    from fal_contract.ids import check_name
    from falctl.template import app_template

    check_name(name, field="NAME")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(app_template(name))
    except FileExistsError:
        raise FalError(Code.ALREADY_EXISTS, f"{file} exists", remedy="Name another file with --file.") from None
    except OSError as error:
        raise invalid("--file", str(file), f"cannot be written: {error.strerror}", remedy="Name another.") from None
    typer.echo(f"wrote {file}. Next: falctl app apply -f {file}")
