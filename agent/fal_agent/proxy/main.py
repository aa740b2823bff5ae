"""`fal-proxy run`: the data path of a node, as a process of its own.

Ends on SIGTERM or SIGINT after its last request; a second signal ends it at once. Started and watched by the agent,
or by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any

from fal_agent.proxy.options import ENV_PREFIX, ProxyOptions, check
from fal_agent.proxy.pumping import keep_freed_memory
from fal_agent.proxy.server import ProxyServer, software_version
from fal_contract.clock import SystemClock
from fal_contract.config import load_config
from fal_contract.errors import FalError
from fal_contract.telemetry import configure_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: ended in order; 1: `error: WHAT. REMEDY` on stderr; 2: usage."""
    arguments = _parser().parse_args(argv)
    flags = {key: value for key, value in vars(arguments).items() if key not in ("command", "config", "takeover")}
    try:
        options = load_config(ProxyOptions, file=arguments.config, env=os.environ, prefix=ENV_PREFIX, flags=flags)
        check(options)
        configure_logging("fal-proxy", level=options.log_level)
        options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _run(_serve(options, takeover=arguments.takeover))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"error: {exc.strerror}: {exc.filename}. Give a writable --state-dir.", file=sys.stderr)
        return 1


async def _serve(options: ProxyOptions, *, takeover: bool) -> int:
    keep_freed_memory()
    gc.freeze()  # what was imported stays: the collector need not look at it again and again
    server = ProxyServer(options, clock=SystemClock(), rng=Random(os.urandom(16)))
    loop = asyncio.get_running_loop()
    signals = 0
    now = asyncio.Event()

    def asked_to_end() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            server.stop()
        else:
            now.set()

    try:
        await server.start(takeover=takeover)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked_to_end)
        await _first(server.wait_ended, now.wait)
    finally:
        await server.close()
    return 0


async def _first(*waits: Callable[[], Coroutine[Any, Any, object]]) -> None:
    tasks = [asyncio.create_task(wait()) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-proxy", description="The data path of a node.")
    parser.add_argument("--version", action="version", version=software_version())
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="serve until stopped")
    run.add_argument("--config", type=Path, help="TOML file with the settings below")
    run.add_argument("--takeover", action="store_true", help="take listeners and slots over from the running proxy")
    run.add_argument("--state-dir", help="folder for the state file")
    run.add_argument("--control", help="control socket (STATE_DIR/proxy.sock)")
    run.add_argument("--host", help="address to listen on (0.0.0.0)")
    run.add_argument("--port", type=int, help="port to listen on (0: the one from before, else any)")
    run.add_argument("--identity", help="the node's identity file")
    run.add_argument("--insecure", action="store_const", const=True, help="no TLS, admits anyone; benchmarks only")
    run.add_argument("--node-id", help="the node's id, with --insecure")
    run.add_argument("--idle-timeout-s", type=float, help="idle connections are closed after this (30)")
    run.add_argument("--log-level", help="debug, info, warning, error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
