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
from typing import Final

from pydantic import Field

from fal_contract.config import ConfigModel, load_config
from fal_contract.errors import Code, FalError, invalid
from fal_contract.telemetry import LogLevel, configure_logging, get_logger

ENV_PREFIX: Final = "FAL_FSD"
_SOCKET_PATH_BYTES_MAX: Final = 100
_STOP_GRACE_S: Final = 2.0


class FsdOptions(ConfigModel):
    """What fal-fsd needs to know at its start."""

    state_dir: Path = Field(description="folder for models, parts and pins")
    socket: Path | None = Field(None, description="unix socket to serve on; default STATE_DIR/fsd.sock")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")

    @property
    def socket_path(self) -> Path:
        """Where the socket is."""
        return self.socket or self.state_dir / "fsd.sock"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: ended in order; 1: `error: WHAT. REMEDY` on stderr; 2: usage."""
    arguments = _parser().parse_args(argv)
    flags = {"state_dir": arguments.state_dir, "socket": arguments.socket, "log_level": arguments.log_level}
    try:
        options = load_config(FsdOptions, file=arguments.config, env=os.environ, prefix=ENV_PREFIX, flags=flags)
        if len(os.fsencode(options.socket_path)) > _SOCKET_PATH_BYTES_MAX:
            raise invalid(
                "socket",
                str(options.socket_path),
                f"has more than {_SOCKET_PATH_BYTES_MAX} bytes",
                remedy="Use a shorter path.",
            )
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
    import grpc.aio  # --help must not wait for it

    from fal_contract import rpc
    from fal_contract.v1 import fsd_pb2, fsd_pb2_grpc
    from fal_fsd.service import NodeCache
    from fal_fsd.store import Store

    log = get_logger("fal-fsd")
    store = Store(options.state_dir)
    cache = NodeCache(store)
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
    fsd_pb2_grpc.add_NodeCacheServicer_to_server(cache, server)
    await rpc.add_standard_services(server, [fsd_pb2.DESCRIPTOR.services_by_name["NodeCache"].full_name])
    old_mask = os.umask(0o177)  # the socket is its owner's alone
    try:
        if not server.add_insecure_port(f"unix:{options.socket_path}"):
            raise FalError(Code.UNAVAILABLE, f"cannot listen on {options.socket_path}", remedy="Choose another path.")
    finally:
        os.umask(old_mask)
    await server.start()
    log.info("serving", socket=str(options.socket_path), state_dir=str(options.state_dir))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    await cache.close()
    await server.stop(_STOP_GRACE_S)
    store.close()
    log.info("stopped")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-fsd", description="The weight cache of a node.")
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="serve until stopped")
    run.add_argument("--config", type=Path, help="TOML file with the settings below")
    run.add_argument("--state-dir", help="folder for models, parts and pins")
    run.add_argument("--socket", help="unix socket to serve on (STATE_DIR/fsd.sock)")
    run.add_argument("--log-level", help="debug, info, warning, error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
