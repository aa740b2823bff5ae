"""`fal-fsd run`: the weight cache of a node, as a process of its own.

Ends on SIGTERM or SIGINT; what it staged stays, what it was staging is taken up at the next start. Started and watched
by the agent, or by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fal_contract.config import load_config
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import configure_logging, get_logger
from fal_fsd.options import ENV_PREFIX, FsdOptions, check

if TYPE_CHECKING:
    from fal_fsd.assembly import Cache
    from fal_fsd.metrics import Metrics

_STOP_GRACE_S: Final = 2.0
_FLAGS: Final = (
    ("--state-dir", "folder for models, parts and pins"),
    ("--socket", "unix socket to serve on (STATE_DIR/fsd.sock)"),
    ("--log-level", "debug, info, warning, error"),
    ("--identity", "file with the node's certificate and key, which its agent keeps"),
    ("--bulk-host", "address on which peers are served (0.0.0.0)"),
    ("--bulk-port", "port for peers; 0: any, the same at each start"),
    ("--tls", "TLS between caches: auto, always, never"),
    ("--disk-bytes-max", "bytes that artifacts may take; 0: what the disk holds"),
    ("--memory-bytes-max", "bytes that may be locked in memory"),
    ("--mount", "auto: mount unfinished artifacts where this works; off"),
    ("--mount-dir", "folder for these mounts"),
    ("--read-timeout-s", "how long a read of an unfinished file may wait"),
    ("--node-bytes-s", "bytes per second sent to peers in all; 0: no limit"),
    ("--pool-bytes-s", "of these, to the own pool"),
    ("--region-bytes-s", "of these, to other pools of the region"),
    ("--cross-region-bytes-s", "of these, to other regions"),
    ("--origin-bytes-s", "bytes per second read from origins"),
    ("--credentials-file", "TOML file with credentials of origins, mode 0600"),
    ("--metrics-host", "address for /metrics and /healthz"),
    ("--metrics-port", "port for /metrics and /healthz; 0: any"),
)
_LISTS: Final = (
    ("--schedulers", "rpc address of a scheduler, host:port; repeat"),
    ("--addresses", "where peers reach the bulk port, NETWORK=HOST[:PORT]; repeat"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: ended in order; 1: `error: WHAT. REMEDY` on stderr; 2: usage."""
    arguments = _parser().parse_args(argv)
    flags = {name: value for name, value in vars(arguments).items() if name not in ("command", "config")}
    try:
        options = check(load_config(FsdOptions, file=arguments.config, env=os.environ, prefix=ENV_PREFIX, flags=flags))
        configure_logging("fal-fsd", level=options.log_level)
        asyncio.run(serve(options))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"error: {exc.strerror}: {exc.filename}. Give a writable --state-dir.", file=sys.stderr)
        return 1
    return 0


async def serve(options: FsdOptions) -> None:
    """Until SIGTERM or SIGINT."""
    import random  # --help must not wait for these

    import grpc.aio

    from fal_contract import rpc
    from fal_contract.clock import SystemClock
    from fal_contract.v1 import fsd_pb2, fsd_pb2_grpc
    from fal_fsd.assembly import Cache
    from fal_fsd.service import NodeCache

    log = get_logger("fal-fsd")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cache = Cache(options, clock=SystemClock(), rng=random.Random())
    await cache.start()
    metrics: Metrics | None = None
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
    try:
        fsd_pb2_grpc.add_NodeCacheServicer_to_server(NodeCache(cache.node), server)
        await rpc.add_standard_services(server, [fsd_pb2.DESCRIPTOR.services_by_name["NodeCache"].full_name])
        _bind(server, options.socket_path)
        await server.start()
        metrics = await _metrics(cache)  # last: readers and runners that wait for us do not wait for its libraries
        port = await metrics.start(options.metrics_host, options.metrics_port)
        log.info(
            "serving", socket=str(options.socket_path), state_dir=str(options.state_dir), metrics_port=port,
            bulk_port=cache.bulk_port,
        )  # fmt: skip
        await stop.wait()
    finally:
        await server.stop(_STOP_GRACE_S)
        if metrics is not None:
            await metrics.close()
        await cache.close()
    log.info("stopped")


async def _metrics(cache: Cache) -> Metrics:
    def load() -> type[Metrics]:
        from fal_fsd.metrics import Metrics

        return Metrics

    return (await asyncio.to_thread(load))(cache)


def _bind(server: object, socket_path: Path) -> None:
    old_mask = os.umask(0o177)  # the socket is its owner's alone
    try:
        if not server.add_insecure_port(f"unix:{socket_path}"):  # type: ignore[attr-defined]  # imported late
            raise FalError(Code.UNAVAILABLE, f"cannot listen on {socket_path}", remedy="Choose another path.")
    finally:
        os.umask(old_mask)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-fsd", description="The weight cache of a node.")
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="serve until stopped")
    run.add_argument("--config", type=Path, help="TOML file with the settings below")
    for flag, text in _FLAGS:
        run.add_argument(flag, help=text)
    for flag, text in _LISTS:
        run.add_argument(flag, action="append", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
