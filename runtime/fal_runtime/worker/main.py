"""The worker's process: options, phases, signals, exit codes.

The socket answers from the first moment (`/livez`), `/readyz` only once the model is loaded and warm. SIGTERM
lets what runs finish, for at most the grace; a second one ends the process at once. Used by `__main__` and, with
a scripted engine, by tests; must not import torch.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import REQUEST_TIMEOUT_S, TERMINATION_GRACE_S
from fal_runtime.worker.engine import Engine
from fal_runtime.worker.lane import Lane
from fal_runtime.worker.log import log
from fal_runtime.worker.residents import Residents
from fal_runtime.worker.server import WorkerServer

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_LOAD_FAILED: Final = 3
EXIT_DEVICE_FAILED: Final = 4
BODY_TIMEOUT_S: Final = 30.0  # for a request's body to arrive; it has at most a megabyte
SOCKET_PATH_BYTES_MAX: Final = 107  # sockaddr_un


@dataclass(frozen=True, slots=True)
class Options:
    """What the worker was started with; `loras` maps names to folders."""

    socket: Path
    model: Path | None = None
    loras: tuple[tuple[str, Path], ...] = ()
    threads: int = 0
    dtype: str = "auto"
    max_multiplexing: int = 1
    request_timeout_s: float = REQUEST_TIMEOUT_S
    grace_s: float = TERMINATION_GRACE_S
    body_timeout_s: float = BODY_TIMEOUT_S
    name: str = ""  # of the model, by which requests may ask for it


def parser() -> argparse.ArgumentParser:
    """The command line; each option's environment variable is FAL_ and its name in capitals."""
    made = argparse.ArgumentParser(
        prog="python -m fal_runtime.worker",
        description="Load a diffusers pipeline and serve it over HTTP on a unix socket.",
        epilog="Flags win over the environment. Exit codes: 0 stopped, 1 failed, 2 usage, 3 the model does not load, "
        "4 the GPU failed twice.",
    )
    made.add_argument("--model", metavar="DIR", help="pipeline folder with model_index.json [FAL_MODEL_DIR]")
    made.add_argument("--socket", metavar="PATH", help="unix socket to serve on [FAL_SOCKET]")
    made.add_argument("--lora", metavar="NAME=DIR", action="append", help="adapter to load; repeat [FAL_LORAS, by ',']")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's own [FAL_THREADS]")
    made.add_argument("--dtype", help="auto, float32, float16 or bfloat16 [FAL_DTYPE]")
    made.add_argument(
        "--max-multiplexing",
        type=int,
        metavar="N",
        help="requests in flight; 1 runs, the rest wait [FAL_MAX_MULTIPLEXING]",
    )
    made.add_argument(
        "--request-timeout", type=float, metavar="S", help="seconds for one request [FAL_REQUEST_TIMEOUT]"
    )
    made.add_argument("--grace", type=float, metavar="S", help="seconds to finish after SIGTERM [FAL_GRACE]")
    return made


def parse_options(arguments: Sequence[str], environ: Mapping[str, str], *, model_needed: bool = True) -> Options:
    """Flags over environment over defaults. Raises FalError INVALID; argparse exits 2 on unknown flags."""
    flags = parser().parse_args(arguments)
    loras = flags.lora if flags.lora is not None else [x for x in environ.get("FAL_LORAS", "").split(",") if x]
    model = flags.model or environ.get("FAL_MODEL_DIR", "")
    socket = flags.socket or environ.get("FAL_SOCKET", "")
    if not socket:
        raise invalid("socket", socket, "is missing", remedy="Give --socket PATH or set FAL_SOCKET.")
    if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
        raise invalid("socket", socket, "is too long for a unix socket", remedy="Use at most 107 bytes.")
    if model_needed and not model:
        raise invalid("model", model, "is missing", remedy="Give --model DIR or set FAL_MODEL_DIR.")
    dtype = flags.dtype or environ.get("FAL_DTYPE") or "auto"
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise invalid("dtype", dtype, "is not a number format", remedy="Use auto, float32, float16 or bfloat16.")
    return Options(
        socket=Path(socket),
        model=Path(model) if model else None,
        loras=tuple(_lora(text) for text in loras),
        threads=int(_number("threads", flags.threads, environ, default=0)),
        dtype=dtype,
        max_multiplexing=int(_number("max_multiplexing", flags.max_multiplexing, environ, default=1, low=1)),
        request_timeout_s=_number("request_timeout", flags.request_timeout, environ, default=REQUEST_TIMEOUT_S),
        grace_s=_number("grace", flags.grace, environ, default=TERMINATION_GRACE_S),
        name=environ.get("FAL_MODEL", ""),
    )


def _number(name: str, flag: float | None, environ: Mapping[str, str], *, default: float, low: float = 0) -> float:
    text = environ.get(f"FAL_{name.upper()}", "") if flag is None else str(flag)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not low <= value <= 1e6:
        raise invalid(name, text, f"is not a number from {low:g} to 1000000", remedy="Change it, or leave it out.")
    return value


def _lora(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise invalid("lora", text, "is not NAME=DIR", remedy="For instance --lora neon=/models/neon.")
    return name, Path(folder)


async def serve(engine: Engine, options: Options, stop: asyncio.Event) -> int:
    """Serve until `stop`, a failed load, or the second device failure. Returns the exit code."""
    # A seed that a client leaves open need not be guessed or repeated by anybody: the answer names it.
    server = WorkerServer(
        request_timeout_s=options.request_timeout_s,
        body_timeout_s=options.body_timeout_s,
        rng=random.SystemRandom(),
    )
    lane = Lane(engine, in_flight_max=options.max_multiplexing, on_end=server.ended)
    runner = web.AppRunner(
        server.application(), handler_cancellation=True, access_log=None, handle_signals=False, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.UnixSite(runner, str(options.socket)).start()
    except OSError as error:
        await runner.cleanup()
        what = f"cannot serve on socket {options.socket}: {error.strerror or error}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Check the folder and its permissions.") from error
    log("listening", socket=str(options.socket))
    try:
        return await _run(engine, options, server, lane, stop)
    finally:
        await runner.cleanup()
        lane.close()
        options.socket.unlink(missing_ok=True)


async def _run(engine: Engine, options: Options, server: WorkerServer, lane: Lane, stop: asyncio.Event) -> int:
    """Load, warm, serve, drain."""
    loading = asyncio.create_task(_load(engine, server, lane, options.name))
    stopped = asyncio.create_task(stop.wait())
    broken = asyncio.create_task(lane.broken.wait())
    try:
        await asyncio.wait([loading, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log("stopped", phase=server.phase)
            return EXIT_DONE  # the thread that still loads dies with the process
        await loading
        await asyncio.wait([stopped, broken], return_when=asyncio.FIRST_COMPLETED)
        server.enter("draining")
        finished = await lane.drain(grace_s=options.grace_s)
        code = EXIT_DEVICE_FAILED if lane.broken.is_set() else EXIT_DONE
        log("stopped", finished=finished, exit_code=code)
        return code
    finally:
        for task in (loading, stopped, broken):
            task.cancel()


async def _load(engine: Engine, server: WorkerServer, lane: Lane, name: str) -> None:
    loop = asyncio.get_running_loop()
    model = await lane.call(lambda: engine.load(lambda phase: _tell(loop, server, phase)))
    server.enter("warm")
    await lane.call(engine.warm)
    server.serve_model(lane, Residents(engine, lane, name, model))
    log("ready", pipeline=model.pipeline, loras=list(model.loras), options=sorted(model.options))


def _tell(loop: asyncio.AbstractEventLoop, server: WorkerServer, phase: str) -> None:
    loop.call_soon_threadsafe(server.enter, phase)


async def _serve_until_signal(engine: Engine, options: Options) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop_or_leave, stop)
    return await serve(engine, options, stop)


def _stop_or_leave(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + signal.SIGTERM)
    stop.set()


def run(engine: Engine, options: Options) -> int:
    """Serve, and turn what goes wrong into one line on stderr and an exit code."""
    try:
        return asyncio.run(_serve_until_signal(engine, options))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED if error.code is Code.FAILED_PRECONDITION else EXIT_LOAD_FAILED
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        print(f"error: the model does not load: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        return EXIT_LOAD_FAILED


def leave(code: int) -> None:
    """End the process without waiting for a thread that may still load or draw."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
