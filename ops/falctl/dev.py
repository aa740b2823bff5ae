"""`falctl dev`: a whole cluster on this machine, every part the real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from falctl.pools import JsonFlag

group = typer.Typer(help="A whole cluster on this machine.", no_args_is_help=True)


def default_dir() -> Path:
    """Where the cluster lives: XDG state, short enough for unix sockets."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path(os.environ.get("HOME", "/tmp")) / ".local" / "state")
    return Path(base) / "falctl" / "dev"


DirOption = Annotated[Path | None, typer.Option("--dir", help="Folder of the cluster; else the user's state folder.")]


@group.command("up")
def up(
    nodes: Annotated[int, typer.Option(help="Agents to start.", min=1, max=64)] = 3,
    sim_gpus: Annotated[str, typer.Option(help="GPUs of each node, such as 8xH100-80GB; '' for the real ones.")] = (
        "2xH100-80GB"
    ),
    store: Annotated[str, typer.Option(help="sqlite or etcd.")] = "sqlite",
    driver: Annotated[str, typer.Option(help="auto, oci or process.")] = "auto",
    credentials: Annotated[
        Path | None, typer.Option(help="TOML file with credentials of weight origins, mode 0600.")
    ] = None,
    warm_workers: Annotated[
        int,
        typer.Option(
            help="Workers that each node keeps with their libraries loaded, about 0.5 GiB each.", min=0, max=16
        ),
    ] = 0,
    directory: DirOption = None,
    json: JsonFlag = False,
) -> None:
    """Start a scheduler and agents in three pools, and a profile `dev` that points there."""
    from falctl.dev_cluster import DevOptions, start_cluster
    from falctl.output import print_json

    held = str(credentials.absolute()) if credentials else ""
    options = DevOptions(nodes, sim_gpus, store, driver, held, warm_workers)
    state = start_cluster(directory or default_dir(), options, say=(lambda _: None) if json else typer.echo)
    if json:
        print_json("dev", state)
    else:
        typer.echo("up. Next: falctl status; falctl init NAME; falctl app apply -f app.toml; falctl dev down")


@group.command("down")
def down(
    directory: DirOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with stores and logs.")] = False,
    json: JsonFlag = False,
) -> None:
    """Stop its apps, containers and processes, and remove its folder."""
    from falctl.dev_cluster import stop_cluster
    from falctl.output import print_json

    ended = stop_cluster(directory or default_dir(), keep=keep, say=(lambda _: None) if json else typer.echo)
    if json:
        print_json("dev", {"ended": ended})


@group.command("restart")
def restart(
    name: Annotated[str, typer.Argument(help="Process, as `falctl dev status` names it.")],
    directory: DirOption = None,
    json: JsonFlag = False,
) -> None:
    """End one process and start it again as it was started."""
    from falctl.dev_cluster import restart_process
    from falctl.output import print_json

    process = restart_process(directory or default_dir(), name, say=(lambda _: None) if json else typer.echo)
    if json:
        print_json("dev", {"name": process.name, "pid": process.pid})


@group.command("status")
def status(directory: DirOption = None, json: JsonFlag = False) -> None:
    """Which of its processes run."""
    from falctl.dev_cluster import cluster_status
    from falctl.output import print_json, print_table

    rows = cluster_status(directory or default_dir())
    if json:
        print_json("dev", rows)
        return
    print_table(
        ("PROCESS", "PID", "STATE", "LOG"),
        ((str(row["name"]), str(row["pid"]), "running" if row["running"] else "gone", str(row["log"])) for row in rows),
        empty="No development cluster. Start one: falctl dev up",
    )
