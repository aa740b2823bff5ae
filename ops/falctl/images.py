"""`falctl image`: what containers run: added from a registry or this machine, listed, warmed, checked, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from falctl import weights_stage, weights_where
from falctl.context import call, current_profile, owned, team, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Images: the file systems that containers run.", no_args_is_help=True)
POLL_S: Final = 1.0
_LINE_EVERY_S: Final = 5.0
_LOGS_TIMEOUT_S: Final = 5.0
_LOST_AFTER_S: Final = 60.0  # without a scheduler; it may only be changing its leader

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the image, or TEAM/NAME.")]


@group.command("add")
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="docker://REGISTRY/REPO:TAG or …@sha256:…; of this machine: oci:DIR[:TAG], docker-archive:FILE, "
            "rootfs:DIR.",
        ),
    ],
    auth_secret: Annotated[
        str, typer.Option("--auth-secret", help="Secret with the registry's credentials (auth.json); else the node's.")
    ] = "",
    platform: Annotated[str, typer.Option(help="linux/amd64 …")] = "linux/amd64",
    pool: Annotated[list[str] | None, typer.Option(help="Pool whose nodes may pack it; repeat it. None: any.")] = None,
    size_max: Annotated[str, typer.Option(help="Refuse more than this, packed, such as 20GiB.")] = "64GiB",
    within: Annotated[str, typer.Option("--within", help="How long it may take: 90s, 15m, 6h.")] = "1h",
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Wait until it is there.")] = True,
    work: Annotated[
        Path | None, typer.Option(help="Folder of this machine for what is made on the way, of local sources.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Add an image. One node pulls and packs it, the others get it from there; a name's content never changes."""
    from fal_contract.units import parse_bytes, parse_duration_s
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.image_push import is_local
    from falctl.output import print_json, to_json

    id_, within_s = owned(name, field="NAME"), parse_duration_s(within, field="--within")
    bytes_max = parse_bytes(size_max, field="--size-max")
    _check_bounds(size_max, bytes_max, within, within_s)
    if is_local(source):
        _add_local(id_, source, auth_secret, platform, pool or [], bytes_max, within_s, work)
        view = unary("GetImage", pb.GetImageRequest(id=id_))
    else:
        _check_remote(source, work)
        request = pb.AddImageRequest(
            id=id_, source=source, auth_secret=auth_secret, platform=platform, bytes_max=bytes_max,
            timeout_s=within_s, pools=pool or [],
        )  # fmt: skip
        view = unary("AddImage", request)
        if watch and view.state == "packing":
            view = _packed(view, within_s, quiet=json)
    if json:
        print_json("image", to_json(view))
    else:
        _say(view)
    _raise_where_failed(view)


def _check_bounds(size_max: str, bytes_max: int, within: str, within_s: float) -> None:
    """The scheduler takes 0 for its own default, which nobody means who writes it."""
    from fal_contract.errors import invalid

    if not bytes_max:
        raise invalid("--size-max", size_max, "is nothing", remedy="Give a size such as 20GiB.")
    if not within_s:
        raise invalid("--within", within, "is no time", remedy="Give a time such as 15m.")


def _check_remote(source: str, work: Path | None) -> None:
    from fal_contract.errors import invalid

    if work is not None:
        raise invalid("--work", str(work), "is for local sources", remedy="A node packs what is in a registry.")
    if "://" not in source and ":" not in source:
        remedy = "Write docker://REGISTRY/REPO:TAG, oci:DIR, docker-archive:FILE or rootfs:DIR."
        raise invalid("SOURCE", source, "names no place", remedy=remedy)


def _add_local(
    id_: str,
    source: str,
    auth_secret: str,
    platform: str,
    pools: list[str],
    bytes_max: int,
    within_s: float,
    work: Path | None,
) -> None:
    """Pack on this machine, push what comes of it."""
    from fal_contract.errors import invalid
    from falctl.image_push import PushOptions, push_image

    if auth_secret:
        raise invalid("--auth-secret", auth_secret, "is for registries", remedy="Leave it out with a local source.")
    if len(pools) > 1:
        raise invalid("--pool", ", ".join(pools), "are several", remedy="A push goes to the nodes of one pool.")
    if work is not None and not work.is_dir():
        raise invalid("--work", str(work), "is no folder", remedy="Name one that exists.")
    options = PushOptions(
        platform=platform, pool=pools[0] if pools else "", bytes_max=bytes_max, work=work, timeout_s=within_s
    )
    with _progress(quiet=False) as say:
        push_image(current_profile(), id_, source, options, say=say)


def _packed(first: Any, within_s: float, *, quiet: bool) -> Any:
    """Ask until the task is over. TIMEOUT: it goes on without us."""
    import time

    from fal_contract.errors import Code, FalError
    from fal_contract.limits import BUILD_WAIT_MAX_S, IMAGE_PACK_TRIES_MAX
    from fal_contract.v1 import cluster_pb2 as pb

    deadline_s = time.monotonic() + BUILD_WAIT_MAX_S + IMAGE_PACK_TRIES_MAX * within_s
    heard_s, view = time.monotonic(), first
    with _progress(quiet=quiet) as say:
        while view.state == "packing":
            line = "" if quiet else _last_line(view.runner)
            say(": ".join(text for text in (view.reason, line) if text))
            if time.monotonic() > deadline_s:
                raise FalError(
                    Code.TIMEOUT,
                    f"image {view.id} is not packed yet",
                    remedy=f"See `falctl image show {view.id}`; it goes on in the background.",
                )
            time.sleep(POLL_S)
            try:
                view, heard_s = unary("GetImage", pb.GetImageRequest(id=view.id)), time.monotonic()
            except FalError as error:
                passing = error.code in (Code.UNAVAILABLE, Code.NOT_LEADER, Code.TIMEOUT)
                if not passing or time.monotonic() - heard_s > _LOST_AFTER_S:
                    raise
    return view


def _last_line(runner: str) -> str:
    """The last line that the packer wrote; empty where none can be had now."""
    from fal_contract.errors import FalError
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.terminal import harmless

    async def work(stub: Any) -> str:
        last = ""
        async for chunk in stub.RunnerLogs(pb.RunnerLogsRequest(id=runner, tail_lines=1), timeout=_LOGS_TIMEOUT_S):
            for line in chunk.lines:
                last = line.text
        return last

    try:
        line = harmless(call(work)) if runner else ""
        return "" if line.startswith("{") else line  # the facts, for programs
    except FalError:
        return ""


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """On a terminal one line that is rewritten; else a line on stderr now and then; nothing where `quiet`."""
    from fal_contract.clock import SystemClock
    from falctl.output import console, status_line

    if quiet:
        yield lambda text: None
        return
    if console().is_terminal:
        with status_line("") as say:
            yield say
        return
    clock, before, told_s = SystemClock(), "", float("-inf")

    def line(text: str) -> None:
        nonlocal before, told_s
        if text != before and clock.monotonic_s() - told_s >= _LINE_EVERY_S:
            before, told_s = text, clock.monotonic_s()
            typer.echo(text, err=True)

    yield line


def _say(view: Any) -> None:
    from fal_contract.units import format_bytes
    from falctl.output import console

    facts = view.model.image
    size = f", {format_bytes(view.model.bytes)} from {facts.source}, {facts.digest}" if view.HasField("model") else ""
    runner = f", runner {view.runner}" if view.state == "packing" else ""
    console().print(f"image {view.id} {view.state}{size}{runner}", markup=False)


def _raise_where_failed(view: Any) -> None:
    from fal_contract.errors import Code, FalError
    from falctl.terminal import harmless

    if view.state == "failed":
        for line in view.log_tail:
            typer.echo(harmless(line), err=True)
        what = f"image {view.id} could not be packed: {view.reason}"
        raise FalError(Code.RUNNER_FAILED, what, remedy="Correct what the last lines say and add it again.")


@group.command("list")
def list_images(
    all_teams: Annotated[bool, typer.Option("--all-teams", help="Every team's.")] = False, json: JsonFlag = False
) -> None:
    """A team's images, those that are being packed or could not be packed included."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListImages", pb.ListImagesRequest(team="" if all_teams else team())).images
    if json:
        print_json("images", [to_json(view) for view in views])
        return
    print_table(
        ("IMAGE", "STATE", "SIZE", "NODES", "APPS", "PLATFORM", "DIGEST", "SOURCE"),
        (
            (
                view.id, view.state, format_bytes(view.model.bytes) if view.HasField("model") else "-",
                f"{view.nodes_ready}+{view.nodes_staging}" if view.nodes_staging else str(view.nodes_ready),
                str(len(view.apps)), view.model.image.platform or "-",
                view.model.image.digest.removeprefix("sha256:")[:12] or "-",
                view.model.image.source or view.reason or "-",
            )
            for view in views
        ),
        empty="No images. Add one: falctl image add NAME docker://REGISTRY/REPO:TAG",
    )  # fmt: skip


@group.command("show")
def show(name: Name, json: JsonFlag = False) -> None:
    """One image: where it came from, how large it is, who uses it; or what packs it, or why it could not be packed."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_facts, print_json, to_json
    from falctl.terminal import harmless

    view = unary("GetImage", pb.GetImageRequest(id=owned(name, field="NAME")))
    if json:
        print_json("image", to_json(view))
        return
    model, facts, there = view.model, view.model.image, view.HasField("model")
    ordered = len(facts.first_pieces)
    first = f"{ordered} pieces, as a recorded start read them" if ordered else "in no order: no start was recorded"
    print_facts(
        [
            ("image", view.id),
            ("state", view.state),
            ("reason", view.reason),
            ("source", facts.source),
            ("digest", facts.digest),
            ("platform", facts.platform),
            ("format", facts.format),
            ("size", format_bytes(model.bytes) if there else ""),
            ("layers", f"{format_bytes(facts.layer_bytes)} in the registry" if facts.layer_bytes else ""),
            ("first", first if there else ""),
            ("artifact", model.artifact_id),
            ("manifest", model.manifest_digest),
            ("attested", f"{model.attestation}; told by {model.attested_by}" if model.attestation else ""),
            ("nodes", f"{view.nodes_ready} ready, {view.nodes_staging} staging" if there else ""),
            ("apps", ", ".join(view.apps)),
            ("runner", view.runner),
            *(("output", harmless(line)) for line in view.log_tail),
        ]
    )


@group.command("warm")
def warm(
    name: Name,
    to: weights_stage.To = "",
    replicas: weights_stage.Replicas = 0,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is kept: 2h, 7d; 0: until it is taken back.")] = "0",
    watch: weights_stage.Watch = False,
    within: weights_stage.Within = "6h",
    json: JsonFlag = False,
) -> None:
    """Bring an image to nodes before anything needs it. `falctl weights unstage` takes that back."""
    _there(name)
    weights_stage.stage(name, to=to, replicas=replicas, ttl=ttl, watch=watch, within=within, json=json)


@group.command("where")
def where(
    name: Name,
    every: Annotated[bool, typer.Option("--all", help="Also nodes that have nothing of it.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow until all that bring it have it.")] = False,
    within: Annotated[str, typer.Option("--within", help="How long to follow: 90s, 15m, 6h.")] = "6h",
    json: JsonFlag = False,
) -> None:
    """Which nodes have an image, and how long each would take to have it."""
    _there(name)
    weights_where.where(name, every=every, watch=watch, within=within, json=json)


@group.command("verify")
def verify(name: Name, node: weights_stage.Nodes = None, json: JsonFlag = False) -> None:
    """Let nodes read an image again, compare every piece, and repair it from peers; events tell what was found."""
    _there(name)
    weights_stage.verify(name, node=node, json=json)


def _there(name: str) -> None:
    """Raise NOT_FOUND, or FAILED_PRECONDITION for an image that is not packed (yet)."""
    from fal_contract.errors import Code, FalError
    from fal_contract.v1 import cluster_pb2 as pb

    view = unary("GetImage", pb.GetImageRequest(id=owned(name, field="NAME")))
    if not view.HasField("model"):
        word = "is being packed" if view.state == "packing" else f"could not be packed: {view.reason}"
        remedy = "Wait until it is there." if view.state == "packing" else "Add it again with `falctl image add`."
        raise FalError(Code.FAILED_PRECONDITION, f"image {view.id!r} {word}", remedy=remedy, field="NAME")


@group.command("rm")
def remove(name: Name, json: JsonFlag = False) -> None:
    """Forget an image that no app uses, and let nodes drop it; ends the task that packs it."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    id_ = owned(name, field="NAME")
    unary("GetImage", pb.GetImageRequest(id=id_))  # models have names of the same kind
    reply = unary("RemoveModel", pb.RemoveModelRequest(id=id_))
    if json:
        print_json("removed", to_json(reply))
        return
    told = f"; told to let it go: {', '.join(reply.nodes)}" if reply.nodes else ""
    console().print(f"image {reply.id} {reply.outcome}{told}", markup=False)
