"""`python -m fal_scheduler.sim VERB …`, which `falctl sim VERB …` executes: production decisions without a cluster.

A verb is a line of VERBS and a module with `add_arguments(parser)` and `run(args) -> int` (the exit code). The module
is imported when its verb is called. Exit codes: 0 done, 1 refused or failed with `error: WHAT. REMEDY` on stderr,
2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NamedTuple

from fal_contract.errors import FalError


class Verb(NamedTuple):
    """Where a verb lives and what `--help` says of it."""

    module: str
    help: str


VERBS: Final[dict[str, Verb]] = {
    "forecast": Verb("fal_scheduler.sim.forecast", "the forecast of arrivals on a trace: its error, and what it saves"),
    "place": Verb("fal_scheduler.sim.place", "placement policies on a trace of tasks: how much of the GPUs they fill"),
    "serve": Verb("fal_scheduler.sim.serve", "the order of requests on a trace: loads of models, and waits"),
    "replay": Verb("fal_scheduler.sim.replay", "a scheduler's decision log, decided again: is every decision the same"),
    "warm": Verb("fal_scheduler.sim.warm", "models kept in memory and on disk by value, on a trace: what that saves"),
    "whatif": Verb(
        "fal_scheduler.sim.whatif", "a decision log's requests on another fleet, or by other scaling values"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = words[0] if words and words[0] in VERBS else None
    parser = argparse.ArgumentParser(
        prog="falctl sim", description="The scheduler's own code on a trace or a log.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for name, verb in VERBS.items():
        one = verbs.add_parser(name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".")
        if name == chosen:
            module = import_module(verb.module)
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except FalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
