"""`fal-gateway run`: HTTP in front, the scheduler's Dispatch stream and the nodes' proxies behind."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from fal_contract.clock import Clock, SystemClock
from fal_contract.config import load_config
from fal_contract.datapath import Address, DirectConnections, TlsIdentity, TunnelListener
from fal_contract.dispatch import DispatchClient
from fal_contract.dispatch_grpc import GrpcDispatchDialer
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import Identity, write_durably
from fal_contract.node_paths import NodePaths
from fal_contract.telemetry import Health, TelemetryServer, configure_logging, get_logger
from fal_gateway.app import Gateway
from fal_gateway.options import ENV_PREFIX, GatewayOptions, parse_address

_SHUTDOWN_S: Final = 60.0
_ANY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})
_log = get_logger("gateway")


@dataclass(frozen=True, slots=True)
class Ports:
    """What was listened on in the end; 0: not at all."""

    http: int
    tunnel: int
    metrics: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: ended in order; 1: `error: WHAT. REMEDY` on stderr; 2: usage."""
    arguments = _parser().parse_args(argv)
    flags = {key: value for key, value in vars(arguments).items() if key not in ("command", "config")}
    try:
        options = load_config(GatewayOptions, file=arguments.config, env=os.environ, prefix=ENV_PREFIX, flags=flags)
        configure_logging("fal-gateway", level=options.log_level)
        _run(_serve(options))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.asynccontextmanager
async def gateway(options: GatewayOptions, *, clock: Clock, rng: Random) -> AsyncIterator[Ports]:
    """Everything started; ended in order on leaving."""
    identity = Identity.load(options.identity)
    identity.check(now_s=clock.wall_s())
    tls = TlsIdentity(identity, clock)
    async with contextlib.AsyncExitStack() as stack:
        tunnels, tunnel_port = None, 0
        if options.tunnel_port is not None:
            tunnels = TunnelListener(tls)
            tunnel_port = (await tunnels.start(options.tunnel_host, options.tunnel_port)).port
            stack.push_async_callback(tunnels.close)
        advertised = _advertised(options, tunnel_port)
        client = DispatchClient(
            dial=GrpcDispatchDialer(options.schedulers, lambda: Identity.load(options.identity)),
            gateway_id=identity.peer.name,
            paths=lambda changed: NodePaths(DirectConnections(tls), tunnels, rng=rng, on_change=changed),
            rng=rng,
            tunnel_endpoints=advertised,
        )
        await client.start()
        stack.push_async_callback(client.close)
        registry = CollectorRegistry()
        front = Gateway(client, registry, wait_s=options.wait_s, body_bytes_max=options.body_bytes_max)
        metrics_port = 0
        if options.metrics_port is not None:
            telemetry = TelemetryServer(registry, lambda: Health(front.healthy, {}))
            metrics_port = await telemetry.start(options.metrics_host, options.metrics_port)
            stack.push_async_callback(telemetry.close)
        runner = web.AppRunner(
            front.application(), handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        http_port = await _listen(runner, options)
        yield Ports(http_port, tunnel_port, metrics_port)


def _advertised(options: GatewayOptions, tunnel_port: int) -> list[Address]:
    """Where nodes dial; without tunnel_addresses the listener's own address, if that is one."""
    if options.tunnel_port is None:
        return []
    if not options.tunnel_addresses and options.tunnel_host in _ANY_ADDRESS:
        raise invalid(
            "tunnel_addresses", "", "is missing", remedy="Say under which host:port nodes reach the tunnel port."
        )
    if not options.tunnel_addresses:
        return [Address(options.tunnel_host, tunnel_port)]
    return [parse_address(text, field="tunnel_addresses") for text in options.tunnel_addresses]


async def _listen(runner: web.AppRunner, options: GatewayOptions) -> int:
    try:
        await web.TCPSite(runner, options.host, options.port).start()
    except OSError as exc:
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"cannot listen on {options.host}:{options.port}: {os.strerror(exc.errno or 0)}",
            remedy="Choose another port, or stop the process that has it.",
            field="port",
        ) from None
    return int(runner.addresses[0][1])


async def _serve(options: GatewayOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with gateway(options, clock=SystemClock(), rng=Random(os.urandom(16))) as ports:
        if options.ports_file is not None:
            chosen = {"http": ports.http, "tunnel": ports.tunnel, "metrics": ports.metrics}
            write_durably(options.ports_file, json.dumps(chosen).encode(), mode=0o644)
        _log.info("serving", host=options.host, port=ports.http, tunnel_port=ports.tunnel, authentication="none yet")
        await stop.wait()


def _run(work: Coroutine[Any, Any, None]) -> None:
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-gateway", description="HTTP in front of the cluster's runners.")
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="serve until stopped")
    run.add_argument("--config", type=Path, help="TOML file with the settings below")
    run.add_argument("--schedulers", type=lambda text: text.split(","), help="host:port of the schedulers, by commas")
    run.add_argument("--identity", help="identity file with the role serving")
    run.add_argument("--host", help="address for clients (127.0.0.1; nobody is authenticated here yet)")
    run.add_argument("--port", type=int, help="port for clients (8080)")
    run.add_argument("--ports-file", help="where to write the chosen ports, as JSON")
    run.add_argument("--tunnel-host", help="address to take tunnels on (0.0.0.0)")
    run.add_argument("--tunnel-port", type=int, help="port to take tunnels on (no tunnels)")
    run.add_argument("--tunnel-addresses", type=lambda text: text.split(","), help="host:port under which nodes dial")
    run.add_argument("--metrics-port", type=int, help="port of /metrics and /healthz (off)")
    run.add_argument("--wait-s", type=float, help="seconds that a request waits for a slot (60)")
    run.add_argument("--log-level", help="debug, info, warning, error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
