"""`falctl weights push`: a folder of this machine becomes a model of the cluster, without any origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from falctl.context import GLOBALS, call, current_profile, owned
from falctl.pools import JsonFlag
from falctl.weights import group, state_word

if TYPE_CHECKING:
    from fal_fsd.push import PushProgress, PushSettings

_PHASES = {"hash": "reading", "send": "sending", "finish": "a node checks and keeps it"}
_LINE_EVERY_S = 5.0


@group.command("push")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of this machine that holds the model's files.")],
    name: str,
    kind: Annotated[str, typer.Option(help="model or lora.")] = "model",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Take .bin, .ckpt, .pt …: loading them runs their author's code.")
    ] = False,
    pool: Annotated[str, typer.Option("--pool", help="Only nodes of this pool take it.")] = "",
    limit: Annotated[str, typer.Option("--limit", help="Send at most so many bytes a second: 50MB.")] = "",
    json: JsonFlag = False,
) -> None:
    """Upload a folder into the cluster and attest it. Two nodes keep it; pushed again, it goes on where it ended.

    Nodes' bulk ports must be reachable from here.
    """
    from fal_contract.ids import check_name
    from fal_contract.units import format_bytes, parse_bytes
    from fal_fsd.push import PushSettings
    from falctl.output import console, print_json, to_json

    if pool:
        check_name(pool, field="--pool")
    bandwidth = parse_bytes(limit, field="--limit") if limit else 0
    settings = PushSettings(
        owned(name, field="NAME"), kind=kind, allow_pickle=allow_pickle, pool=pool, bandwidth_bytes_s=bandwidth
    )
    with _shown(quiet=json) as on_progress:
        done = _push(folder, settings, on_progress)
    if json:
        print_json("model", to_json(done.view))
        return
    model = done.view.model
    size = f"{model.files} files, {format_bytes(model.bytes)}, {format_bytes(done.bytes_sent)} sent"
    console().print(f"{model.kind} {model.id} {state_word(done.view)}: {size}")


def _push(folder: Path, settings: PushSettings, on_progress: Callable[[PushProgress], None]) -> Any:
    from random import SystemRandom

    from fal_contract.clock import SystemClock
    from fal_contract.identity import Identity
    from fal_fsd.push import push as upload

    identity = Identity.load(current_profile().identity)

    async def work(stub: Any) -> Any:
        api, clock = SchedulerApi(stub), SystemClock()
        return await upload(folder, settings, api, identity, clock=clock, rng=SystemRandom(), on_progress=on_progress)

    return call(work)


class SchedulerApi:
    """The scheduler's side, as `fal_fsd.push.PushApi`."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def begin(self, request: Any) -> Any:
        from fal_contract.rpc import fal_errors

        with fal_errors():
            return await self._stub.BeginPush(request, timeout=GLOBALS.timeout_s)

    async def end(self, request: Any) -> Any:
        from fal_contract.rpc import fal_errors

        with fal_errors():
            return await self._stub.EndPush(request, timeout=GLOBALS.timeout_s)


def progress_line(progress: PushProgress) -> str:
    """`sending 1.2 GB of 24 GB, 310 MB/s, 1m14s more, to n-…`."""
    from fal_contract.units import format_bytes, format_duration

    text = f"{_PHASES[progress.phase]} {format_bytes(progress.bytes_done)} of {format_bytes(progress.bytes_total)}"
    if progress.phase == "finish":
        return _PHASES["finish"]
    if progress.rate_bytes_s > 0:
        left_s = (progress.bytes_total - progress.bytes_done) / progress.rate_bytes_s
        text += f", {format_bytes(progress.rate_bytes_s)}/s, {format_duration(left_s)} more"
    return f"{text}, to {progress.node_id}" if progress.node_id else text


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Callable[[PushProgress], None]]:
    """On a terminal one line that is rewritten; else a line on stderr now and then; nothing with --json."""
    from fal_contract.clock import SystemClock
    from falctl.output import console, status_line

    if quiet:
        yield lambda progress: None
        return
    if console().is_terminal:
        with status_line("reading") as say:
            yield lambda progress: say(progress_line(progress))
        return
    clock, phase, told_s = SystemClock(), "", 0.0

    def line(progress: PushProgress) -> None:
        nonlocal phase, told_s
        now_s = clock.monotonic_s()
        if progress.phase != phase or now_s - told_s >= _LINE_EVERY_S:
            phase, told_s = progress.phase, now_s
            typer.echo(progress_line(progress), err=True)

    yield line
