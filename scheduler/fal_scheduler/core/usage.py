"""The usage ledger: GPU time and its price for every container, once, whoever leads. Pure.

A container's usage is a record named by its assignment. It is written with the very commit that ends the assignment,
from what its node told last, and every `USAGE_CHECKPOINT_S` while it runs, so that a node that dies for good takes
hours with it, not weeks. A record only ever grows: the same end told again, by another session or to another leader,
changes nothing. After two days ended records are folded into sums of a day, in one commit that takes them away, so
that nothing is counted twice; sums are kept for `USAGE_DAYS_KEPT`.

Counted is the time from the container's start to its end, times its GPUs, times the share that it holds of them
(billed from SETUP through TERMINATING, as fal does; PENDING and STAGING cost nothing). Busy is what its proxy saw a
request under way. The price is the pool's when the record is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from fal_contract.limits import (
    USAGE_CHECKPOINT_S,
    USAGE_DAYS_KEPT,
    USAGE_DETAILS_KEPT_S,
    USAGE_DETAILS_MAX,
    USAGE_ROWS_PER_PART_MAX,
)
from fal_scheduler.core.told import Health
from fal_scheduler.core.usage_records import Usage, UsageDay, UsageRow

if TYPE_CHECKING:
    from fal_scheduler.core.records import Runner
    from fal_scheduler.core.state import State
    from fal_scheduler.core.told import RunnerStatus
    from fal_scheduler.core.work import Work

FOLD_EVERY_S: Final = 60.0
FOLDED_AT_ONCE_MAX: Final = 40  # of one step
FOLDED_PARTS_MAX: Final = 20  # sums that one step changes: each is a write, and a commit holds 100, and 1 MiB
FOLDED_ROWS_MAX: Final = 4000  # of all these
FOLD_BESIDE_MAX: Final = 20  # changes that the step has made already
CHECKPOINTS_AT_ONCE_MAX: Final = 40
_DAY_S: Final = 86_400.0


def of_runner(state: State, runner: Runner, now_s: float, wall_s: float, *, ended: bool) -> Usage | None:
    """What `runner` used so far under its assignment; None before its container started, or if nothing was told."""
    assignment, status = runner.assignment, state.status_of(runner)
    if assignment is None or status is None or not status.started_at_s or status.assignment_id != assignment.id:
        return None
    node = state.nodes.get(runner.node)
    pool = state.pools.get(node.pool) if node is not None else None
    milli, count = runner.gpu_milli or 1000, len(runner.gpus)
    since_s = _since_told(state, runner, status, now_s, ended=ended)
    gpu_ms = round((status.gpu_seconds + since_s * count) * milli)
    until_s = wall_s
    if count:  # the ledger agrees with what the node counted, whatever its clock says
        until_s = min(wall_s, status.started_at_s + status.gpu_seconds / count + since_s)
    busy_s = status.busy_seconds + (since_s if status.in_flight else 0.0)
    busy_ms = round(min(busy_s, max(0.0, until_s - status.started_at_s)) * milli) * count
    return Usage(
        assignment.id,
        runner.app,
        runner.revision,
        runner.id,
        node.pool if node is not None else "",
        runner.node,
        _machine_type(state, runner),
        count,
        runner.gpu_milli,
        status.started_at_s,
        until_s,
        gpu_ms,
        min(gpu_ms, busy_ms),
        status.served,
        pool.gpu_hour_price_micros if pool is not None else 0,
        ended,
    )


def _since_told(state: State, runner: Runner, status: RunnerStatus, now_s: float, *, ended: bool) -> float:
    """Seconds that it ran on since its node told of it: a node tells what changes, and heartbeats that it lives."""
    live = state.live.get(runner.node)
    if live is None or status.ended:
        return 0.0
    speaks = live.health is Health.READY and not ended
    until_s = now_s if speaks else min(now_s, live.heard_at_s)
    return max(0.0, until_s - live.told_at_s.get(runner.id, until_s))


def _machine_type(state: State, runner: Runner) -> str:
    live = state.live.get(runner.node)
    if not runner.gpus or live is None or live.inventory is None:
        return ""
    return next((gpu.model for gpu in live.inventory.gpus if gpu.id == runner.gpus[0]), "")


def note_end(work: Work, runner: Runner) -> None:
    """The runner's assignment ends with this step: its usage is written in the same commit."""
    found = of_runner(work.state, runner, work.moment.now_s, work.moment.wall_s, ended=True)
    if found is not None:
        _grow(work, found)


def _grow(work: Work, found: Usage) -> None:
    """Keep what is more; the end of a container is kept, too."""
    have = work.state.usage.get(found.assignment)
    if have is not None:
        found = replace(
            found,
            app=have.app,  # of several that share a runner, the one it was written for first
            revision=have.revision,
            machine_type=found.machine_type or have.machine_type,
            until_s=max(found.until_s, have.until_s),
            gpu_ms=max(found.gpu_ms, have.gpu_ms),
            busy_gpu_ms=max(found.busy_gpu_ms, have.busy_gpu_ms),
            served=max(found.served, have.served),
            ended=found.ended or have.ended,
        )
    if found != have:
        work.put(found, have)


# --- by itself ------------------------------------------------------------------------------------------------------


def tick(work: Work) -> None:
    """Write down what has run for long; fold what ended long ago; forget what is older than the retention."""
    state, now_s = work.state, work.moment.now_s
    if now_s < state.usage_due_s or work.full:
        return
    state.usage_due_s = now_s + FOLD_EVERY_S
    if not state.grace_over:
        return  # nodes have not all told yet what they run
    _checkpoint(work)
    _fold(work)
    _forget(work)


def _checkpoint(work: Work) -> None:
    state, wall_s = work.state, work.moment.wall_s
    left = CHECKPOINTS_AT_ONCE_MAX
    for runner in list(state.runners.values()):
        if not left or work.full:
            state.usage_due_s = work.moment.now_s  # the next tick goes on
            return
        assignment = runner.assignment
        if assignment is None:
            continue
        have = state.usage.get(assignment.id)
        since_s = have.until_s if have is not None else _started(state, runner)
        if since_s and wall_s - since_s >= USAGE_CHECKPOINT_S:
            found = of_runner(state, runner, work.moment.now_s, wall_s, ended=False)
            if found is not None and found.until_s - since_s >= USAGE_CHECKPOINT_S / 2:  # a silent node tells nothing
                left -= 1
                _grow(work, found)


def _started(state: State, runner: Runner) -> float:
    status = state.status_of(runner)
    return status.started_at_s if status is not None else 0.0


def _fold(work: Work) -> None:
    """Records of containers that ended long ago become sums of their days."""
    state, wall_s = work.state, work.moment.wall_s
    ended = [one for one in state.usage.values() if one.ended]
    due = [one for one in ended if wall_s - one.until_s >= USAGE_DETAILS_KEPT_S]
    if len(ended) > USAGE_DETAILS_MAX:
        due = sorted(ended, key=lambda one: (one.until_s, one.assignment))[: len(ended) - USAGE_DETAILS_MAX]
    if not due:
        return
    if len(work.changes) > FOLD_BESIDE_MAX:
        state.usage_due_s = work.moment.now_s
        return
    sums: dict[tuple[str, tuple[str, str, str]], UsageRow] = {}
    parts: dict[tuple[str, int], int] = {}  # to be changed, with their rows
    left = len(due) > FOLDED_AT_ONCE_MAX
    for one in due[:FOLDED_AT_ONCE_MAX]:
        rest: Usage | None = one
        for day, row, after in _days(one):
            if not _room(state, parts, day, row):
                break
            have = sums.get((day, row.key))
            sums[day, row.key] = have.plus(row) if have is not None else row
            rest = after
        if rest is not None:  # another step has room for its other days
            left = True
            if rest != one:
                work.put(rest, one)
            break
        work.drop(one)
    if left:
        state.usage_due_s = work.moment.now_s
    for (day, _), row in sorted(sums.items()):
        _add(work, day, row)


def _days(usage: Usage) -> Iterator[tuple[str, UsageRow, Usage | None]]:
    """A container's usage on each day, as `by_day`, and what is left of its record after that day; None: nothing."""
    rows = list(by_day(usage))
    rest = usage
    for at, (day, row) in enumerate(rows):
        rest = replace(
            rest,
            started_at_s=_midnight_after(rest.started_at_s),
            gpu_ms=rest.gpu_ms - row.gpu_ms,
            busy_gpu_ms=rest.busy_gpu_ms - row.busy_gpu_ms,
            served=rest.served - row.served,
        )
        yield day, row, rest if at + 1 < len(rows) else None


def _room(state: State, parts: dict[tuple[str, int], int], day: str, row: UsageRow) -> bool:
    """Whether a step that changes `parts` may also add this row; notes the part that it goes to."""
    at, number = _part_of(state, day, row)
    if (day, number) in parts:
        return True
    size = len(at.rows) if at is not None else 0
    if parts and (len(parts) >= FOLDED_PARTS_MAX or sum(parts.values()) + size > FOLDED_ROWS_MAX):
        return False
    parts[day, number] = size
    return True


def _part_of(state: State, day: str, row: UsageRow) -> tuple[UsageDay | None, int]:
    """The part that has this row, else the first with room, else the number of another."""
    parts = [part for (name, _), part in state.usage_days.items() if name == day]
    parts.sort(key=lambda part: part.part)
    at = next((part for part in parts if any(one.key == row.key for one in part.rows)), None)
    at = at or next((part for part in parts if len(part.rows) < USAGE_ROWS_PER_PART_MAX), None)
    return at, at.part if at is not None else len(parts)


def _add(work: Work, day: str, row: UsageRow) -> None:
    at, number = _part_of(work.state, day, row)
    rows = {one.key: one for one in at.rows} if at is not None else {}
    rows[row.key] = rows[row.key].plus(row) if row.key in rows else row
    work.put(UsageDay(day, number, tuple(rows[key] for key in sorted(rows))), at)


def _forget(work: Work) -> None:
    oldest = day_of(work.moment.wall_s - USAGE_DAYS_KEPT * _DAY_S)
    for day in [part for (name, _), part in work.state.usage_days.items() if name < oldest]:
        if work.full:
            return
        work.drop(day)


# --- reading --------------------------------------------------------------------------------------------------------


def day_of(wall_s: float) -> str:
    """The day in UTC, "2026-11-21"."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d")


def by_day(usage: Usage) -> Iterator[tuple[str, UsageRow]]:
    """A container's usage on each day that it touched, by its share of the time; the sums are exact."""
    start_s, end_s = usage.started_at_s, max(usage.started_at_s, usage.until_s)
    edges = [start_s]
    while (next_s := _midnight_after(edges[-1])) < end_s:
        edges.append(next_s)
    edges.append(end_s)
    total_s, told = end_s - start_s, UsageRow(usage.app, usage.pool, usage.machine_type)
    for at in range(len(edges) - 1):
        upto = (edges[at + 1] - start_s) / total_s if total_s else 1.0
        last = at == len(edges) - 2
        row = _portion(usage, 1.0 if last else upto, runners=int(last))
        yield day_of(edges[at]), _minus(row, told)
        told = replace(row, runners=0)


def _portion(usage: Usage, share: float, *, runners: int = 0) -> UsageRow:
    return UsageRow(
        usage.app,
        usage.pool,
        usage.machine_type,
        round(usage.gpu_ms * share),
        round(usage.busy_gpu_ms * share),
        round(usage.served * share),
        round(usage.cost_micros * share),
        runners,
    )


def _minus(one: UsageRow, other: UsageRow) -> UsageRow:
    return replace(
        one,
        gpu_ms=one.gpu_ms - other.gpu_ms,
        busy_gpu_ms=one.busy_gpu_ms - other.busy_gpu_ms,
        served=one.served - other.served,
        cost_micros=one.cost_micros - other.cost_micros,
    )


def _midnight_after(wall_s: float) -> float:
    day = datetime.fromtimestamp(wall_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day + timedelta(days=1)).timestamp()


def between(usage: Usage, since_s: float, until_s: float) -> UsageRow | None:
    """What falls between two moments, by its share of the time; None where nothing does."""
    start_s, end_s = usage.started_at_s, max(usage.started_at_s, usage.until_s)
    low_s, high_s = max(start_s, since_s), min(end_s, until_s)
    if high_s < low_s or (high_s == low_s and end_s > start_s):
        return None
    total_s = end_s - start_s
    share = (high_s - low_s) / total_s if total_s else 1.0
    return _portion(usage, share, runners=1)


def running(state: State, now_s: float, wall_s: float) -> list[Usage]:
    """Of containers that run now."""
    found = []
    for runner in state.runners.values():
        usage = of_runner(state, runner, now_s, wall_s, ended=False)
        if usage is not None:
            found.append(usage)
    return found


def rows(state: State, *, since_s: float, until_s: float, now_s: float, wall_s: float) -> list[UsageRow]:
    """Sums by app, pool and machine type between two moments; folded days count whole.

    A record of a running container gives way to what its node tells now.
    """
    present = {one.assignment: one for one in running(state, now_s, wall_s)}
    details: Mapping[str, Usage] = {**state.usage, **present}
    parts = (between(one, since_s, until_s) for one in details.values())
    first, last = day_of(since_s), day_of(until_s)
    folded = (row for (day, _), part in state.usage_days.items() if first <= day <= last for row in part.rows)
    return summed([*(row for row in parts if row is not None), *folded])


def summed(found: Iterable[UsageRow]) -> list[UsageRow]:
    """One row a key, in order."""
    sums: dict[tuple[str, str, str], UsageRow] = {}
    for row in found:
        sums[row.key] = sums[row.key].plus(row) if row.key in sums else row
    return [sums[key] for key in sorted(sums)]
