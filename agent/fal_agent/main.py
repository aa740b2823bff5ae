"""`fal-agent run`: the node's agent. `fal-agent purge`: clear a machine of everything an agent left running.

SIGTERM and SIGINT end the agent alone; containers, proxy and fsd go on.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fal_contract.errors import FalError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: ended in order; 1: `error: WHAT. REMEDY` on stderr; 2: usage."""
    arguments = _parser().parse_args(argv)
    # gRPC's fork handlers wait for its threads, and every container begins with a fork: the agent would stall. What we
    # fork executes another program at once, so they are of no use here.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
    try:
        if arguments.command == "purge":
            from fal_agent.purge import purge

            asyncio.run(purge(Path(arguments.state_dir), tell=print))
            return 0
        # Not uvloop: with gRPC's poller beside it the end of a child's pipe is never seen, and starts hang.
        asyncio.run(_agent(arguments))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ExceptionGroup as group:
        fal, rest = group.split(FalError)
        if rest is not None or fal is None:
            raise
        for leaf in _leaves(fal):
            print(f"error: {leaf}", file=sys.stderr)
        return 1
    return 0


async def _agent(arguments: argparse.Namespace) -> None:
    from fal_agent.options import ENV_PREFIX, AgentOptions, check
    from fal_contract.config import load_config
    from fal_contract.telemetry import configure_logging

    flags = {key: value for key, value in vars(arguments).items() if key not in ("command", "config")}
    options = check(load_config(AgentOptions, file=arguments.config, env=os.environ, prefix=ENV_PREFIX, flags=flags))
    configure_logging("fal-agent", level=options.log_level)
    # Heavy imports only when the settings are good.
    from fal_agent.agent import Agent
    from fal_agent.layout import Layout

    layout = Layout(options.state_dir.absolute())
    layout.make()
    lock = layout.lock()
    try:
        agent = Agent(options, layout)
        gc.collect()
        gc.freeze()  # what was imported stays: a full collection amid many starts took a tenth of a second
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.stop)
        await agent.run()
    finally:
        os.close(lock)


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-agent", description="The agent of a node.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="serve until stopped; containers outlive it")
    run.add_argument("--config", type=Path, help="TOML file with the settings below")
    run.add_argument("--state-dir", help="folder for identity, journal and everything of this node")
    run.add_argument("--schedulers", action="append", help="rpc address of a scheduler, HOST:PORT; repeat")
    run.add_argument("--join-url", help="join address of a scheduler, https://HOST:PORT; for the first start")
    run.add_argument("--join-token", help="join token; better --join-token-file")
    run.add_argument("--join-token-file", help="file with the join token")
    run.add_argument("--node-name", help="name of this machine (its host name)")
    run.add_argument("--driver", choices=("auto", "oci", "process"), help="container driver (auto)")
    run.add_argument("--sim-gpus", help="simulated GPUs, such as 8xH100-80GB")
    run.add_argument("--proxy-host", help="address on which the proxy listens (0.0.0.0)")
    run.add_argument("--proxy-port", type=int, help="port of the proxy (0: any, the same at each start)")
    run.add_argument("--addresses", action="append", help="where gateways reach the proxy, NETWORK=HOST[:PORT]; repeat")
    run.add_argument("--fsd-socket", help="socket of the node's fal-fsd")
    run.add_argument("--prepared-containers", type=int, help="kept ready for each of the last kinds started here (1)")
    run.add_argument("--warm-workers", type=int, help="workers kept with libraries loaded (1; 0 with simulated GPUs)")
    host_network = "take apps with network = host where their pool allows it (yes)"
    run.add_argument("--allow-host-network", action=argparse.BooleanOptionalAction, help=host_network)
    gpu_reset = "reset GPUs whose fault asks for it, when they are idle (yes)"
    run.add_argument("--gpu-reset", action=argparse.BooleanOptionalAction, help=gpu_reset)
    run.add_argument("--notices", action="append", help="aws, gcp, azure or file:/PATH: watch for its notices; repeat")
    run.add_argument("--reboot-command", help="reboots the machine for `falctl node reboot` (none: it may not)")
    run.add_argument("--egress-subnet", help="addresses of containers with network = egress (10.222.0.0/16)")
    run.add_argument("--cni-plugin-dir", help="folders with CNI plugins (/usr/lib/cni:/opt/cni/bin)")
    run.add_argument("--fsd-config", help="TOML file with settings of fal-fsd")
    run.add_argument("--metrics-host", help="address for /metrics and /healthz (127.0.0.1)")
    run.add_argument("--metrics-port", type=int, help="port for /metrics and /healthz (0: any)")
    run.add_argument("--log-level", help="debug, info, warning, error")
    purge = commands.add_parser("purge", help="end every container, proxy and fsd of a state directory")
    purge.add_argument("--state-dir", required=True, help="state directory of an agent that does not run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
