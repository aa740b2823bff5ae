"""What placements taught: how long each part of a start takes, by kind of part, app and node. Pure; integers only.

    time of a part = line of its family (x) · ratio of its app · ratio of its node's pool · ratio of its node

A *family* is one kind of part ("weights/origin/HOST", "make/oci", "setup/disk/H100-80GB" …); its line is fitted through
the last POINTS_MAX points (`robust_line`), so that the first hosts and sizes predict the next ones. A *subject*
("app/…", "pool/…", "node/…") has the last RATIOS_MAX ratios of what it took over what the line and the other subjects
say, one after the other, and the line learns what the subjects leave (backfitting). The median of a subject's ratios
counts n²/(n²+1): one point moves it half the way, three nine tenths, and one outlier among many does not move it at
all. What is older than AGE_MAX_S is forgotten, and so are
the subjects that were heard longest ago beyond SUBJECTS_MAX.

Part of `State`; changed by `expectations` and at loading only. `log` names what changed, so that columns follow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Final

from fal_scheduler.core.robust_line import RobustLine, fit

POINTS_MAX: Final = 32
RATIOS_MAX: Final = 8
FAMILIES_MAX: Final = 1024
SUBJECTS_MAX: Final = 50_000  # of all families together
AGE_MAX_S: Final = 14 * 86_400
MILLI: Final = 1000
RATIO_MIN, RATIO_MAX = 50, 20_000  # thousandths: what is beyond is a mishap, not a property
LOG_MAX: Final = 8192

# Before anything was learnt, in milliseconds. x of "weights" is KiB to come, of "setup" KiB to load. Assumed, said so
# (`Learning.known`), on the slow side.
DEFAULTS: Final = {
    "rest": RobustLine(100),
    "image": RobustLine(0, 1_000_000),
    "weights": RobustLine(200, 40_960),  # the shape only: until the first point told rates count
    "make": RobustLine(200),
    "start": RobustLine(100),
    "setup": RobustLine(2000, 977),  # 1 GB/s
    "compile": RobustLine(60_000),
    "load": RobustLine(300, 977),  # of a model or LoRA into a live worker; x is KiB, 1 GB/s
    "tail": RobustLine(0, 1_000_000),
}


_TIERS_ALIKE: Final = {"setup": ("arrived", "disk", "memory")}
NO_LINE: Final = RobustLine(0)


@dataclass(slots=True)
class LearntFamily:
    """Points (x, y, Unix seconds) of a family's line and ratios (thousandths) of its subjects, oldest first."""

    points: tuple[tuple[int, int, int], ...] = ()
    line: RobustLine = NO_LINE
    ratios: dict[str, tuple[int, ...]] | None = None
    heard_s: dict[str, int] | None = None  # subject -> when it was heard last, in that order


class Learning:
    """All families of one cluster. `version` counts changes; the last are in `log` as (family, subject or "")."""

    def __init__(self) -> None:
        self.families: dict[str, LearntFamily] = {}
        self.subjects = 0
        self.version = 0
        self.log: deque[tuple[str, str]] = deque(maxlen=LOG_MAX)
        self.unsaved: dict[str, None] = {}  # "family", or "family|subject", in the order of their first change
        self.saved_at_s = 0.0  # monotonic
        self.swept_at_s = 0.0

    # --- asked ------------------------------------------------------------------------------------------------------

    def known(self, family: str) -> int:
        """Points that a family's line rests on; 0: it is assumed."""
        have = self.families.get(family)
        return len(have.points) if have is not None else 0

    def line(self, family: str) -> RobustLine:
        """A family's line; the nearest relative's where it has taught nothing; else what is assumed."""
        have = self.families.get(family)
        if have is None or not have.points:
            have = next((self.families[one] for one in _relatives(family) if self.known(one)), None)
        return have.line if have is not None else default_line(family)

    def ratio_milli(self, family: str, subject: str) -> int:
        """A subject's ratio, drawn towards 1 where few points are known."""
        have = self.families.get(family)
        ratios = have.ratios.get(subject) if have is not None and have.ratios else None
        return shrunk(ratios) if ratios else MILLI

    def at(self, family: str, x: int, subjects: Sequence[str]) -> int:
        """What a part will take. The same steps of integers as in `ready_at`'s columns."""
        y = self.line(family).at(x)
        for subject in subjects:
            y = y * self.ratio_milli(family, subject) // MILLI
        return y

    # --- told -------------------------------------------------------------------------------------------------------

    def learn(self, family: str, x: int, y: int, subjects: Sequence[str], *, wall_s: int) -> None:
        """A part took `y` at `x`, with these subjects, the widest first."""
        have = self._family(family)
        kept = [one for one in have.points if wall_s - one[2] <= AGE_MAX_S]
        plain = y  # as it would have been without what is known of these subjects
        for subject in subjects:
            plain = plain * MILLI // self.ratio_milli(family, subject)
        have.points = (*kept, (x, plain, wall_s))[-POINTS_MAX:]
        have.line = fit([(a, b) for a, b, _ in have.points], self._prior(family))
        self._changed(family, "")
        for subject in subjects:
            said = self.at(family, x, [other for other in subjects if other != subject])
            if said > 0:
                ratio = min(max(y * MILLI // said, RATIO_MIN), RATIO_MAX)
                self._add(family, have, subject, ratio, wall_s)

    # --- as it was saved --------------------------------------------------------------------------------------------

    def restore_line(self, family: str, points: Sequence[tuple[int, ...]]) -> None:
        """A family's points as an earlier leader had them; of a family that this release does not know: nothing."""
        if family.partition("/")[0] not in DEFAULTS:
            return
        have = self._family(family)
        have.points = tuple((x, y, at_s) for x, y, at_s in points)[-POINTS_MAX:]
        have.line = fit([(x, y) for x, y, _ in have.points], self._prior(family))
        self.version += 1
        self.log.append((family, ""))

    def restore_ratios(self, family: str, subject: str, ratios: Sequence[int], heard_s: int) -> None:
        """A subject's ratios; nothing where its family is not known."""
        have = self.families.get(family)
        if have is None or self.subjects >= SUBJECTS_MAX:
            return
        if have.ratios is None or have.heard_s is None:
            have.ratios, have.heard_s = {}, {}
        self.subjects += subject not in have.ratios
        have.ratios[subject], have.heard_s[subject] = tuple(ratios)[-RATIOS_MAX:], heard_s
        self.version += 1
        self.log.append((family, subject))

    # --- parts ------------------------------------------------------------------------------------------------------

    def _prior(self, family: str) -> RobustLine:
        """The shape of a line that its own points do not show yet."""
        nearest = next((self.families[one] for one in _relatives(family) if self.known(one)), None)
        return nearest.line if nearest is not None else default_line(family)

    def _family(self, family: str) -> LearntFamily:
        have = self.families.pop(family, None) or LearntFamily()
        self.families[family] = have  # the newest go to the end
        if len(self.families) > FAMILIES_MAX:
            oldest = next(iter(self.families))
            gone = self.families.pop(oldest)
            self.subjects -= len(gone.ratios or {})
            self._changed(oldest, "")
        return have

    def _add(self, family: str, have: LearntFamily, subject: str, ratio: int, wall_s: int) -> None:
        if have.ratios is None or have.heard_s is None:
            have.ratios, have.heard_s = {}, {}
        known = have.ratios.get(subject, ())
        if known and wall_s - have.heard_s[subject] > AGE_MAX_S:
            known = ()
        self.subjects += subject not in have.ratios
        have.ratios[subject] = (*known, ratio)[-RATIOS_MAX:]
        have.heard_s.pop(subject, None)
        have.heard_s[subject] = wall_s
        self._changed(family, subject)
        while self.subjects > SUBJECTS_MAX and len(have.ratios) > 1:
            oldest = next(iter(have.heard_s))
            del have.heard_s[oldest], have.ratios[oldest]
            self.subjects -= 1
            self._changed(family, oldest)

    def _changed(self, family: str, subject: str) -> None:
        self.version += 1
        self.log.append((family, subject))
        self.unsaved[f"{family}|{subject}" if subject else family] = None


def _relatives(family: str) -> list[str]:
    """Families whose times are most like this one's: the same part from another tier."""
    part, _, rest = family.partition("/")
    tier, bar, gpu = rest.partition("/")
    return [f"{part}/{other}{bar}{gpu}" for other in _TIERS_ALIKE.get(part, ()) if other != tier]


def default_line(family: str) -> RobustLine:
    """What is assumed of a family."""
    return DEFAULTS[family.partition("/")[0]]


def shrunk(ratios: Sequence[int]) -> int:
    """The median of ratios, as far as so many are believed: n² / (n² + 1) of the way from 1."""
    weight = len(ratios) ** 2
    return MILLI + (median_low(ratios) - MILLI) * weight // (weight + 1)


__all__ = [
    "AGE_MAX_S", "DEFAULTS", "MILLI", "POINTS_MAX", "RATIOS_MAX", "Learning", "LearntFamily", "default_line", "shrunk",
]  # fmt: skip
