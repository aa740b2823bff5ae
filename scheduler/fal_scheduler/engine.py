"""The single writer: the interface that sessions and the APIs are built on (implementation follows in this module)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fal_scheduler.core.events import Command, Effect, News, NodeHello, Reply
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
