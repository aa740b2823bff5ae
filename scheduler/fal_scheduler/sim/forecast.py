"""`falctl sim forecast`: the scheduler's forecast on a trace of requests. Pure but for reading the file and printing.

Two questions, in the same run. How good is it: at each quarter of an hour the arrivals of each app in the next one are
foretold and compared with what came, beside naive forecasts (the same as in the last quarter; the mean so far). What is
it worth: each app is served alone by runners that take `--start-s` to be ready and stay `keep_alive`, with
and without the forecast, for several `keep_alive` and budgets; told are cold starts (requests that found no ready
runner) and GPU seconds, and for each forecast the keep_alive alone that would have avoided as many.

The trace is a CSV with a time, an app and the seconds that a request took. An app's runner serves all of its requests:
how many there must be at once is not the question here.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fal_contract.errors import invalid
from fal_scheduler.core.forecast import BIN_MINUTES, MICRO, MINUTE_S, Arrivals, foretold_runners

BIN_S: Final = BIN_MINUTES * MINUTE_S
REQUESTS_MAX: Final = 10_000_000
LONGEST_S: Final = 86_400.0
TAKES_S_MAX: Final = 1e9  # of one request
UNUSED_S: Final = 10.0
BUDGETS: Final = (0.5, 0.2, 0.1)  # requests that must be expected while a runner starts; 0.2 is the scheduler's


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the trace. `at_s`: Unix seconds."""

    at_s: float
    app: str
    takes_s: float


@dataclass(frozen=True, slots=True)
class Error:
    """How far a forecast was off, over all apps and quarters of an hour. In requests."""

    forecast: str
    mean_absolute: float
    root_mean_square: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What serving the trace came to. `avoided_perc`: cold starts, of those with the same keep_alive alone."""

    keep_alive_s: float
    worth: float  # requests expected while a runner starts that make the forecast start one; 0: no forecast
    cold_starts: int
    cold_perc: float
    gpu_seconds: int
    avoided_perc: float = 0.0
    extra_gpu_seconds: int = 0
    keep_alive_alone_gpu_seconds: int = 0  # of the shortest keep_alive that has as few cold starts; 0: none has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--trace", type=Path, required=True, help="CSV of requests, such as requests_nov.csv")
    parser.add_argument("--time-column", default="gmt_create", help="when it came, YYYY-MM-DD HH:MM:SS")
    parser.add_argument("--app-column", default="checkpoint_model_version_id", help="what was asked for")
    parser.add_argument("--seconds-column", default="exec_time_seconds", help="how long it took")
    parser.add_argument("--start-s", type=float, default=30.0, help="from start to ready")
    parser.add_argument("--keep-alive", type=float, nargs="+", default=[60.0, 300.0], help="seconds, several")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if not 0 < args.start_s <= LONGEST_S:
        raise invalid("--start-s", args.start_s, "is out of bounds", remedy="Give seconds of a day, more than 0.")
    for one in args.keep_alive:
        if not 0 <= one <= LONGEST_S:
            raise invalid("--keep-alive", one, "is out of bounds", remedy="Give seconds of a day.")
    requests = read(args.trace, args.time_column, args.app_column, args.seconds_column)
    errors = errors_of(requests)
    outcomes = outcomes_of(requests, args.start_s, args.keep_alive)
    if args.json:
        told = {
            "requests": len(requests),
            "errors": [asdict(x) for x in errors],
            "served": [asdict(x) for x in outcomes],
        }
        print(json.dumps({"forecast": told}))
        return 0
    print(f"{len(requests)} requests of {len({one.app for one in requests})} apps")
    print(f"{'forecast of the next 15 minutes':34} {'mean abs. error':>16} {'root mean sq.':>14}")
    for error in errors:
        print(f"{error.forecast:34} {error.mean_absolute:16.3f} {error.root_mean_square:14.3f}")
    heads = ("keep_alive", "budget", "cold", "of all", "GPU h", "avoided", "extra GPU h", "keep_alive alone, GPU h")
    print("  ".join(f"{head:>11}" for head in heads))
    for one in outcomes:
        cells = (
            f"{one.keep_alive_s:g} s", f"{one.worth:g}" if one.worth else "none", f"{one.cold_starts}",
            f"{one.cold_perc:.1f} %", f"{one.gpu_seconds / 3600:.1f}", f"{one.avoided_perc:.1f} %",
            f"{one.extra_gpu_seconds / 3600:.1f}",
            f"{one.keep_alive_alone_gpu_seconds / 3600:.1f}" if one.worth else "",
        )  # fmt: skip
        print("  ".join(f"{cell:>11}" for cell in cells))
    return 0


def read(file: Path, time_column: str, app_column: str, seconds_column: str) -> list[Request]:
    """The trace in order of time. Raises INVALID naming the line."""
    requests: list[Request] = []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            for option, column in (("time", time_column), ("app", app_column), ("seconds", seconds_column)):
                if reader.fieldnames and column not in reader.fieldnames:
                    what = f"has no column {column!r}"
                    raise invalid("--trace", str(file), what, remedy=f"Name the one that it has: --{option}-column.")
            for number, row in enumerate(reader, start=2):
                if len(requests) >= REQUESTS_MAX:
                    raise invalid("--trace", str(file), f"has more than {REQUESTS_MAX} requests", remedy="Cut it.")
                try:
                    requests.append(_request(row[time_column], row[app_column], row[seconds_column]))
                except ValueError as error:
                    what = f"is wrong in line {number}: {error}"
                    raise invalid("--trace", str(file), what, remedy="Correct the line, or name its columns.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise invalid("--trace", str(file), f"cannot be read: {error}", remedy="Name a CSV file.") from None
    if not requests:
        raise invalid("--trace", str(file), "holds no request", remedy="Name a trace with requests.")
    return sorted(requests, key=lambda one: (one.at_s, one.app))


def _request(time: str | None, app: str | None, seconds: str | None) -> Request:
    """One line's; a line that is too short lacks its last columns. ValueError: why it is none."""
    if time is None or app is None or seconds is None:
        raise ValueError("it is too short")
    takes_s = float(seconds or 0.0)
    if not 0.0 <= takes_s <= TAKES_S_MAX:
        raise ValueError(f"{seconds!r} is no number of seconds")
    return Request(datetime.strptime(time, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp(), app, takes_s)


# --- how good -------------------------------------------------------------------------------------------------------


def errors_of(requests: Sequence[Request]) -> list[Error]:
    """Ours beside naive ones, for each app from its first request on."""
    names = ("ours", "as in the last 15 minutes", "mean so far", "none come")
    absolute, squared, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    first_bin, last_bin = int(requests[0].at_s // BIN_S), int(requests[-1].at_s // BIN_S)
    for times in _by_app(requests).values():
        counts: dict[int, int] = {}
        for one in times:
            counts[int(one.at_s // BIN_S)] = counts.get(int(one.at_s // BIN_S), 0) + 1
        arrivals, seen, came, at = Arrivals(), 0, 0, 0
        for bin_ in range(max(first_bin, int(times[0].at_s // BIN_S)) + 1, last_bin + 1):
            while at < len(times) and times[at].at_s < bin_ * BIN_S:
                arrivals.note(1, times[at].at_s)
                at += 1
            arrivals.advance(bin_ * BIN_S)
            seen, came = seen + 1, came + counts.get(bin_ - 1, 0)
            actual = counts.get(bin_, 0)
            foretold = (arrivals.expected(bin_ * BIN_S, BIN_S) / MICRO, counts.get(bin_ - 1, 0), came / seen, 0.0)
            for name, value in zip(names, foretold, strict=True):
                absolute[name] += abs(value - actual)
                squared[name] += (value - actual) ** 2
            count += 1
    return [Error(name, absolute[name] / max(1, count), (squared[name] / max(1, count)) ** 0.5) for name in names]


def _by_app(requests: Iterable[Request]) -> Mapping[str, list[Request]]:
    apps: dict[str, list[Request]] = {}
    for one in requests:
        apps.setdefault(one.app, []).append(one)
    return apps


# --- what it is worth -----------------------------------------------------------------------------------------------


def outcomes_of(requests: Sequence[Request], start_s: float, keep_alives: Sequence[float]) -> list[Outcome]:
    """Each keep_alive alone and with the forecast; and what keep_alive alone would cost for the same."""
    apps, count = [_foretell(one, start_s) for one in _by_app(requests).values()], len(requests)
    found: list[Outcome] = []
    for keep_s in keep_alives:
        cold, busy_s = _all(apps, start_s, keep_s, 0.0)
        ladder = [_all(apps, start_s, one, 0.0) for one in _ladder(keep_s)]
        found.append(Outcome(keep_s, 0.0, cold, 100 * cold / count, round(busy_s)))
        for worth in BUDGETS:
            ours, ours_s = _all(apps, start_s, keep_s, worth)
            found.append(
                Outcome(
                    keep_alive_s=keep_s,
                    worth=worth,
                    cold_starts=ours,
                    cold_perc=100 * ours / count,
                    gpu_seconds=round(ours_s),
                    avoided_perc=100 * (cold - ours) / cold if cold else 0.0,
                    extra_gpu_seconds=round(ours_s - busy_s),
                    keep_alive_alone_gpu_seconds=round(next((cost for colds, cost in ladder if colds <= ours), 0.0)),
                )
            )
    return found


def _ladder(keep_s: float) -> Iterable[float]:
    """keep_alive in steps of a seventh, up to a day."""
    keep_s = max(1.0, keep_s)
    while keep_s < LONGEST_S:
        yield keep_s
        keep_s *= 1.15


@dataclass(frozen=True, slots=True)
class _App:
    """One app's requests, and the minutes in which the forecast may start a runner, with the rate then."""

    requests: Sequence[Request]
    minutes: Sequence[tuple[float, int]]


def _foretell(requests: Sequence[Request], start_s: float) -> _App:
    """What is foretold depends on the requests alone, so it is worked out once."""
    arrivals, minutes = Arrivals(), []
    at_s, least = requests[0].at_s, round(min(BUDGETS) * MICRO)
    for one in requests:
        while (at_s := at_s + MINUTE_S) < one.at_s:
            arrivals.advance(at_s)
            rate = arrivals.rate_at(at_s + start_s)
            if foretold_runners(rate, round(start_s * 1000), 0, 1, least):
                minutes.append((at_s, rate))
        at_s -= MINUTE_S
        arrivals.note(1, one.at_s)
    return _App(requests, minutes)


def _all(apps: Sequence[_App], start_s: float, keep_s: float, worth: float) -> tuple[int, float]:
    cold, busy_s = 0, 0.0
    for app in apps:
        one, seconds = _serve(app, start_s, keep_s, round(worth * MICRO))
        cold, busy_s = cold + one, busy_s + seconds
    return cold, busy_s


def _serve(app: _App, start_s: float, keep_s: float, worth: int) -> tuple[int, float]:
    """One app's requests: (without a ready runner, seconds that one was there). `worth` 0: no forecast."""
    cold, busy_s, at = 0, 0.0, 0
    from_s, ready_s, until_s = 0.0, 0.0, -1.0  # of the runner that is there, or was last
    minutes = app.minutes if worth else ()
    for one in app.requests:
        while at < len(minutes) and minutes[at][0] < one.at_s:
            look_s, rate = minutes[at]
            at += 1
            if not foretold_runners(rate, round(start_s * 1000), 0, 1, worth):
                continue
            if look_s > until_s:  # it is gone: start one ahead of need
                busy_s += max(0.0, until_s - from_s)
                from_s, ready_s = look_s, look_s + start_s
                until_s = ready_s + UNUSED_S
            until_s = max(until_s, look_s + MINUTE_S)
        if one.at_s > until_s:
            busy_s += max(0.0, until_s - from_s)
            from_s, ready_s = one.at_s, one.at_s + start_s
        cold += one.at_s < ready_s
        until_s = max(until_s, max(one.at_s, ready_s) + one.takes_s + keep_s)
    return cold, busy_s + until_s - from_s


__all__ = ["add_arguments", "errors_of", "outcomes_of", "read", "run"]
