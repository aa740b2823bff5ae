"""A runner's counts over the lives of proxies: each begins again at 0 where it lost its own. Pure but for the clock."""

from __future__ import annotations

from dataclasses import replace

from fal_agent.ports import Usage
from fal_contract.clock import Clock


class UsageCount:
    """What the proxies told of one runner."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._usage = Usage()
        self._served_there = self._served_before = 0  # in the proxy that answers now, in those before it
        self._busy_there_s = self._busy_before_s = 0.0  # likewise
        self._at_s = clock.monotonic_s()

    def count(self, usage: Usage) -> bool:
        """New counts; True where requests began or ended."""
        if usage.served < self._served_there or usage.busy_s < self._busy_there_s:
            self._served_before += self._served_there
            self._busy_before_s += self._busy_there_s
        self._served_there, self._busy_there_s = usage.served, usage.busy_s
        usage = replace(usage, served=usage.served + self._served_before, busy_s=usage.busy_s + self._busy_before_s)
        changed = usage.in_flight != self._usage.in_flight or usage.served != self._usage.served
        self._usage, self._at_s = usage, self._clock.monotonic_s()
        return changed

    @property
    def now(self) -> Usage:
        """The counts, with the age of the last request as of now."""
        if self._usage.last_used_age_s < 0:
            return self._usage
        age_s = self._usage.last_used_age_s + self._clock.monotonic_s() - self._at_s
        return replace(self._usage, last_used_age_s=age_s)
