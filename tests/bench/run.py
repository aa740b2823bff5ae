"""Run benchmarks by name: `python tests/bench/run.py [--list] [--pairs N] [--seconds S] [NAME …]`; see `ops/bench`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# As pytest does (pyproject, pythonpath): benchmarks share the servers of tests/, and run without an installation.
for root in ("proto", "scheduler", "agent", "runtime", "fsd", "ops", "tests", "tests/bench"):
    sys.path.insert(0, str(HERE.parent.parent / root))

from harness import Options, Result  # noqa: E402


def names() -> list[str]:
    """All benchmarks, by their files."""
    return sorted(path.stem.removeprefix("bench_").replace("_", "-") for path in HERE.glob("bench_*.py"))


def run_one(name: str, options: Options) -> Result:
    """Run one benchmark; it prints its table, we print its last line."""
    module = importlib.import_module(f"bench_{name.replace('-', '_')}")
    print(f"{name}: must reach {module.MUST_REACH}", flush=True)
    with asyncio.Runner(loop_factory=getattr(module, "LOOP", None)) as runner:  # of the process that it stands for
        result: Result = runner.run(module.run(options))
    print(result.last_line(), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="ops/bench", description="Benchmarks, each against its baseline.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names())} (default: all)")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    default = Options()
    parser.add_argument("--pairs", type=int, default=default.pairs, help="interleaved pairs of runs, at least 5 count")
    parser.add_argument("--seconds", type=float, default=default.seconds_s, help="length of one run")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(names()))
        return 0
    if unknown := [name for name in arguments.names if name not in names()]:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(names())}")
    try:
        options = Options(pairs=arguments.pairs, seconds_s=arguments.seconds)
    except ValueError as error:
        parser.error(str(error))
    results = [run_one(name, options) for name in arguments.names or names()]
    return 0 if all(result.reached for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
