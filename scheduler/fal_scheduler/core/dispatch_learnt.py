"""Arrival rates, service times and load times per model, as a dispatch order learns them from what happened. Pure.

Arrivals are counted with three half-lives: a burst of seconds says what comes while a model loads, minutes say what is
asked for now, hours say what will be asked for again. Service times are learnt per model and per size class in it (what
a request tells of its work: steps, images); a class leans on its model's mean until it has been seen often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MICRO: Final = 1_000_000
SERVICE_MS: Final = 30_000  # expected before anything was served; then of a new model what all models take
SERVICES_HEEDED: Final = 20  # the mean over about so many of the last
SHRINK: Final = 4  # services that the mean of the model counts for in that of a size class
MODELS_MAX: Final = 10_000  # learnt about, and size classes of all; beyond, the one not asked for longest is forgotten


class Learnt:
    """What is expected of each model. `half_lives_ms`: of seconds, of minutes and of hours."""

    def __init__(self, load_ms: int, half_lives_ms: tuple[int, int, int]) -> None:
        self._load_ms = load_ms
        self._half_lives_ms = half_lives_ms
        self._arrivals: dict[str, tuple[int, tuple[int, ...]]] = {}  # model -> at ms, decayed counts in micro
        self._service: dict[str, tuple[int, int]] = {}  # model -> mean ms, of how many; "": of all models
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}  # the same of (model, size class)
        self._load: dict[str, int] = {}

    def arrived(self, model: str, now_ms: int, count: int) -> None:
        """`count` requests for the model arrived."""
        decayed = tuple(self._count(model, now_ms, n) + count * MICRO for n in range(len(self._half_lives_ms)))
        self._arrivals.pop(model, None)  # to the end: the first is the one not asked for longest
        self._arrivals[model] = (now_ms, decayed)
        if len(self._arrivals) > MODELS_MAX:
            gone = next(iter(self._arrivals))
            del self._arrivals[gone]
            self._service.pop(gone, None)
            self._load.pop(gone, None)

    def served(self, model: str, took_ms: int, size: str) -> None:
        """One request of the model, of that size class ("": unknown), took so long, its wait not counted."""
        if model not in self._arrivals:
            return
        for name in (model, ""):
            self._service[name] = _learn(self._service.get(name), took_ms)
        if size:
            self._sizes[model, size] = _learn(self._sizes.pop((model, size), None), took_ms)
            if len(self._sizes) > MODELS_MAX:
                del self._sizes[next(iter(self._sizes))]

    def loaded(self, model: str, took_ms: int) -> None:
        """A load of the model took so long."""
        if model in self._arrivals:
            have = self._load.get(model)
            self._load[model] = took_ms if have is None else have + (took_ms - have) // 4

    def service_ms(self, model: str, size: str = "") -> int:
        """Expected service of one request."""
        mean = max(1, (self._service.get(model) or self._service.get("") or (SERVICE_MS, 0))[0])
        of_size = self._sizes.get((model, size)) if size else None
        if of_size is None:
            return mean
        return max(1, (of_size[0] * of_size[1] + mean * SHRINK) // (of_size[1] + SHRINK))

    def load_ms(self, model: str) -> int:
        """Expected load of the model."""
        return self._load.get(model, self._load_ms)

    def per_s_micro(self, model: str, now_ms: int, weights_milli: Sequence[int]) -> int:
        """Requests per second, times 10^6: the rates by each half-life, weighed."""
        rate = 0
        for n, weight in enumerate(weights_milli):
            if weight:
                rate += self._count(model, now_ms, n) * 693 // self._half_lives_ms[n] * weight // 1000
        return rate

    def worth_micro(self, model: str, copies: int, now_ms: int, weights_milli: Sequence[int]) -> int:
        """Requests per second, times 10^6, that only the last of so many copies can serve at once."""
        rate = self.per_s_micro(model, now_ms, weights_milli)
        offered = rate * self.service_ms(model) // 1000
        return rate * (erlang_b_micro(copies - 1, offered) - erlang_b_micro(copies, offered)) // MICRO

    def _count(self, model: str, now_ms: int, which: int) -> int:
        """What is left of the count: halved every half-life."""
        have = self._arrivals.get(model)
        if have is None:
            return 0
        half = self._half_lives_ms[which]
        halvings, rest = divmod(max(0, now_ms - have[0]), half)
        return (have[1][which] >> min(halvings, 64)) * _half_to_micro(rest * MICRO // half) // MICRO


def erlang_b_micro(servers: int, offered_micro: int) -> int:
    """The share of arrivals, times 10^6, that find all of `servers` busy at an offered load in erlang, times 10^6."""
    lost = MICRO
    for n in range(1, servers + 1):
        both = offered_micro * lost
        lost = both * MICRO // (n * MICRO * MICRO + both) if both else 0
    return lost


def _half_to_micro(x_micro: int) -> int:
    """(1/2)^x times 10^6, for 0 <= x < 1 in millionths; in integers, so the same everywhere.

    A cubic that is right to 10^-3 and has the true slope at 0: counts decay in many small steps, whose errors add up.
    """
    inner = 239_000 - 45_850 * x_micro // MICRO
    return MICRO - x_micro * (693_150 - x_micro * inner // MICRO) // MICRO


def _learn(have: tuple[int, int] | None, took_ms: int) -> tuple[int, int]:
    mean, count = have or (0, 0)
    count = min(count + 1, SERVICES_HEEDED)
    return mean + (max(1, took_ms) - mean) // count, count


__all__ = ["MICRO", "MODELS_MAX", "Learnt", "erlang_b_micro"]
