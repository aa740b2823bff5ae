"""`falctl operator leader`, `operator snapshot` and `operator migrate-store`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fal_contract.errors import Code, FalError
from falctl.context import GLOBALS, connected, current_profile
from falctl.operate import daemon, operator_group
from falctl.pools import JsonFlag

if TYPE_CHECKING:
    from fal_contract.v1.schedulers_pb2 import LeaderView

snapshot_group = typer.Typer(help="Copies of the scheduler's store.", no_args_is_help=True)
operator_group.add_typer(snapshot_group, name="snapshot")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The snapshot.")]
ConfigOption = Annotated[Path | None, typer.Option(help="The scheduler's TOML file; else DATA_DIR/config.toml.")]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder of the scheduler.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@operator_group.command("leader")
def leader(json: JsonFlag = False) -> None:
    """Who leads, since when and in which term, and who stands by. Standbys answer, too."""
    import asyncio

    from fal_contract.clock import SystemClock
    from fal_contract.units import format_duration
    from falctl.output import console, print_facts, print_json, print_table, to_json

    view = asyncio.run(_view())
    leads = next((one for one in view.schedulers if one.leads), None)
    if json:
        answer = to_json(view)
        print_json("leader", {**answer, "leader": to_json(leads) if leads is not None else None})
        return
    since = f", for {format_duration(SystemClock().wall_s() - view.since_s)}" if view.since_s else ""
    print_facts(
        [
            ("cluster", view.cluster_id),
            ("leader", f"{leads.name}, term {view.term}{since}" if leads is not None else "nobody"),
            ("store", view.store),
        ]
    )
    print_table(
        ("SCHEDULER", "ROLE", "ADDRESSES", "SOFTWARE"),
        (
            (one.name, "leader" if one.leads else "standby", ", ".join(one.addresses), one.software)
            for one in view.schedulers
        ),
        empty="",
    )
    if view.trouble:
        console().print(f"the store does not answer: {view.trouble}")


async def _view() -> LeaderView:
    """The leader's own word where it can be reached, else that of a standby. Raises UNAVAILABLE."""
    from collections import deque

    from fal_contract.clock import SystemClock
    from fal_contract.identity import Identity
    from fal_contract.rpc import channel, fal_errors
    from fal_contract.v1.schedulers_pb2 import GetLeaderRequest
    from fal_contract.v1.schedulers_pb2_grpc import SchedulersStub

    profile = current_profile()
    identity = Identity.load(profile.identity)
    identity.check(now_s=SystemClock().wall_s())
    waiting = deque(profile.servers)
    asked: set[str] = set()
    told: LeaderView | None = None
    why: FalError | None = None
    while waiting:
        address = waiting.popleft()
        if address in asked:
            continue
        asked.add(address)
        try:
            async with channel(address, identity) as opened:
                with fal_errors():
                    stub: Any = SchedulersStub(opened)
                    view = await stub.GetLeader(GetLeaderRequest(), timeout=min(5.0, GLOBALS.timeout_s))
        except FalError as error:
            why = error
            continue
        leads = next((one for one in view.schedulers if one.leads), None)
        if leads is not None and leads.answers:
            result: LeaderView = view
            return result
        if told is None or (leads is not None and not told.trouble):
            told = view
        waiting.extendleft(reversed(leads.addresses if leads is not None else ()))
    if told is None:
        raise FalError(
            Code.UNAVAILABLE,
            f"No scheduler answers at {', '.join(profile.servers)} (profile {profile.name!r})"
            + (f": {why.what}" if why is not None else ""),
            remedy="Check that one runs, its address and your certificate.",
        )
    return told


@snapshot_group.command("save")
def save(
    file: FileArgument,
    force: ForceOption = False,
    without_manifests: Annotated[bool, typer.Option("--without-manifests", help="Records only.")] = False,
    json: JsonFlag = False,
) -> None:
    """Save the store as of one revision, and the manifests beside it, to a file here.

    It holds sealed secrets and hashes of tokens, not the seal key and not the CA: keep `identity/` too.
    """
    import asyncio

    from fal_contract.snapshot_file import SnapshotWriter
    from fal_contract.units import format_bytes
    from falctl.output import console, print_json

    with SnapshotWriter(file, replace=force) as writer:
        head = asyncio.run(_receive(writer, without_manifests))
    if json:
        print_json("snapshot", {**head, "file": str(file)})
    else:
        console().print(
            f"saved {head['records']} records and {head['manifests']} manifests, {format_bytes(head['bytes'])}, "
            f"of revision {head['revision']} to {file}"
        )


async def _receive(writer: Any, without_manifests: bool) -> dict[str, Any]:
    from json import loads

    from fal_contract.rpc import fal_errors
    from fal_contract.v1.schedulers_pb2 import SaveSnapshotRequest
    from fal_contract.v1.schedulers_pb2_grpc import SchedulersStub

    facts: dict[str, Any] = {}
    async with connected() as channel:
        stub: Any = SchedulersStub(channel)
        with fal_errors():
            async for chunk in stub.SaveSnapshot(SaveSnapshotRequest(without_manifests=without_manifests)):
                if chunk.head:
                    facts = loads(chunk.head)
                if chunk.body:
                    writer.write(chunk.body)
                if chunk.sha256:
                    head: dict[str, Any] = writer.finish(facts, sha256=chunk.sha256)
                    return head
    raise FalError(Code.UNAVAILABLE, "the snapshot ended too early", remedy="Save it again; nothing was written.")


@snapshot_group.command("show")
def show(file: FileArgument, json: JsonFlag = False) -> None:
    """Check a snapshot to its last byte and say what it holds."""
    from fal_contract.snapshot_file import check
    from falctl.output import print_facts, print_json

    head = check(file)
    if json:
        print_json("snapshot", {**head, "file": str(file)})
    else:
        print_facts([(key, str(value)) for key, value in sorted(head.items())])


@snapshot_group.command("restore")
def restore(
    file: FileArgument,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
    force: ForceOption = False,
    json: JsonFlag = False,
) -> None:
    """Fill the store of a stopped scheduler, on its machine. The cluster's epoch rises; no container is stopped."""
    _scheduler("restore", str(file), data_dir=data_dir, config=config, force=force, json=json)


@operator_group.command("migrate-store")
def migrate_store(
    to: Annotated[str, typer.Option(help="etcd://HOST:PORT[,HOST:PORT][/PREFIX] or sqlite:///PATH/store.db.")],
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
    force: ForceOption = False,
    json: JsonFlag = False,
) -> None:
    """Move all records of a stopped scheduler to another store, on its machine. What runs on the nodes goes on."""
    _scheduler("migrate", "--to", to, data_dir=data_dir, config=config, force=force, json=json)


def _scheduler(*words: str, data_dir: Path | None, config: Path | None, force: bool, json: bool) -> None:
    """The scheduler's own code does it; falctl must not import it."""
    if data_dir is None and config is None and not os.environ.get("FAL_SCHEDULER_DATA_DIR"):
        raise FalError(
            Code.INVALID,
            "neither --data-dir nor --config is given",
            remedy="Name the folder of the scheduler on this machine.",
            field="data-dir",
        )
    argv = [daemon("fal-scheduler"), *words]
    argv += ["--data-dir", str(data_dir)] if data_dir is not None else []
    argv += ["--config", str(config)] if config is not None else []
    argv += ["--force"] if force else []
    argv += ["--json"] if json else []
    os.execv(argv[0], argv)
