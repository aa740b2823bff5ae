"""Golden decision logs, recorded by `decision_rig`: this release reads them and decides as they say."""

from __future__ import annotations

import pytest

from decision_rig import GOLDEN
from fal_scheduler.decision_files import segments
from fal_scheduler.sim.replay import replay

RECORD_AGAIN = "If a rule was changed on purpose: `python tests/decision_rig.py` records the golden logs anew."


@pytest.mark.parametrize("kind", ["world", "play"])
def test_golden_logs_replay(kind: str) -> None:
    report = replay(segments(GOLDEN / kind))
    assert report.same, f"{[run.view for run in report.runs if run.difference]}\n{RECORD_AGAIN}"
    assert sum(run.decisions for run in report.runs) > 20
