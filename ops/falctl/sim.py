"""`falctl sim VERB …`: the scheduler's own code on a trace or a log, in virtual time.

It executes `python -m fal_scheduler.sim`, since falctl never imports the scheduler.
"""

from __future__ import annotations

import sys

import typer

# Everything after `sim`, `--help` included, is for the other program.
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def sim(context: typer.Context) -> None:
    """Run the scheduler's decisions on a trace or a log: `falctl sim --help`."""
    import subprocess

    done = subprocess.run([sys.executable, "-m", "fal_scheduler.sim", *context.args], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
