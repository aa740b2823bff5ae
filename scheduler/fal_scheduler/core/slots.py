"""The slot book: who holds the right to send how many requests at once to which runner. Pure.

Invariant: within one term the slots leased of a runner never exceed its capacity (`max_multiplexing`). A lease
ends by return, by expiry or by revocation, never by silence of its gateway alone: a gateway whose stream broke may
be serving with it. The node's proxy stays the authority on admission, so that leases of an older term, which this
book may not know, can overlap with its own without harm.

The book is leader-local: it is never stored, and a new leader learns what gateways still hold from their hellos.
Called by `fal_scheduler.dispatch` on one event loop with readings of the monotonic clock; must not read a clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from fal_contract.limits import LEASE_TTL_S
from fal_scheduler.core.dispatch_order import DispatchOrder, Settings, Waiting
from fal_scheduler.core.slot_records import Held, Key, Lease, SlotRunner, Want, joined

K = TypeVar("K", bound=Hashable)
_Asking = tuple[int, bool, int, str, Key, int]  # -level, cold, slots held, gateway, what, slots wanted

# The gateway counts its seconds from the arrival of the lease, we count from the grant: the book waits longer, so
# that no slot is given to a second gateway while the first still believes in it.
LEASE_GRACE_S: Final = 2.0


class SlotBook:
    """All leases of one term."""

    def __init__(self, term: int, *, ttl_s: float = LEASE_TTL_S, settings: Settings | None = None) -> None:
        self.term = term
        self.ttl_s = ttl_s
        self._order = DispatchOrder(settings)
        self._runners: dict[str, SlotRunner] = {}
        self._leases: dict[str, Lease] = {}
        self._leased: dict[str, int] = {}  # runner id -> slots out
        self._of_runner: dict[str, set[str]] = {}  # runner id -> lease ids
        self._open: dict[str, set[str]] = {}  # app -> runners with a free slot
        self._count: dict[str, int] = {}  # app -> runners
        self._shared: dict[str, None] = {}  # runners of several apps
        self._wants: dict[str, dict[Key, Want]] = {}  # gateway -> what is still unmet
        self._held: dict[tuple[str, str], int] = {}  # (app, gateway) -> slots
        self._next = 0

    # -- runners

    def put_runner(self, runner: SlotRunner) -> list[Lease]:
        """Make a runner known or change it; returns leases revoked because its capacity shrank."""
        old = self._runners.get(runner.id)
        if old == runner:
            return []
        revoked = []
        if old is not None:
            self._close(old)
        self._runners[runner.id] = runner
        for app in runner.serves:
            _add(self._count, app, 1)
        if runner.apps:
            self._shared[runner.id] = None
        for lease in sorted(self._of(runner.id), key=lambda x: (x.expires_at_s, x.id), reverse=True):
            # An app that the runner serves no more loses its slots; others do where there are too many.
            if self._leased.get(runner.id, 0) > runner.capacity or lease.app not in runner.serves:
                revoked.append(self._drop(lease))
        self._reopen(runner.id)
        return revoked

    def remove_runner(self, runner_id: str) -> list[Lease]:
        """Forget a runner that is gone or draining; returns its leases, all revoked. Requests under way go on."""
        runner = self._runners.get(runner_id)
        if runner is None:
            return []
        revoked = [self._drop(lease) for lease in sorted(self._of(runner_id), key=lambda x: x.id)]
        self._close(runner)
        del self._runners[runner_id]
        return revoked

    def _close(self, runner: SlotRunner) -> None:
        """Take the runner out of what is kept by app."""
        for app in runner.serves:
            _add(self._count, app, -1)
            self._shut(runner.id, app)
        self._shared.pop(runner.id, None)

    def runners(self, app: str) -> int:
        """How many runners of the app requests may be sent to."""
        return self._count.get(app, 0)

    def held(self, app: str, gateway: str) -> int:
        """Slots of an app that a gateway holds."""
        return self._held.get((app, gateway), 0)

    def app_of(self, lease_id: str) -> str:
        """The app of a lease; empty where the book knows neither."""
        lease = self._leases.get(lease_id)
        return lease.app if lease is not None else ""

    # -- gateways

    def take_over(self, gateway: str, held: Iterable[Held], now_s: float) -> tuple[list[Lease], list[str]]:
        """What a gateway still holds: (leases that go on, ids that it must forget).

        A lease that the book knows goes on. One that it does not know (of an earlier term, or forgotten) goes on
        with as many of its slots as are free, in this term. Leases that the gateway does not name are returned.
        """
        named = {entry.lease_id: entry for entry in held}
        for lease in [x for x in self._leases.values() if x.gateway == gateway and x.id not in named]:
            self._drop(lease)
        kept: list[Lease] = []
        gone: list[str] = []
        for entry in named.values():
            known = self._leases.get(entry.lease_id)
            if known is not None and known.gateway == gateway and known.runner_id == entry.runner_id:
                kept.append(self._put(replace(known, expires_at_s=self._expiry(now_s))))
                continue
            slots = min(entry.slots, self._free(entry.runner_id))
            if known is not None or slots <= 0:
                gone.append(entry.lease_id)
                continue
            app = self._runners[entry.runner_id].app  # gateways do not tell for which of its apps they took it
            kept.append(
                self._put(Lease(entry.lease_id, entry.runner_id, gateway, slots, self.term, self._expiry(now_s), app))
            )
        return kept, gone

    def want(self, gateway: str, wants: Sequence[Want]) -> None:
        """Replace the gateway's list of wants; those for one app, model and LoRA are taken together."""
        table: dict[Key, Want] = {}
        for want in wants:
            key = want.key
            have = table.get(key)
            if want.slots > 0:
                table[key] = joined(have, want) if have else want
        if table:
            self._wants[gateway] = table
        else:
            self._wants.pop(gateway, None)

    def unmet(self, gateway: str) -> list[Want]:
        """The gateway's wants that no slot was found for yet."""
        return [want for _, want in sorted(self._wants.get(gateway, {}).items())]

    def close(self, gateway: str) -> None:
        """The gateway's stream ended: it wants nothing more. Its leases stay until they expire or it comes back."""
        self._wants.pop(gateway, None)

    # -- leases

    def give_back(self, gateway: str, lease_id: str, slots: int) -> None:
        """Return `slots` slots of a lease; at none left it is gone. News of a lease that is gone is ignored."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.gateway != gateway or slots <= 0:
            return
        if slots >= lease.slots:
            self._drop(lease)
        else:
            self._put(replace(lease, slots=lease.slots - slots))

    def renew(self, gateway: str, lease_id: str, now_s: float) -> Lease | None:
        """Prolong a lease; None when the gateway must forget it."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.gateway != gateway:
            return None
        return self._put(replace(lease, expires_at_s=self._expiry(now_s)))

    def expire(self, now_s: float) -> list[Lease]:
        """Take back what nobody renewed."""
        dead = sorted((x for x in self._leases.values() if x.expires_at_s <= now_s), key=lambda x: x.id)
        return [self._drop(lease) for lease in dead]

    def grant(self, now_s: float) -> list[Lease]:
        """Meet wants from free slots; new leases only, one for each gateway, runner and app.

        Order: who waited too long, then higher priority (`dispatch_order`); apps and teams that share runners in turn;
        what finds its model loaded; the gateway with fewest slots of the app; gateway id. Runner: one with the wanted
        model loaded, then the idlest, then runner id. Both orders are total, so that a replay is exact.
        """
        by_app: dict[str, list[tuple[str, Want]]] = {}
        for gateway, table in self._wants.items():
            for want in table.values():
                if self._open.get(want.app):
                    by_app.setdefault(want.app, []).append((gateway, want))
        granted: list[Lease] = []
        for apps in self._pools(sorted(by_app)):
            granted.extend(self._grant_pool({app: by_app[app] for app in apps}, now_s))
        return granted

    def _pools(self, apps: list[str]) -> list[list[str]]:
        """Apps by the runners that they share, each list and all of them in order."""
        first = {app: app for app in apps}
        for runner_id in self._shared:
            among = [first[app] for app in self._runners[runner_id].serves if app in first]
            if len(among) > 1:
                first = {app: min(among) if head in among else head for app, head in first.items()}
        pools: dict[str, list[str]] = {}
        for app, head in first.items():
            pools.setdefault(head, []).append(app)
        return [pools[head] for head in sorted(pools)]

    def _grant_pool(self, asking: dict[str, list[tuple[str, Want]]], now_s: float) -> list[Lease]:
        parts: dict[tuple[str, str, str], int] = {}
        extra: dict[str, int] = {}  # slots given in this pass, per runner
        given: dict[tuple[str, Key], int] = {}  # and per gateway and what was wanted
        idle = self._runner_heaps(want.key for wants in asking.values() for _, want in wants)
        queues = {app: self._queue(asking[app], now_s) for app in asking}
        app = next(iter(asking))
        shared = len(asking) > 1
        while queues:
            if shared:
                app = self._next_app(queues)
            queue = queues[app]
            level, cold, has, gateway, key, left = queue[0]
            runners = idle[key]
            runner_id = self._idlest(runners, extra)
            if runner_id is None:  # every heap of an app holds all its runners
                del queues[app]
                continue
            if runners[0][0] and not cold:  # nothing free has this model (any more): first those who need no load
                heapq.heapreplace(queue, (level, True, has, gateway, key, left))
                continue
            extra[runner_id] = extra.get(runner_id, 0) + 1
            part, want = (gateway, runner_id, app), (gateway, key)
            parts[part] = parts.get(part, 0) + 1
            given[want] = given.get(want, 0) + 1
            if shared:
                self._order.shares.backlogged((_team(x), x) for x in queues)
                self._order.shares.charge(_team(app), app, 1, self._order.learnt.service_ms(key[1]))
            if left > 1:
                heapq.heapreplace(queue, (level, cold, has + 1, gateway, key, left - 1))
            else:
                heapq.heappop(queue)
                if not queue:
                    del queues[app]
        for (gateway, key), slots in given.items():
            self._lower(gateway, key, slots)
        expiry_s = self._expiry(now_s)
        return [
            self._put(Lease(self._new_id(), runner_id, gateway, slots, self.term, expiry_s, app))
            for (gateway, runner_id, app), slots in parts.items()
        ]

    def _queue(self, asking: list[tuple[str, Want]], now_s: float) -> list[_Asking]:
        queue = [(-self._level(w, now_s), False, self._held.get((w.app, g), 0), g, w.key, w.slots) for g, w in asking]
        heapq.heapify(queue)
        return queue

    def _next_app(self, queues: dict[str, list[_Asking]]) -> str:
        if len(queues) == 1:
            return next(iter(queues))
        return min(queues, key=lambda app: (queues[app][0][0], *self._order.shares.rank(_team(app), app), app))

    def _level(self, want: Want, now_s: float) -> int:
        if want.since_s is None:
            return want.priority
        age_ms = max(0, int((now_s - want.since_s) * 1000))
        count = max(1, want.queued)
        return self._order.level(Waiting("", _team(want.app), want.app, want.model, want.priority, count, age_ms))

    def _runner_heaps(self, keys: Iterable[Key]) -> dict[Key, list[tuple[bool, int, str]]]:
        """For each app and model the open runners, resident model first, then the idlest; LoRAs share one heap."""
        heaps: dict[tuple[str, str], list[tuple[bool, int, str]]] = {}
        found = {}
        for key in keys:
            app, model, _ = key
            heap = heaps.get((app, model))
            if heap is None:
                heap = heaps[app, model] = []
                for runner_id in self._open[app]:
                    cold = bool(model) and model not in self._runners[runner_id].resident
                    heap.append((cold, self._leased.get(runner_id, 0), runner_id))
                heapq.heapify(heap)
            found[key] = heap
        return found

    def _idlest(self, heap: list[tuple[bool, int, str]], extra: dict[str, int]) -> str | None:
        """The first runner with a free slot; entries that this pass has outdated are put in order again."""
        while heap:
            cold, leased, runner_id = heap[0]
            now = self._leased.get(runner_id, 0) + extra.get(runner_id, 0)
            if now >= self._runners[runner_id].capacity:
                heapq.heappop(heap)
            elif now != leased:
                heapq.heapreplace(heap, (cold, now, runner_id))
            else:
                return runner_id
        return None

    def _lower(self, gateway: str, key: Key, slots: int) -> None:
        """So many slots less are wanted."""
        table = self._wants[gateway]
        want = table[key]
        if want.slots > slots:
            table[key] = replace(want, slots=want.slots - slots)
            return
        del table[key]
        if not table:
            del self._wants[gateway]

    # -- what is there

    def leases(self) -> tuple[Lease, ...]:
        """All leases, in order of id."""
        return tuple(sorted(self._leases.values(), key=lambda x: x.id))

    def runner(self, runner_id: str) -> SlotRunner | None:
        """The runner, if requests may be sent to it."""
        return self._runners.get(runner_id)

    def leased(self, runner_id: str) -> int:
        """Slots of a runner that are out."""
        return self._leased.get(runner_id, 0)

    # -- bookkeeping: every lease goes in by _put and out by _drop

    def _put(self, lease: Lease) -> Lease:
        old = self._leases.get(lease.id)
        self._leases[lease.id] = lease
        self._of_runner.setdefault(lease.runner_id, set()).add(lease.id)
        self._count_slots(lease, lease.slots - (old.slots if old else 0))
        return lease

    def _drop(self, lease: Lease) -> Lease:
        del self._leases[lease.id]
        ids = self._of_runner[lease.runner_id]
        ids.discard(lease.id)
        if not ids:
            del self._of_runner[lease.runner_id]
        self._count_slots(lease, -lease.slots)
        return lease

    def _count_slots(self, lease: Lease, change: int) -> None:
        if not change:
            return
        _add(self._leased, lease.runner_id, change)
        _add(self._held, (lease.app, lease.gateway), change)
        self._reopen(lease.runner_id)

    def _reopen(self, runner_id: str) -> None:
        """Keep the index of runners with a free slot."""
        runner = self._runners[runner_id]
        free = self._free(runner_id) > 0
        for app in runner.serves:
            if free:
                self._open.setdefault(app, set()).add(runner_id)
            else:
                self._shut(runner_id, app)

    def _shut(self, runner_id: str, app: str) -> None:
        if app in self._open:
            self._open[app].discard(runner_id)
            if not self._open[app]:
                del self._open[app]

    def _free(self, runner_id: str) -> int:
        runner = self._runners.get(runner_id)
        return runner.capacity - self._leased.get(runner_id, 0) if runner else 0

    def _of(self, runner_id: str) -> list[Lease]:
        return [self._leases[x] for x in self._of_runner.get(runner_id, ())]

    def _expiry(self, now_s: float) -> float:
        return now_s + self.ttl_s + LEASE_GRACE_S

    def _new_id(self) -> str:
        self._next += 1
        return f"{self.term}-{self._next:08d}"


def _team(app: str) -> str:
    return app.partition("/")[0]


def _add(table: dict[K, int], key: K, change: int) -> None:
    value = table.get(key, 0) + change
    if value:
        table[key] = value
    else:
        table.pop(key, None)


__all__ = ["LEASE_GRACE_S", "Held", "Lease", "SlotBook", "SlotRunner", "Want"]
