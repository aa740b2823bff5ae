#!/usr/bin/env python
"""Generate the Python stubs of proto/fal_contract/v1/*.proto beside them, with types.

    ops/genproto.py          write them
    ops/genproto.py --check  write nothing; exit 1 and name the files that differ

Stubs are generated into a temporary folder first, so that a failing protoc changes nothing. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOT = ROOT / "proto"
PACKAGE = Path("fal_contract/v1")
PROTOC_TIMEOUT_S = 120
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(into: Path) -> None:
    """Run protoc over every .proto of the package; the stubs land under `into`/fal_contract/v1."""
    protos = sorted(str(path.relative_to(SOURCE_ROOT)) for path in (SOURCE_ROOT / PACKAGE).glob("*.proto"))
    if not protos:
        raise SystemExit(f"error: no .proto files in {SOURCE_ROOT / PACKAGE}. Run this from a whole checkout.")
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python")]
    # Unlike plain ones, these stubs type the asynchronous servicers and stubs that we use.
    typed = [f"--mypy_out=quiet:{into}", f"--mypy_grpc_out=quiet:{into}"]
    plugins = str(Path(sys.executable).parent)
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCE_ROOT}", *outputs, *typed, *protos],
        env={**os.environ, "PATH": f"{plugins}{os.pathsep}{os.environ.get('PATH', '')}"},
        timeout=PROTOC_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: protoc refused the contract (exit {done.returncode}). Correct the lines named above.")


def stubs_in(folder: Path) -> dict[str, bytes]:
    """Every generated file in `folder` by its name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)}


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    beside = SOURCE_ROOT / PACKAGE
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh, present = stubs_in(Path(scratch) / PACKAGE), stubs_in(beside)
    differing = sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))
    if check:
        if differing:
            names = ", ".join(differing)
            print(f"error: stubs are not those of the protos: {names}. Run ops/genproto.py.", file=sys.stderr)
        return 1 if differing else 0
    for name in differing:
        if name in fresh:
            (beside / name).write_bytes(fresh[name])
        else:
            (beside / name).unlink()
    print(f"{len(fresh)} stubs, {len(differing)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
