"""Verbs of `fal-scheduler` that work on a store while no scheduler runs: `restore` and `migrate`.

They take the same settings as `run`. Exit codes and errors as there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_contract.errors import invalid
from fal_scheduler.options import Options

if TYPE_CHECKING:
    from fal_scheduler.moving import Filled
    from fal_scheduler.store.interface import Store

Load = Callable[[argparse.Namespace, Any], Options]


def add_verbs(verbs: Any, settings: Callable[[argparse.ArgumentParser], None], load: Load) -> None:
    """`settings` adds the flags of `run` to a parser, `load` reads them."""
    restore = verbs.add_parser("restore", help="fill a store", description="Fill a store from a snapshot, offline.")
    restore.add_argument("file", type=Path, help="what `falctl operator snapshot save` wrote")
    migrate = verbs.add_parser("migrate", help="move to another store", description="Move the records, offline.")
    migrate.add_argument("--to", required=True, help="etcd://HOST:PORT[,HOST:PORT][/PREFIX] or sqlite:///PATH")
    for parser, run in ((restore, _restore), (migrate, _migrate)):
        parser.add_argument("--force", action="store_true", help="replace what the store holds")
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        settings(parser)
        parser.set_defaults(run=lambda args, run=run: run(args, load(args, os.environ)))


def _restore(args: argparse.Namespace, options: Options) -> None:
    from fal_scheduler.ca import CertificateAuthority
    from fal_scheduler.main import make_store
    from fal_scheduler.moving import restore

    ca = CertificateAuthority.open(options.identity_dir, seal_key=options.seal_key)
    work = restore(make_store(options), args.file, ca=ca, blobs=options.data_dir / "blobs", force=args.force)
    filled = asyncio.run(work)
    if args.json:
        _print("restored", filled)
    else:
        print(
            f"restored {filled.records} records of cluster {filled.cluster_id} as epoch {filled.epoch}, and "
            f"{filled.manifests} manifests.\nStart the schedulers. Containers that were started after the snapshot are "
            "kept as orphans: `falctl operator confirm adopt` or `stop` settles them."
        )


def _migrate(args: argparse.Namespace, options: Options) -> None:
    from fal_scheduler.main import make_store
    from fal_scheduler.moving import migrate

    target, settings = target_store(args.to, options)
    filled = asyncio.run(migrate(make_store(options), target, where=args.to, force=args.force))
    if args.json:
        _print("migrated", filled)
    else:
        print(
            f"moved {filled.records} records of cluster {filled.cluster_id} to {args.to} as epoch {filled.epoch}.\n"
            f"Write this into {options.data_dir / 'config.toml'}, and start the scheduler:\n\n{settings}"
        )


def target_store(text: str, options: Options) -> tuple[Store, str]:
    """The store that a URL means, and the settings that name it. Raises INVALID."""
    remedy = "Write etcd://HOST:PORT,HOST:PORT/PREFIX or sqlite:///PATH/store.db."
    scheme, colon, rest = text.partition("://")
    if scheme == "etcd" and colon:
        from fal_scheduler.store.etcd import EtcdStore
        from fal_scheduler.store.etcd_client import EtcdTls

        members, _, prefix = rest.partition("/")
        endpoints = [member for member in members.split(",") if member]
        path = f"/{prefix}" if prefix else "/falctl"
        etcd = options.etcd
        tls = EtcdTls(etcd.ca, etcd.cert, etcd.key) if etcd.ca is not None else None
        lines = ['store = "etcd"', "[etcd]", f"endpoints = {json.dumps(endpoints)}", f'prefix = "{path}"']
        lines += [f'{name} = "{getattr(etcd, name)}"' for name in ("ca", "cert", "key") if getattr(etcd, name)]
        return EtcdStore(endpoints, tls=tls, prefix=path), "\n".join(lines)
    if scheme == "sqlite" and colon and rest.startswith("/"):
        from fal_scheduler.store.sqlite import SqliteStore

        if Path(rest).name != "store.db":
            raise invalid("to", text, "does not end in store.db", remedy=remedy)
        if not Path(rest).parent.is_dir():
            what = "is in no existing folder"
            raise invalid("to", text, what, remedy="Make it first; a scheduler needs its identity/ there, too.")
        return SqliteStore(Path(rest)), f'data_dir = "{Path(rest).parent}"\nstore = "sqlite"'
    raise invalid("to", text, "names no store", remedy=remedy)


def _print(noun: str, filled: Filled) -> None:
    print(json.dumps({noun: asdict(filled)}))


__all__ = ["add_verbs", "target_store"]
