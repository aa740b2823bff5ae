"""What the edges may ask of the engine, and how it is set up; sessions, dispatch and the APIs depend on this only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fal_scheduler.core.events import Command, Effect, News, NodeHello, Reply
from fal_scheduler.core.log_entries import Recorder
from fal_scheduler.core.records import Runner
from fal_scheduler.core.state import State

Listener = Callable[[Effect], None]


class EnginePort(Protocol):
    """What the edges may ask of the engine. All calls belong to the engine's loop."""

    async def submit(self, event: Command | NodeHello) -> Reply:
        """Do a command; durable when it returns. Raises what the command raises, or a retryable store error.

        A NodeHello is submitted too: when it returns, the term is above any that the node saw and the node's hold
        is decided, so that Welcome and Complete may be sent.
        """
        ...

    def offer(self, event: News) -> None:
        """Tell news; returns at once."""
        ...

    @property
    def view(self) -> State:
        """The state, to be read between awaits. The newest batch in it may still be on its way to the store."""
        ...

    def assignments(self, node_id: str) -> tuple[Runner, ...]:
        """The node's runners whose assignment is durable, in order of id; none while the node is held.

        Sessions build Complete from this, and a Delta's `put` from `assignment`.
        """
        ...

    def assignment(self, node_id: str, runner_id: str) -> Runner | None:
        """One of `assignments`, or None where it is not (any longer) one of them: a Delta's `drop`."""
        ...

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each effect after the commit that made it true; the result ends that.

        Listeners are called in order, on the loop, and must neither block nor raise.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`cluster_id`: the CA's. `events_dir`: for the event log and replay files; None keeps them in memory.

    `recorder`: makes what hears of all that changes the state (the decision log), one a start; None: nobody does.
    `strict`: a broken invariant ends the engine (tests) instead of freezing the objects named (production).
    """

    cluster_id: str
    events_dir: Path | None = None
    tick_s: float = 1.0
    audit_interval_s: float = 60.0
    strict: bool = False
    recorder: Callable[[], Recorder] | None = None
