"""`falctl sim replay LOG|DIR`: the production core on a recorded decision log; every decision must come out the same.

Exit codes: 0 all the same, 1 a difference (the first of each run of segments is shown) or a log that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fal_contract.errors import Code, FalError, invalid
from fal_scheduler.core.log_entries import Beats, Entry, Failed, Froze, Loaded, Stepped
from fal_scheduler.core.records import Runner
from fal_scheduler.core.replayer import Difference, LoggedIds, Replayer
from fal_scheduler.core.state import State
from fal_scheduler.core.step import Core
from fal_scheduler.decision_files import Segment, segments
from fal_scheduler.recovery import recover, suspect_foreign

MakeCore = Callable[[State, LoggedIds], Core]


@dataclass
class Run:
    """One replay of one segment. `first`: number of its first entry; `differs_at`: number of the entry that differs."""

    segment: Segment
    entries: int = 0
    steps: int = 0
    decisions: int = 0  # changes of records
    difference: Difference | None = None
    differs_at: int = 0
    differs_entry: Entry | None = None

    @property
    def view(self) -> dict[str, object]:
        """For `--json`."""
        header = self.segment.header
        found = self.difference
        difference = {"entry": self.differs_at, "event": _event_name(self.differs_entry), "part": found.part,
                      "then": found.then, "now": found.now} if found is not None else None  # fmt: skip
        return {
            "path": str(self.segment.path), "epoch": header.epoch, "term": header.term, "segment": header.segment,
            "software": header.software, "numpy": header.numpy, "cpu": header.cpu, "entries": self.entries,
            "steps": self.steps, "decisions": self.decisions, "torn": self.segment.torn, "difference": difference,
        }  # fmt: skip


@dataclass
class Report:
    """A replay of several segments, in order."""

    runs: list[Run] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every decision came out as it was."""
        return all(run.difference is None for run in self.runs)

    @property
    def view(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "same": self.same,
            "entries": sum(run.entries for run in self.runs),
            "steps": sum(run.steps for run in self.runs),
            "decisions": sum(run.decisions for run in self.runs),
            "segments": [run.view for run in self.runs],
        }


def replayer(make_core: MakeCore | None = None) -> Replayer:
    """A replayer that begins as the engine does."""
    return Replayer(
        found=lambda loaded: _found(loaded),
        suspect=lambda state, cluster_id, wall_s: suspect_foreign(state, cluster_id, wall_s=wall_s),
        make_core=make_core,
    )


def _found(loaded: Loaded) -> State:
    return recover(loaded.records, term=loaded.term, revision=loaded.revision, now_s=loaded.now_s)[0]


def replay(
    found: Sequence[Segment],
    *,
    first: int = 0,
    last: int | None = None,
    on_entry: Callable[[int, Entry], object] | None = None,
    make_core: MakeCore | None = None,
) -> Report:
    """Do all of `found` again, each term up to its first difference.

    `first`, `last`: numbers of the entries that are compared and given to `on_entry`; earlier ones are only done.
    A segment that goes on where the one before ended must begin with what that one came to.
    """
    report = Report()
    again, upto = replayer(make_core), (0, 0, -1, 0)
    broken = False
    for segment in found:
        head = segment.header
        follows = upto == (head.epoch, head.term, head.segment - 1, head.first - 1)
        if not follows:
            again, broken = replayer(make_core), False
        if follows and broken:
            continue  # what comes after a difference differs, too
        run = Run(segment)
        report.runs.append(run)
        number = head.first - 1
        for number, entry in enumerate(segment.entries(), start=head.first):
            if last is not None and number > last:
                break
            difference = again.take(entry)
            run.entries += 1
            if isinstance(entry, Stepped):
                run.steps += 1
                run.decisions += len(entry.changes)
            if number < first:
                continue
            if on_entry is not None:
                on_entry(number, entry)
            if difference is not None:
                run.difference, run.differs_at, run.differs_entry = difference, number, entry
                broken = True
                break
        upto = (head.epoch, head.term, head.segment, number)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `fal_scheduler.sim.__main__`."""
    parser.add_argument("log", type=Path, help="a segment, or a folder of them (DATA/decisions)")
    parser.add_argument("--term", type=_count, help="only this term's segments")
    parser.add_argument("--from", dest="first", type=_count, help="number of the first entry to show and compare")
    parser.add_argument("--to", dest="last", type=_count, help="number of the last one")
    parser.add_argument("--show", action="store_true", help="print every decision")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of an entry or term")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """See `fal_scheduler.sim.__main__`."""
    if args.last is not None and args.last < (args.first or 0):
        raise invalid("--to", args.last, f"is before --from {args.first}", remedy="Give the numbers in order.")
    found = [one for one in segments(args.log) if args.term in (None, one.header.term)]
    if not found:
        raise FalError(Code.NOT_FOUND, f"{args.log} has no segment of term {args.term}", remedy="Leave --term out.")
    show = (args.show or args.first is not None or args.last is not None) and not args.json
    on_entry = _print_entry if show else None
    report = replay(found, first=args.first or 0, last=args.last, on_entry=on_entry)
    if args.json:
        print(json.dumps({"replay": report.view}))
    else:
        _print(report)
    return 0 if report.same else 1


def _print(report: Report) -> None:
    for run_ in report.runs:
        header = run_.segment.header
        verdict = "the same" if run_.difference is None else f"DIFFERS at entry {run_.differs_at}"
        torn = "; its end was torn" if run_.segment.torn else ""
        print(
            f"{run_.segment.path.name}: term {header.term}, {run_.entries} entries, {run_.steps} steps, "
            f"{run_.decisions} decisions: {verdict}{torn}"
        )
        if header.numpy != np.__version__:
            print(f"  written with numpy {header.numpy} on {header.cpu}; this is numpy {np.__version__}")
        if run_.difference is not None:
            print(f"  event  {_event_name(run_.differs_entry)}: {str(run_.differs_entry)[:1000]}")
            print(f"  part   {run_.difference.part}")
            print(f"  then   {run_.difference.then}")
            print(f"  now    {run_.difference.now}")
    if not report.same:
        print("The decisions differ: another release, another rule, or something that is decided by no input.",
              file=sys.stderr)  # fmt: skip


def _event_name(entry: Entry | None) -> str:
    return type(entry.event).__name__ if isinstance(entry, Stepped) else type(entry).__name__


def _print_entry(number: int, entry: Entry) -> None:
    """One line for what was decided, and one for each record that changed."""
    if isinstance(entry, Beats):
        print(f"{number:>9}  {len(entry.told)} heartbeats")
        return
    if not isinstance(entry, Stepped):
        detail = f" ({entry.changes} changes undone)" if isinstance(entry, Failed) else ""
        detail = f" {', '.join(one.rule for one in entry.violations)}" if isinstance(entry, Froze) else detail
        print(f"{number:>9}  {_event_name(entry)}{detail}")
        return
    subject = next((str(value) for name in ("id", "node_id", "node", "subject") if (value := _get(entry, name))), "")
    print(f"{number:>9}  {entry.now_s:.3f}  {_event_name(entry)} {subject} {entry.error}".rstrip())
    for key, after in entry.changes:
        print(f"{'':>9}    {_decided(key, after)}")


def _get(entry: Stepped, name: str) -> Any:
    return getattr(entry.event, name, None)


def _decided(key: str, after: object) -> str:
    if after is None:
        return f"{key} removed"
    if isinstance(after, Runner):
        place = f"on {after.node} {' '.join(after.gpus)}".rstrip() if after.node else "without a node"
        return f"{key}: {after.goal.name} {place}"
    return f"{key} set"


__all__ = ["Report", "Run", "add_arguments", "replay", "replayer", "run"]
