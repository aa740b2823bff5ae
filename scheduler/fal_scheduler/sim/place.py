"""`falctl sim place`: placement policies on a trace of tasks."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `falctl sim place`."""
    parser.add_argument("--nodes", required=True)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    return 0
