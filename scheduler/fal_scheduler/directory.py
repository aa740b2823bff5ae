"""Who leads and who stands by: tells the store that we are up, asks it who else is, keeps what standbys answer.

Runs beside the leader module in every scheduler, leading or not. Each look is one read of the store; while nobody is
known to lead it looks more often. Must not decide who leads: the store does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.limits import ANNOUNCE_S
from fal_contract.telemetry import get_logger
from fal_contract.v1 import schedulers_pb2 as pb
from fal_scheduler.leadership import CurrentLeadership
from fal_scheduler.store.interface import Member, Roster, Store

LOOK_S: Final = 1.0
LOOK_WITHOUT_LEADER_S: Final = 0.25
_log = get_logger("scheduler.directory")


class Directory:
    """One scheduler's view of all. `own`: what is told of it; read at each announcement."""

    def __init__(self, store: Store, current: CurrentLeadership, clock: Clock, own: Callable[[], Member]) -> None:
        self._store = store
        self._current = current
        self._clock = clock
        self._own = own
        self._roster = Roster("", 0, ())
        self._trouble = "the store has not been asked yet"
        self._announced_s = float("-inf")
        self.found = asyncio.Event()  # set once somebody was known to lead
        self.manifests: Callable[[], tuple[int, bool]] = lambda: (0, False)  # a standby's copies

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except FalError as error:
                if str(error) != self._trouble:
                    _log.warning("roster_unknown", message=str(error))
                self._trouble = str(error)
                self._current.lose_sight()
            except Exception as error:  # a mistake in what only informs must not end a leader
                _log.exception("roster_failed")
                self._trouble = repr(error)
                self._current.lose_sight()
            await asyncio.sleep(LOOK_S if self.knows_leader else LOOK_WITHOUT_LEADER_S)

    async def look(self) -> None:
        """Once. Raises FalError where the store does not answer."""
        now_s = self._clock.monotonic_s()
        if now_s - self._announced_s >= ANNOUNCE_S:
            await self._store.announce(self._own())
            self._announced_s = now_s
        self._roster = await self._store.roster()
        self._trouble = ""
        if self._roster.leader:
            self.found.set()
        self._current.see(self.leader_addresses)

    @property
    def knows_leader(self) -> bool:
        """Whether somebody is known to lead."""
        return self._current.leads or self._roster.leader not in ("", self._own().name)

    @property
    def leader_addresses(self) -> tuple[str, ...]:
        """Where the leader listens, if it is another."""
        own = self._own()
        return () if self._roster.leader == own.name else self._roster.addresses_of(self._roster.leader)

    def view(self, cluster_id: str) -> pb.LeaderView:
        """As `GetLeader` answers."""
        own, roster = self._own(), self._roster
        leads = self._current.get() if self._current.leads else None
        said = roster.leader if roster.leader != own.name else ""  # we lead no longer, whatever the last look said
        leader = own.name if leads is not None else said
        members = {one.name: one for one in (*roster.members, own)}
        if leader and leader not in members:
            members[leader] = Member(leader)
        kept, complete = (0, True) if leads is not None else self.manifests()
        term_began_s = 0.0
        if leads is not None:
            term_began_s = self._clock.wall_s() - (self._clock.monotonic_s() - leads.view.term_began_s)
        return pb.LeaderView(
            cluster_id=cluster_id,
            term=leads.view.term if leads is not None else roster.term,
            since_s=term_began_s,
            schedulers=[
                pb.SchedulerView(
                    name=one.name,
                    addresses=one.addresses,
                    started_at_s=one.started_at_s,
                    software=one.software,
                    leads=one.name == leader,
                    answers=one.name == own.name,
                )
                for one in sorted(members.values(), key=lambda one: (one.name != leader, one.name))
            ],
            store=self._store.name,
            trouble=self._trouble,
            manifests=kept,
            manifests_complete=complete,
        )


__all__ = ["Directory"]
