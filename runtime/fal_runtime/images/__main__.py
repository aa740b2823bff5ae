"""`python -m fal_runtime.images pack SOURCE --output DIR …`: what a node's pack task and falctl run.

Steps go to stdout, one a line; the last line is one JSON object, the facts (`PackResult.facts`). A failure ends with 1
and `error: WHAT. REMEDY` on stderr, a wrong call with 2. SIGTERM and SIGINT end it with nothing left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from fal_contract.errors import FalError
from fal_contract.limits import IMAGE_BYTES_MAX_DEFAULT, IMAGE_PACK_TIMEOUT_S
from fal_runtime.images.commands import redact
from fal_runtime.images.pack import PackRequest, PackResult, pack
from fal_runtime.images.registry import RegistryAccess


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(argv)
    if options.proxy_file is not None:
        try:
            os.environ.update(json.loads(options.proxy_file.read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError):  # its content is not repeated
            print(f"error: {options.proxy_file} holds no proxies. Give a JSON object of variables.", file=sys.stderr)
            return 1
    request = PackRequest(
        source=options.source,
        output=options.output,
        work=options.work,
        platform=options.platform,
        bytes_max=options.bytes_max,
        format=options.format,
        order=options.order,
        access=RegistryAccess(options.authfile, options.ca_file, options.cert_dir),
        timeout_s=options.timeout_s,
    )
    try:
        result = asyncio.run(_until_told(request))
    except FalError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("error: packing was stopped. Run it again.", file=sys.stderr)
        return 1
    print(json.dumps(result.facts(), sort_keys=True), flush=True)
    return 0


async def _until_told(request: PackRequest) -> PackResult:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    return await pack(request, say=lambda text: print(redact(text), flush=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fal_runtime.images", description=(__doc__ or "").split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="make one read-only file system image")
    one.add_argument("source", help="docker://REG/REPO:TAG, oci:DIR[:TAG], docker-archive:FILE, rootfs:DIR")
    one.add_argument("--output", type=Path, required=True, help="folder for the image and config.json")
    one.add_argument("--work", type=Path, help="folder for what is made on the way; default: below --output")
    one.add_argument("--authfile", type=Path, help="credentials of registries, as `skopeo login` writes them")
    one.add_argument("--ca-file", type=Path, help="certificate of the registry's authority, PEM")
    one.add_argument("--proxy-file", type=Path, help="JSON object of variables such as https_proxy, with passwords")
    one.add_argument("--cert-dir", type=Path, help="folder of certificates, as skopeo reads it")
    one.add_argument("--platform", default="linux/amd64", help="OS/ARCHITECTURE")
    one.add_argument("--bytes-max", type=int, default=IMAGE_BYTES_MAX_DEFAULT, help="of the layers and of the files")
    one.add_argument("--format", choices=("auto", "erofs", "squashfs"), default="auto")
    one.add_argument("--order", type=Path, help="paths in order of first use, one a line; makes it squashfs")
    one.add_argument("--timeout-s", type=float, default=IMAGE_PACK_TIMEOUT_S, help="seconds that all of it may take")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
