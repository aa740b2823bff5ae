"""What a proxy process has done since it began, for dashboards. Pure.

Told to the agent with the other counters and exported by it (`fal_agent.proxy_metrics`). A successor begins at 0, as
every counter may.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class Tally:
    """`ended`: requests by outcome; `refused`: by code; `counts`: of requests in each of the buckets that end at
    `BOUNDS_S`, and above; `seconds`: of all together; bytes of bodies from clients, and of answers to them."""

    ended: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0

    def end(self, outcome: str, seconds: float) -> None:
        """An admitted request ended after so long."""
        self.ended[outcome] = self.ended.get(outcome, 0) + 1
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def refuse(self, code: str) -> None:
        """A request was not admitted."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def to_wire(self) -> dict[str, object]:
        """For a control message."""
        return {
            "ended": self.ended,
            "refused": self.refused,
            "counts": self.counts,
            "seconds": self.seconds,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }

    @classmethod
    def from_wire(cls, raw: Mapping[str, Any]) -> Tally:
        """The other side of `to_wire`; of another release with other buckets, no requests are counted in any."""
        counts = list(raw.get("counts", ()))
        return cls(
            dict(raw.get("ended", {})),
            dict(raw.get("refused", {})),
            counts if len(counts) == len(BOUNDS_S) + 1 else [0] * (len(BOUNDS_S) + 1),
            float(raw.get("seconds", 0.0)),
            int(raw.get("bytes_in", 0)),
            int(raw.get("bytes_out", 0)),
        )


__all__ = ["BOUNDS_S", "Tally"]
