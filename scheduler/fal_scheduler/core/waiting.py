"""What has no place waits in one order, and is woken by the change that could admit it. Pure.

There is no retry. An app whose runners have no node waits; apps that need the same (`need_of`: shape, filters, team)
are one class, in order. A class that found no place sleeps until something changes that could give it one: capacity
that grew on a node which could take it now (checked exactly), or a change that concerns everybody. Then its first is
tried; where that succeeds, the next. So a GPU that becomes free costs one look per class, not one per waiter.

The order is by priority with ageing: a waiter of priority p that began to wait at s stands at s - p * AGEING_S. That
never changes while it waits, and bounds every wait: a later one passes an earlier one only if it came within AGEING_S
seconds for each point of priority that it has more. Smaller ones may take what one in front cannot use; a node can be
kept free for one app (`State.reserved`), as `preemption` does.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from fal_contract.ids import team_of
from fal_scheduler.core.explain import takes
from fal_scheduler.core.quotas import refusal
from fal_scheduler.core.ranking import Ask
from fal_scheduler.core.records import Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Backoff
from fal_scheduler.core.waiting_line import QUOTA, Need, need_of, order_ms

LOOKS_PER_WAKE_MAX: Final = 20_000  # node and class pairs; beyond that every class is woken


def enter(state: State, app_id: str, spec: Spec, since_s: float) -> None:
    """The app has runners without a node, the oldest made at `since_s` (wall clock)."""
    state.waiting.put(app_id, need_of(spec, team_of(app_id)), order_ms(spec, since_s))


def wake(state: State) -> None:
    """Classes that what changed since the last step could admit are awake."""
    waiting = state.waiting
    if not state.settled:  # nothing is placed yet, and everybody is woken when it is
        state.freed.clear()
        return
    freed, state.freed = state.freed, {}
    everybody, state.freed_all = state.freed_all, False
    if not waiting or not (freed or everybody):
        return
    for node_id in freed:  # whom it is kept for need not be the first of its class
        owner = state.reserved.get(node_id, "")
        if owner in waiting:
            state.dirty[owner] = None
    if everybody or len(freed) * len(waiting.asleep) > LOOKS_PER_WAKE_MAX:
        state.awake.update(dict.fromkeys(waiting.by_need))
        waiting.asleep.clear()
        return
    for need, why in list(waiting.asleep.items()):
        app_id = waiting.by_need[need][0][1]
        if why == QUOTA or any(_takes(state, node_id, app_id) for node_id in freed):
            del waiting.asleep[need]
            state.awake[need] = None


def tick(state: State) -> None:
    """Who waits for a quota may borrow again: an owner found its place, gave up, or waits for what no node has."""
    waiting = state.waiting
    for need in [need for need, why in waiting.asleep.items() if why == QUOTA]:
        app = state.apps.get(waiting.by_need[need][0][1])
        if app is None or not refusal(state, team_of(app.id), state.revision_of(app).spec):
            del waiting.asleep[need]
            state.awake[need] = None


def _takes(state: State, node_id: str, app_id: str) -> bool:
    app = state.apps.get(app_id)
    if app is None:
        return True  # reconcile finds out
    spec = state.revision_of(app).spec
    ask = Ask(app_id, team_of(app_id), avoid=reserved_for_others(state, app_id))
    return takes(state, node_id, spec, ask)


def turns(state: State) -> Iterator[str]:
    """Apps of the classes that are awake, in order, each once; of a class only until one finds no place.

    A class is not awake any more when all of its apps had their turn, or when it sleeps again.
    """
    waiting = state.waiting
    needs = list(state.awake)
    heap = [(waiting.by_need[need][0], at) for at, need in enumerate(needs) if need in waiting.by_need]
    heapq.heapify(heap)
    for need in needs:
        if need not in waiting.by_need:
            state.awake.pop(need, None)
    while heap:
        order, at = heapq.heappop(heap)
        need = needs[at]
        if need not in waiting.asleep and waiting.apps.get(order[1], ((), ()))[1] == order:
            yield order[1]
        line = waiting.by_need.get(need, [])
        after = bisect_right(line, order)
        if need in waiting.asleep or after == len(line):
            state.awake.pop(need, None)
        else:
            heapq.heappush(heap, (line[after], at))


def backoff_of(state: State, app_id: str, revision: int, now_s: float) -> Backoff | None:
    """The app's backoff while it lasts. Failures of a revision that takes over do not hold up the one that serves."""
    backoff = state.backoffs.get(app_id)
    if backoff is None or now_s >= backoff.until_s:
        return None
    app = state.apps.get(app_id)
    rolling = app is not None and app.rollout is not None
    return None if rolling and backoff.last.revision not in (0, revision) else backoff


def first_able(state: State, need: Need, now_s: float) -> str:
    """The first app of a class that could start now; empty where all wait for a backoff, or the class has gone."""
    for _, app_id in state.waiting.by_need.get(need, ()):
        app = state.apps.get(app_id)
        if app is not None and backoff_of(state, app_id, app.revision, now_s) is None:
            return app_id
    return ""


def reserved_for_others(state: State, app_id: str) -> frozenset[str]:
    """Nodes that are kept free for other apps."""
    return frozenset(node_id for node_id, owner in state.reserved.items() if owner != app_id)
