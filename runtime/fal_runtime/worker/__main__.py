"""`python -m fal_runtime.worker`: the first line of output comes before anything heavy is imported."""

from __future__ import annotations

import os
import sys

from fal_runtime.worker.log import log


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--warm"]:
        from fal_runtime.worker import warm

        arguments = warm.wait()
    if not {"-h", "--help"} & set(arguments):
        log("start", pid=os.getpid(), python=sys.version.split()[0])
    from fal_contract.errors import FalError
    from fal_runtime.worker import main as process

    try:
        options = process.parse_options(arguments, os.environ)
    except FalError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        process.leave(process.EXIT_USAGE)
    from fal_runtime.worker.diffusers_engine import DiffusersEngine

    assert options.model is not None  # parse_options asks for it
    engine = DiffusersEngine(
        options.model, loras=options.loras, threads=options.threads, dtype=options.dtype, name=options.name
    )
    process.leave(process.run(engine, options))


if __name__ == "__main__":
    main()
