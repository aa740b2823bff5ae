"""Random worlds and whole simulated clusters with a decision log; recorded logs as golden data.

python tests/decision_rig.py            # record tests/data/decision_logs anew, after a rule was changed on purpose
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from random import Random

from core_world import CountingIds, World, random_step, spec_of
from fal_contract.errors import FalError
from fal_scheduler import decision_files
from fal_scheduler.core.events import ApplyApp, Event, Moment, Outcome
from fal_scheduler.core.log_entries import TermRaised
from fal_scheduler.core.step import Core
from fal_scheduler.decision_files import segments
from fal_scheduler.decision_log import DecisionLog
from fal_scheduler.sim.replay import Report, replay

GOLDEN = Path(__file__).parent / "data" / "decision_logs"
GOLDEN_WORLD_SEED = 11
GOLDEN_WORLD_STEPS = 400
GOLDEN_PLAY_SEED = 23


class DrawnIds(CountingIds):
    """Ids that count and are remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[str] = []

    def suffix(self) -> str:
        self.drawn.append(super().suffix())
        return self.drawn[-1]


class RecordedCore(Core):
    """Tells the log of every step, as the engine does; a term that was raised meanwhile, too."""

    __slots__ = ("log", "term")

    def __init__(self, core: Core, log: DecisionLog) -> None:
        super().__init__(core.state, core.placer, DrawnIds())
        self.log = log
        self.term = core.state.term
        log.began(self.state, None)

    def step(self, event: Event, moment: Moment) -> Outcome:
        assert isinstance(self.ids, DrawnIds)
        if self.state.term != self.term:
            self.term = self.state.term
            self.log.note(TermRaised(self.term))
        self.ids.drawn.clear()
        try:
            outcome = super().step(event, moment)
        except FalError as error:
            self.log.stepped(event, moment, self.ids.drawn, None, error)
            raise
        self.log.stepped(event, moment, self.ids.drawn, outcome)
        return outcome


def recorded_world(seed: int, folder: Path, *, steps: int, **bounds: int) -> World:
    """A random history with a log in `folder`, closed."""
    world = World(Random(seed))
    log = DecisionLog(folder, cluster_id="c1", wall_s=world.wall_s, **bounds)
    world.core = RecordedCore(world.core, log)
    for _ in range(steps):
        random_step(world)
    log.close()
    return world


def recorded_deploys(folder: Path) -> None:
    """Six apps of three runners with one GPU each, on machines that have just so many; then some of their life."""
    world = World(Random(1), nodes=6)
    log = DecisionLog(folder, cluster_id="c1", wall_s=world.wall_s)
    world.core = RecordedCore(world.core, log)
    for at in range(6):
        spec, digest = spec_of(gpus=1, least=3, tag=str(at))
        world.step(ApplyApp(f"default/app{at}", spec, digest))
    world.heal(rounds=12)
    log.close()


def replay_folder(folder: Path) -> Report:
    """Every log in a folder, done again."""
    return replay(segments(folder))


def _record(into: Path) -> None:
    """Both golden logs: a random history of the core, and the terms of one scheduler of a simulated cluster."""
    from sim.cluster import Profile, play

    decision_files._cpu = lambda: "x86_64"  # whoever recorded it is nobody's business
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recorded_world(GOLDEN_WORLD_SEED, root / "world", steps=GOLDEN_WORLD_STEPS)
        play(GOLDEN_PLAY_SEED, root, Profile(chaos_s=120.0))
        for kind, source in (
            ("world", root / "world"),
            ("play", root / f"seed-{GOLDEN_PLAY_SEED}" / "s0" / "decisions"),
        ):
            target = into / kind
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            for path in sorted(target.iterdir()):
                print(path.relative_to(into), path.stat().st_size, "bytes")


if __name__ == "__main__":
    _record(GOLDEN)
