"""`falctl run APP`: one request through the serving API, as a gateway would send it.

It leases a slot, dials the node's proxy, shows the steps as they come, and writes the
picture. Interrupting it cancels the request within one step.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import current_profile, owned
from falctl.pools import JsonFlag

if TYPE_CHECKING:
    from fal_contract.dispatch import DispatchClient
    from fal_contract.http_client import HttpResponse

_EVENT_BYTES_MAX: Final = 64 << 20
_ERROR_BYTES_MAX: Final = 64 << 10
_END_WAIT_S: Final = 5.0  # for the end of an answer whose picture is here


def run(
    app: Annotated[str, typer.Argument(help="App, `name` or `team/name`.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the picture.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    lora: Annotated[str, typer.Option(help="LoRA of the app.")] = "",
    lora_scale: Annotated[float, typer.Option(help="How strongly the LoRA acts.")] = 1.0,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for a free slot.", min=0.1)] = 60.0,
    json: JsonFlag = False,
) -> None:
    """Draw one picture."""
    import asyncio

    from falctl.output import print_json

    request: dict[str, Any] = {"prompt": prompt, "format": "json"}
    optional: dict[str, Any] = {"seed": seed, "steps": steps}
    optional["lora"] = {"name": lora, "scale": lora_scale} if lora else None
    request |= {key: value for key, value in optional.items() if value is not None}
    target = output or Path(f"{app.replace('/', '-')}.png")
    if not target.parent.is_dir():
        raise invalid("--output", str(target), "is in no existing folder", remedy="Make the folder first.")
    result = asyncio.run(_draw(owned(app, field="APP"), request, wait_s=wait_s, quiet=json))
    picture = base64.b64decode(result.pop("image"))
    target.write_bytes(picture)
    if json:
        print_json("picture", {"path": str(target), "bytes": len(picture), **result})
    else:
        typer.echo(f"{target}: {prompt!r}, seed {result.get('seed')}, on {result['runner']}, {result['seconds']:.2f} s")


async def _draw(app: str, request: dict[str, Any], *, wait_s: float, quiet: bool) -> dict[str, Any]:
    import asyncio
    import json

    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with serving_client() as client:
        headers = [("content-type", "application/json"), ("accept", "text/event-stream")]
        body = json.dumps(request).encode()
        lora = request.get("lora") or {}
        response = await client.request(
            app,
            "POST",
            "/infer",
            headers,
            body,
            wait_s=wait_s,
            lora=owned(lora["name"], field="--lora") if lora else "",
        )
        try:
            if response.status != 200:
                raise await _refusal(response)
            result = await _follow(response, _step_shower(quiet))
        finally:
            response.close()
    return {**result, "runner": response.runner_id, "seconds": loop.time() - began_s}


@asynccontextmanager
async def serving_client() -> AsyncIterator[DispatchClient]:
    """A client of the serving API with the profile's identity. It dials nodes; one behind NAT needs a gateway."""
    from random import SystemRandom

    from fal_contract.clock import SystemClock
    from fal_contract.datapath import DirectConnections, TlsIdentity
    from fal_contract.dispatch import DispatchClient
    from fal_contract.dispatch_grpc import GrpcDispatchDialer
    from fal_contract.identity import Identity
    from fal_contract.ids import random_suffix
    from fal_contract.node_paths import NodePaths

    profile = current_profile()
    identity = Identity.load(profile.identity)
    clock, rng = SystemClock(), SystemRandom()
    identity.check(now_s=clock.wall_s())
    tls = TlsIdentity(identity, clock)
    client = DispatchClient(
        dial=GrpcDispatchDialer(profile.servers, lambda: identity),
        gateway_id=f"falctl-{random_suffix(rng)}",
        paths=lambda on_change: NodePaths(DirectConnections(tls), None, rng=rng, on_change=on_change),
        rng=rng,
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def _step_shower(quiet: bool) -> Callable[[int, int], None]:
    """Shows the step on a terminal; says nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        return lambda step, steps: None

    def show(step: int, steps: int) -> None:
        sys.stderr.write(f"\rstep {step} of {steps}" + ("\n" if step == steps else ""))
        sys.stderr.flush()

    return show


async def _follow(response: HttpResponse, show: Callable[[int, int], None]) -> dict[str, Any]:
    """Read server-sent events until the picture is complete. Raises FalError when the worker reports one."""
    output: dict[str, Any] | None = None
    events = _events(response)
    async for name, data in events:
        match name:
            case "step":
                show(int(data["i"]), int(data["n"]))
            case "output":
                output = data
            case "error":
                raise _error_of(data)
            case "completed" if output is not None:
                await _read_to_the_end(events)
                return output
    raise FalError(Code.RUNNER_FAILED, "The answer ended before the picture was complete", remedy="Run it again.")


async def _read_to_the_end(events: AsyncIterator[tuple[str, dict[str, Any]]]) -> None:
    """The picture is here. A request whose answer is cut before its last byte counts as cancelled, not as served."""
    import asyncio

    with suppress(FalError, TimeoutError):
        async with asyncio.timeout(_END_WAIT_S):
            async for _ in events:
                pass


async def _events(response: HttpResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-sent events, bounded."""
    import json

    pending = b""
    async for chunk in response.chunks():
        pending += chunk
        if len(pending) > _EVENT_BYTES_MAX:
            raise FalError(Code.RUNNER_FAILED, "The worker sent an event without end", remedy="See its logs.")
        *whole, pending = pending.split(b"\n\n")
        for block in whole:
            fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if ": " in line)
            if "event" in fields:
                yield fields["event"], json.loads(fields.get("data", "{}"))


async def _refusal(response: HttpResponse) -> FalError:
    """What a status other than 200 says."""
    import json

    raw = await response.read(_ERROR_BYTES_MAX)
    try:
        return _error_of(json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return FalError(
            Code.RUNNER_FAILED, f"The worker answered {response.status}: {raw[:200]!r}", remedy="See its logs."
        )


def _error_of(data: dict[str, Any]) -> FalError:
    error = data.get("error", data)
    code = Code(error["code"]) if error.get("code") in Code.__members__ else Code.RUNNER_FAILED
    return FalError(code, str(error.get("what", error)), remedy=str(error.get("remedy", "")))
