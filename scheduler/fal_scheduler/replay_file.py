"""A file for whoever must understand a broken invariant: the event that would have broken it, and what it broke.

Bounded in number and size; a full disk is told and tolerated. Called by the engine only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import structlog

from fal_scheduler.core.events import Event, Moment
from fal_scheduler.core.invariants import Violation

FILES_MAX: Final = 20
EVENT_CHARS_MAX: Final = 1 << 20

_log = structlog.get_logger("fal.engine")


def write_replay(
    directory: Path | None, number: int, *, event: Event | None, moment: Moment, term: int, found: list[Violation]
) -> None:
    """Write replay file `number`; beyond FILES_MAX only the log tells."""
    rules = [{"rule": one.rule, "message": one.message, "subjects": list(one.subjects)} for one in found]
    _log.error("invariant broken; batch refused", term=term, rules=rules)
    if directory is None or number > FILES_MAX:
        return
    text = json.dumps(
        {
            "version": 1,
            "term": term,
            "now_s": moment.now_s,
            "wall_s": moment.wall_s,
            "event": repr(event)[:EVENT_CHARS_MAX],
            "violations": rules,
        },
        indent=1,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"replay-{term}-{number}.json").write_text(text)
    except OSError as error:
        _log.warning("replay file not written", error=str(error))
