"""`falctl sim warm`: what keeping models by value saves on a trace. Pure but for reading the file and printing.

One node serves the trace; a request whose app has no runner any more (`--keep-alive` after its last one) is a cold
start and brings its model back: from memory at once, from disk at `--disk-gb-s`, else from the origin at
`--origin-gb-s`. Which requests are cold is the same for all policies, so that only what is kept differs:

- `nothing`: nothing is kept;
- `lru`: memory and disk keep what was used last, as a page cache and a plain cache do;
- `value`: the scheduler's own `chosen` fills the memory once a minute from what is on disk, the disk lets go of what
  is worth least as told every VALUES_EVERY_S, of those that nobody asks for what was used longest ago;
- `value, ahead`: and what the forecast expects is staged before it is asked for, within the scheduler's budget.

A model's size is not in the trace: it is drawn from SIZES_GIB by a hash of its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

from fal_contract.errors import invalid
from fal_contract.limits import STAGE_AHEAD_HORIZON_MAX_S, VALUES_EVERY_S
from fal_scheduler.core.forecast import MINUTE_S, Arrivals, foretold_runners
from fal_scheduler.core.keep_warm import GIB, value
from fal_scheduler.core.warm_tiers import STAGE_WORTH, Ahead, Keepable, chosen, room_for
from fal_scheduler.core.warm_worth import rounded
from fal_scheduler.sim.forecast import Request, read

SIZES_GIB: Final = (2, 4, 7, 12, 24)  # of checkpoints, small to large
_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second."""

    disk_bytes_s: int
    origin_bytes_s: int


@dataclass(slots=True)
class Outcome:
    """Of one policy within one budget. Of the cold starts: which tier had the model; `seconds` of bringing back."""

    policy: str
    memory_gib: int
    disk_gib: int
    cold_starts: int = 0
    from_memory: int = 0
    from_disk: int = 0
    seconds: float = 0.0
    saved_perc: float = 0.0
    staged_ahead_gib: int = 0
    changes: int = 0  # of what the memory keeps


def size_of(app: str) -> int:
    """Bytes of a model, by its name."""
    return SIZES_GIB[crc32(app.encode()) % len(SIZES_GIB)] * GIB


# --- policies -------------------------------------------------------------------------------------------------------


class Nothing:
    """Each start reads the origin."""

    name = "nothing"

    def __init__(self, memory_bytes: int, disk_bytes: int, rates: Rates) -> None:
        self.memory_bytes, self.disk_bytes, self.rates = memory_bytes, disk_bytes, rates
        self.outcome = Outcome(self.name, memory_bytes // GIB, disk_bytes // GIB)

    def look(self, now_s: float, asked: Mapping[str, int]) -> None:
        """A minute is over. `asked`: app -> millionths of a request per minute, none of them 0."""

    def start(self, app: str, now_s: float) -> float:
        """Seconds to bring the app's model back."""
        return size_of(app) / self.rates.origin_bytes_s

    def note(self, app: str, now_s: float) -> None:
        """A cold start."""
        self.outcome.cold_starts += 1
        self.outcome.seconds += self.start(app, now_s)


class Lru(Nothing):
    """Both tiers keep what was used last. Dicts in order of use."""

    name = "lru"

    def __init__(self, memory_bytes: int, disk_bytes: int, rates: Rates) -> None:
        super().__init__(memory_bytes, disk_bytes, rates)
        self.memory: dict[str, None] = {}
        self.disk: dict[str, None] = {}

    def start(self, app: str, now_s: float) -> float:
        """See Nothing."""
        seconds = size_of(app) / self.rates.origin_bytes_s
        if app in self.memory:
            self.outcome.from_memory += 1
            seconds = 0.0
        elif app in self.disk:
            self.outcome.from_disk += 1
            seconds = size_of(app) / self.rates.disk_bytes_s
        self._use(self.memory, app, self.memory_bytes)
        self._use(self.disk, app, self.disk_bytes)
        return seconds

    @staticmethod
    def _use(tier: dict[str, None], app: str, bytes_max: int) -> None:
        tier.pop(app, None)
        while tier and sum(map(size_of, tier)) + size_of(app) > bytes_max:
            del tier[next(iter(tier))]
        if size_of(app) <= bytes_max:
            tier[app] = None


class Valued(Nothing):
    """As the scheduler does. `disk`: app -> when it is whole there; in order of use."""

    name = "value"
    forecast = False

    def __init__(self, memory_bytes: int, disk_bytes: int, rates: Rates) -> None:
        super().__init__(memory_bytes, disk_bytes, rates)
        self.memory: dict[str, None] = {}
        self.disk: dict[str, float] = {}
        self.values: dict[str, int] = {}
        self.values_at_s = 0.0
        self.ahead = Ahead()

    def look(self, now_s: float, asked: Mapping[str, int]) -> None:
        """See Nothing."""
        if now_s - self.values_at_s >= VALUES_EVERY_S:
            self.values_at_s = now_s
            self.values = {app: rounded(value(rate, self._back_ms(app), size_of(app))) for app, rate in asked.items()}
        if self.forecast:
            self._stage(now_s, asked)
        found = [
            Keepable(app, size_of(app), asked.get(app, 0) * size_of(app) * _MS // self.rates.disk_bytes_s)
            for app, whole_s in self.disk.items()
            if whole_s <= now_s
        ]
        keep = dict.fromkeys(chosen(found, self.memory_bytes, self.memory))
        self.outcome.changes += keep.keys() != self.memory.keys()
        self.memory = keep

    def start(self, app: str, now_s: float) -> float:
        """See Nothing."""
        whole_s = self.disk.pop(app, None)
        if whole_s is None:
            seconds = size_of(app) / self.rates.origin_bytes_s
            self._put(app, now_s + seconds)
            return seconds
        self.disk[app] = whole_s
        if app in self.memory:
            self.outcome.from_memory += 1
            return 0.0
        if whole_s > now_s:
            return whole_s - now_s
        self.outcome.from_disk += 1
        return size_of(app) / self.rates.disk_bytes_s

    def _back_ms(self, app: str) -> int:
        return size_of(app) * _MS // self.rates.origin_bytes_s

    def _stage(self, now_s: float, asked: Mapping[str, int]) -> None:
        self.ahead.expire(now_s)
        for app, rate in sorted(asked.items(), key=lambda one: (-one[1], one[0])):
            back_ms = min(self._back_ms(app), int(STAGE_AHEAD_HORIZON_MAX_S) * _MS)
            if app in self.disk or not foretold_runners(rate, back_ms, 0, 1, STAGE_WORTH):
                continue
            others = [(size_of(one), asked.get(one, 0)) for one in self._free()]
            if not room_for(size_of(app), rate, self.disk_bytes - sum(map(size_of, self.disk)), others):
                continue
            if self.ahead.want(app, size_of(app), now_s, self.disk_bytes):
                self.outcome.staged_ahead_gib += size_of(app) // GIB
                self._put(app, now_s + self._back_ms(app) / _MS)

    def _free(self) -> list[str]:
        return [one for one in self.disk if one not in self.memory and one not in self.ahead.until_s]

    def _put(self, app: str, whole_s: float) -> None:
        """Bring it to the disk; what is wished there is pinned, of the rest what is worth least goes."""
        used = sum(map(size_of, self.disk))
        goes = sorted(self._free(), key=lambda one: self.values.get(one, 0))  # of equals what was used longest ago
        while goes and used + size_of(app) > self.disk_bytes:
            used -= size_of(goes[0])
            del self.disk[goes.pop(0)]
        if used + size_of(app) <= self.disk_bytes:
            self.disk[app] = whole_s


class ValuedAhead(Valued):
    """And by the forecast."""

    name = "value, ahead"
    forecast = True


POLICIES: Final = (Nothing, Lru, Valued, ValuedAhead)


# --- replay ---------------------------------------------------------------------------------------------------------


def outcomes_of(
    requests: Sequence[Request], budgets: Iterable[tuple[int, int]], rates: Rates, keep_alive_s: float
) -> list[Outcome]:
    """Each policy within each budget (GiB of memory, GiB of disk), in one pass over the trace."""
    nodes = [policy(memory * GIB, disk * GIB, rates) for memory, disk in budgets for policy in POLICIES]
    until_s: dict[str, float] = {}
    for minute_s, asked, came in _minutes(requests):
        for node in nodes:
            node.look(minute_s, asked)
        for one in came:
            if one.at_s > until_s.get(one.app, -1.0):
                for node in nodes:
                    node.note(one.app, one.at_s)
            until_s[one.app] = max(until_s.get(one.app, 0.0), one.at_s + one.takes_s + keep_alive_s)
    worst_s = next(node.outcome.seconds for node in nodes if type(node) is Nothing)
    for node in nodes:
        node.outcome.saved_perc = 100 * (1 - node.outcome.seconds / worst_s) if worst_s else 0.0
    return [node.outcome for node in nodes]


def _minutes(requests: Sequence[Request]) -> Iterator[tuple[float, Mapping[str, int], list[Request]]]:
    """Each minute: what is known of arrivals at its begin, and the requests that come in it."""
    apps: dict[str, Arrivals] = {}
    at, minute_s = 0, requests[0].at_s // MINUTE_S * MINUTE_S
    while at < len(requests):
        asked: dict[str, int] = {}
        for app, arrivals in apps.items():
            arrivals.advance(minute_s)
            if (rate := max(arrivals.rate, arrivals.rate_at(minute_s + MINUTE_S))) > 0:
                asked[app] = rate
        first = at
        while at < len(requests) and requests[at].at_s < minute_s + MINUTE_S:
            apps.setdefault(requests[at].app, Arrivals()).note(1, requests[at].at_s)
            at += 1
        yield minute_s, asked, list(requests[first:at])
        minute_s += MINUTE_S


# --- the verb -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--trace", type=Path, required=True, help="CSV of requests, such as requests_nov.csv")
    parser.add_argument("--time-column", default="gmt_create", help="when it came, YYYY-MM-DD HH:MM:SS")
    parser.add_argument("--app-column", default="checkpoint_model_version_id", help="what was asked for")
    parser.add_argument("--seconds-column", default="exec_time_seconds", help="how long it took")
    parser.add_argument(
        "--budget", nargs="+", default=["32:128", "96:256"], help="GiB of memory and of disk, MEMORY:DISK, several"
    )
    parser.add_argument("--keep-alive", type=float, default=60.0, help="seconds that a runner stays")
    parser.add_argument("--disk-gb-s", type=float, default=1.0, help="what a start reads from disk")
    parser.add_argument("--origin-gb-s", type=float, default=0.1, help="what comes from the origin")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay and print."""
    budgets = [_budget(text) for text in args.budget]
    for option, rate in (("--disk-gb-s", args.disk_gb_s), ("--origin-gb-s", args.origin_gb_s)):
        if not 0 < rate <= 1000:
            raise invalid(option, rate, "is out of bounds", remedy="Give a rate above 0, up to 1000 GB/s.")
    if not 0 <= args.keep_alive <= 86_400:
        raise invalid("--keep-alive", args.keep_alive, "is out of bounds", remedy="Give seconds of a day.")
    rates = Rates(round(args.disk_gb_s * 1e9), round(args.origin_gb_s * 1e9))
    requests = read(args.trace, args.time_column, args.app_column, args.seconds_column)
    outcomes = outcomes_of(requests, budgets, rates, args.keep_alive)
    if args.json:
        print(json.dumps({"warm": {"requests": len(requests), "outcomes": [asdict(one) for one in outcomes]}}))
        return 0
    print(f"{len(requests)} requests, {outcomes[0].cold_starts} of them cold starts")
    heads = ("policy", "memory", "disk", "memory hits", "disk hits", "s a start", "saved", "staged", "changes")
    print("  ".join(f"{head:>12}" for head in heads))
    for one in outcomes:
        cold = max(1, one.cold_starts)
        cells = (
            one.policy, f"{one.memory_gib} GiB", f"{one.disk_gib} GiB", f"{100 * one.from_memory / cold:.1f} %",
            f"{100 * one.from_disk / cold:.1f} %", f"{one.seconds / cold:.2f}", f"{one.saved_perc:.1f} %",
            f"{one.staged_ahead_gib} GiB", str(one.changes),
        )  # fmt: skip
        print("  ".join(f"{cell:>12}" for cell in cells))
    return 0


def _budget(text: str) -> tuple[int, int]:
    memory, _, disk = text.partition(":")
    if not (memory.isdecimal() and disk.isdecimal() and len(text) < 20):
        raise invalid("--budget", text, "is not MEMORY:DISK in GiB", remedy="Give for instance 32:128.")
    return int(memory), int(disk)


__all__ = ["Outcome", "Rates", "add_arguments", "outcomes_of", "run", "size_of"]
