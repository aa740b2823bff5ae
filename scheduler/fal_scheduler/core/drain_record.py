"""A drain, as a node's record keeps it. Pure. Part of `core.records`, where everybody finds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drain:
    """Runners are to leave a node; `deadline_at_s` 0: never stopped, wall clock else.

    `boot_id`: of a reboot, which boot of the machine was told to end; empty: none yet. `notice`: "spot" or "notice",
    which a cloud told beside an operator's drain; `notice_at_s` as `deadline_at_s`, and the nearer of both counts.
    """

    kind: str
    reason: str = ""
    began_at_s: float = 0.0
    deadline_at_s: float = 0.0
    force: bool = False
    keep_cordoned: bool = False
    created_by: str = ""
    boot_id: str = ""
    notice: str = ""
    notice_reason: str = ""
    notice_at_s: float = 0.0
