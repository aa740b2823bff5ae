"""`falctl app rollout`, `app revisions`, `app set-rev`, `app rollback`: how a revision takes over."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from falctl.apps import WaitOption, WaitTimeout, group, ready_text
from falctl.context import owned, unary
from falctl.pools import JsonFlag

rollout = typer.Typer(help="A revision that takes over.", no_args_is_help=True)
group.add_typer(rollout, name="rollout")


@rollout.command("status")
def status(name: str, json: JsonFlag = False) -> None:
    """How far it is."""
    from fal_contract.v1 import cluster_pb2 as pb

    _show(unary("GetApp", pb.GetAppRequest(id=owned(name, field="NAME"))), json)


@rollout.command("pause")
def pause(name: str, json: JsonFlag = False) -> None:
    """Stop it where it is; both revisions serve on."""
    _steer(name, "pause", json)


@rollout.command("resume")
def resume(name: str, json: JsonFlag = False) -> None:
    """Let a paused one go on."""
    _steer(name, "resume", json)


@rollout.command("promote")
def promote(name: str, json: JsonFlag = False) -> None:
    """Let a canary go on to all runners."""
    _steer(name, "promote", json)


@rollout.command("abort")
def abort(name: str, json: JsonFlag = False) -> None:
    """Let the revision before run again."""
    _steer(name, "abort", json)


@group.command("revisions")
def revisions(name: str, json: JsonFlag = False) -> None:
    """The kept revisions of an app."""
    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    found = unary("ListRevisions", pb.ListRevisionsRequest(id=owned(name, field="NAME"))).revisions
    if json:
        print_json("revisions", [to_json(one) for one in found])
        return
    now_s = SystemClock().wall_s()
    print_table(
        ("REVISION", "CURRENT", "READY", "MODEL", "AGE", "BY"),
        (
            (
                str(one.revision.number), "yes" if one.current else "", f"{one.ready}/{one.runners}",
                one.revision.spec.model or "-", format_duration(max(0.0, now_s - one.revision.created_at_s)),
                one.revision.created_by,
            )
            for one in found
        ),
        empty="No revisions.",
    )  # fmt: skip


@group.command("set-rev")
def set_rev(
    name: str,
    revision: Annotated[int, typer.Argument(help="Number of a kept revision.", min=1)],
    wait: WaitOption = True,
    wait_timeout_s: WaitTimeout = 600.0,
    json: JsonFlag = False,
) -> None:
    """Let a kept revision run again."""
    _set(name, revision, wait, wait_timeout_s, json)


@group.command("rollback")
def rollback(name: str, wait: WaitOption = True, wait_timeout_s: WaitTimeout = 600.0, json: JsonFlag = False) -> None:
    """Let the revision before the current one run again."""
    _set(name, 0, wait, wait_timeout_s, json)


def _set(name: str, revision: int, wait: bool, wait_timeout_s: float, json: bool) -> None:
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json
    from falctl.waiting import wait_until_ready

    view = unary("SetRevision", pb.SetRevisionRequest(id=owned(name, field="NAME"), revision=revision))
    if not json:
        console().print(f"app {view.app.id}: revision {view.app.revision} should run")
    if wait:
        view = wait_until_ready(view.app.id, timeout_s=wait_timeout_s, quiet=json)
    if json:
        print_json("app", to_json(view))


def _steer(name: str, action: str, json: bool) -> None:
    from fal_contract.v1 import cluster_pb2 as pb

    _show(unary("SteerRollout", pb.SteerRolloutRequest(id=owned(name, field="NAME"), action=action)), json)


def _show(view: Any, json: bool) -> None:
    from falctl.output import print_facts, print_json, to_json

    if json:
        print_json("app", to_json(view))
        return
    app = view.app
    if not app.HasField("rollout"):
        typer.echo(f"app {app.id}: revision {app.revision} serves, no rollout is under way")
        return
    found = app.rollout
    print_facts(
        [
            ("app", app.id),
            ("from revision", str(found.from_revision)),
            ("to revision", str(found.to_revision)),
            ("phase", found.phase + (" (paused)" if found.paused else "")),
            ("canary", f"{found.canary_perc} %" if found.phase == "canary" else ""),
            ("ready", ready_text(view)),
            ("failures", str(found.failures) if found.failures else ""),
            ("reason", found.reason or view.reason),
        ]
    )
