"""The command `fal-scheduler`: `run`, `init`, `issue`, and offline `restore` and `migrate`.

Exit codes: 0 done, 1 refused or failed with `error: WHAT. REMEDY` on stderr, 2 usage. Imports what serves only when
it serves, so that `--help` and errors are quick.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_contract.clock import SystemClock
from fal_contract.config import describe, load_config
from fal_contract.errors import Code, FalError
from fal_scheduler.offline import add_verbs
from fal_scheduler.options import ENV_PREFIX, Options

if TYPE_CHECKING:
    from fal_scheduler.store.interface import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fal-scheduler", description="The control plane of a falctl cluster.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser("run", help="serve", description="Serve until SIGTERM.")
    _settings(run)
    run.set_defaults(run=_run)
    add_verbs(verbs, _settings, load_options)
    init = verbs.add_parser("init", help="make a cluster", description="Make a CA, its seal key and a first admin.")
    init.add_argument("--data-dir", type=Path, required=True, help="folder of the scheduler; made where missing")
    init.add_argument("--host", action="append", default=[], help="name the scheduler is reached at; repeatable")
    init.add_argument("--ip", action="append", default=[], help="address the scheduler is reached at; repeatable")
    init.add_argument("--seal-key", type=Path, help="where the seal key is kept, if not in the data folder")
    init.set_defaults(run=_init)
    issue = verbs.add_parser("issue", help="make an identity", description="Make a certificate for somebody.")
    issue.add_argument("--data-dir", type=Path, required=True, help="folder of the scheduler")
    issue.add_argument("--role", required=True, help="viewer, operator, admin or serving")
    issue.add_argument("--name", required=True, help="user or gateway id")
    issue.add_argument("--out", type=Path, required=True, help="PEM file to write: key, certificate and CA")
    issue.add_argument("--ttl", type=float, default=30 * 86400.0, help="seconds it is good for (default 30 days)")
    issue.add_argument("--seal-key", type=Path, help="where the seal key is, if not in the data folder")
    issue.set_defaults(run=_issue)
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each of the options."""
    parser.add_argument("--config", type=Path, help="TOML file; DATA_DIR/config.toml where it exists")
    for key in describe(Options, ENV_PREFIX):
        flag = "--" + key.path.replace(".", "-").replace("_", "-")
        text = f"{key.help} (default {key.default}; ${key.env})".replace("%", "%%")
        boolean: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if key.type == "bool" else {}
        parser.add_argument(flag, dest=key.path, default=None, help=text, **boolean)


def _init(args: argparse.Namespace) -> None:
    from fal_scheduler.init import init

    cluster_id = init(args.data_dir, hosts=[*args.host, *args.ip], clock=SystemClock(), seal_key=args.seal_key)
    print(f"made cluster {cluster_id} in {args.data_dir}; keep {args.seal_key or args.data_dir / 'identity/seal.key'}")


def _issue(args: argparse.Namespace) -> None:
    from fal_scheduler.init import issue

    issue(
        args.data_dir,
        role=args.role,
        name=args.name,
        out=args.out,
        ttl_s=args.ttl,
        clock=SystemClock(),
        seal_key=args.seal_key,
    )
    print(f"made {args.role}/{args.name} in {args.out}")


def _run(args: argparse.Namespace) -> None:
    options = load_options(args, os.environ)
    from fal_contract.telemetry import configure_logging

    configure_logging("fal-scheduler", level=options.log.level, format=options.log.format)
    if not options.identity_dir.exists():
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"{options.identity_dir} does not exist: there is no cluster here",
            remedy=f"Make one with `fal-scheduler init --data-dir {options.data_dir}`.",
        )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(options))


def load_options(args: argparse.Namespace, env: Any) -> Options:
    """File, environment and flags. Raises INVALID naming what is wrong."""
    lists = {key.path for key in describe(Options) if key.type.startswith("list")}
    flags: dict[str, object] = {
        key.path: getattr(args, key.path) for key in describe(Options) if getattr(args, key.path) is not None
    }
    for path in lists & flags.keys():
        flags[path] = [item.strip() for item in str(flags[path]).split(",") if item.strip()]
    file: Path | None = args.config
    folder = flags.get("data_dir") or env.get(f"{ENV_PREFIX}_DATA_DIR")
    if file is None and folder and (beside := Path(str(folder)) / "config.toml").exists():
        file = beside
    return load_config(Options, file=file, env=env, prefix=ENV_PREFIX, flags=flags)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT, or until it can go on no longer (raises FalError)."""
    from fal_scheduler.ca import CertificateAuthority
    from fal_scheduler.server import Scheduler

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ca = CertificateAuthority.open(options.identity_dir, seal_key=options.seal_key)
    async with Scheduler(options, make_store(options), ca, SystemClock()) as scheduler:
        waiting = [asyncio.create_task(scheduler.wait()), asyncio.create_task(stop.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting[0].done():
                waiting[0].result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


def make_store(options: Options) -> Store:
    """The store that the configuration names."""
    if options.store == "etcd":
        from fal_scheduler.store.etcd import EtcdStore
        from fal_scheduler.store.etcd_client import EtcdTls

        etcd = options.etcd
        tls = EtcdTls(etcd.ca, etcd.cert, etcd.key) if etcd.ca is not None else None
        return EtcdStore(etcd.endpoints, tls=tls, prefix=etcd.prefix)
    if options.store == "memory":
        from fal_scheduler.store.memory import MemoryBackend, MemoryStore

        return MemoryStore(MemoryBackend())
    from fal_scheduler.store.sqlite import SqliteStore

    return SqliteStore(options.data_dir / "store.db", standby=options.standby)


if __name__ == "__main__":
    sys.exit(main())
