"""The simulated network between agents and schedulers: delay, loss, repetition, reordering, partitions, broken streams.

A stream is ordered and whole, as TCP's is, unless `Weather` says otherwise: then single messages vanish, come twice or
overtake each other, which no real gRPC stream does and every receiver must survive. A partition is one-way or two-way:
what was sent waits (TCP repeats it), and after the keepalive's time the stream is broken at both ends. All from one
`Random`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Final

from fal_contract.errors import Code, FalError
from fal_contract.limits import KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S

KEEPALIVE_S: Final = float(KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S)


@dataclass(slots=True)
class Weather:
    """What happens to messages between two ends; shares from 0 to 1, seconds."""

    delay_min_s: float = 0.001
    delay_max_s: float = 0.05
    drop: float = 0.0
    duplicate: float = 0.0
    overtake: float = 0.0


CALM: Final = Weather()


class Network:
    """All lines. Ends are named by node or scheduler."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.weather: dict[frozenset[str], Weather] = {}
        self.blocked: dict[tuple[str, str], int] = {}  # direction -> how many partitions lie on it
        self.streams: dict[Stream, None] = {}
        self.delivered = 0

    def weather_of(self, a: str, b: str) -> Weather:
        """Between two ends, in either direction."""
        return self.weather.get(frozenset((a, b)), CALM)

    def reachable(self, a: str, b: str) -> bool:
        """Whether messages pass both ways."""
        return not self.blocked.get((a, b)) and not self.blocked.get((b, a))

    def block(self, *ways: tuple[str, str]) -> None:
        """Stop what goes these ways; streams across break when the keepalive notices."""
        loop = asyncio.get_running_loop()
        for way in ways:
            self.blocked[way] = self.blocked.get(way, 0) + 1
        pairs = {frozenset(way) for way in ways}
        for stream in self.streams:
            if frozenset((stream.node, stream.scheduler)) in pairs and stream.watch is None:
                stream.watch = loop.call_later(KEEPALIVE_S, self._keepalive, stream)

    def unblock(self, *ways: tuple[str, str]) -> None:
        """Heal; what waited goes on its way."""
        for way in ways:
            self.blocked[way] -= 1
            if not self.blocked[way]:
                del self.blocked[way]
        for stream in list(self.streams):
            if stream.watch is not None and self.reachable(stream.node, stream.scheduler):
                stream.watch.cancel()
                stream.watch = None
            stream.up.release()
            stream.down.release()

    def _keepalive(self, stream: Stream) -> None:
        stream.watch = None
        if not self.reachable(stream.node, stream.scheduler):
            stream.break_off("keepalive timed out")

    def streams_of(self, end: str) -> list[Stream]:
        """Open streams of a node or scheduler."""
        return [stream for stream in self.streams if end in (stream.node, stream.scheduler)]


class Line:
    """One direction of a stream. `None` among what arrives is its end."""

    def __init__(self, network: Network, source: str, target: str) -> None:
        self._network = network
        self._source, self._target = source, target
        self._arrived: deque[bytes | None] = deque()
        self._held: deque[bytes | None] = deque()
        self._wake = asyncio.Event()
        self._last_at_s = 0.0
        self._over = False

    def put(self, message: bytes | None) -> None:
        """Send on; the weather decides what becomes of it."""
        network, rng = self._network, self._network.rng
        weather = network.weather_of(self._source, self._target)
        loop = asyncio.get_running_loop()
        if message is not None and weather.drop and rng.random() < weather.drop:
            return
        at_s = loop.time() + rng.uniform(weather.delay_min_s, weather.delay_max_s)
        if message is not None and weather.overtake and rng.random() < weather.overtake:
            loop.call_at(at_s + rng.uniform(0.0, 1.0), self._arrive, message)
            return
        self._last_at_s = at_s = max(at_s, self._last_at_s)
        loop.call_at(at_s, self._arrive, message)
        if message is not None and weather.duplicate and rng.random() < weather.duplicate:
            loop.call_at(at_s + rng.uniform(0.0, 0.5), self._arrive, message)

    def _arrive(self, message: bytes | None) -> None:
        if self._network.blocked.get((self._source, self._target)):
            self._held.append(message)
        elif not self._over:
            self._arrived.append(message)
            self._wake.set()

    def release(self) -> None:
        """A partition may have healed."""
        if not self._network.blocked.get((self._source, self._target)):
            while self._held:
                self._arrive(self._held.popleft())

    def forget(self) -> None:
        """The sender's machine is gone: what has not arrived never will."""
        self._held.clear()

    def end(self) -> None:
        """The receiver sees the end now; nothing more arrives."""
        if not self._over:
            self._over = True
            self._arrived.append(None)
            self._wake.set()

    async def get(self) -> bytes | None:
        """The next that arrived; None for ever once the stream has ended."""
        while not self._arrived:
            self._wake.clear()
            await self._wake.wait()
        if self._arrived[0] is None:
            return None
        return self._arrived.popleft()


@dataclass(eq=False)
class Stream:
    """One session's stream, dialled by a node."""

    network: Network
    node: str
    scheduler: str
    up: Line = field(init=False)
    down: Line = field(init=False)
    why: FalError = field(init=False)  # what the node is told at the end
    watch: asyncio.TimerHandle | None = None
    sets: dict[int, dict[str, tuple[str, int]]] = field(
        default_factory=dict
    )  # for the checker: what each revision holds

    def __post_init__(self) -> None:
        self.up = Line(self.network, self.node, self.scheduler)
        self.down = Line(self.network, self.scheduler, self.node)
        self.why = broken("the stream has ended")
        self.network.streams[self] = None

    def break_off(self, why: str) -> None:
        """Both ends see it broken at once."""
        self.why = broken(why)
        self.down.end()
        self.up.end()
        self._forget()

    def leave(self, end: str) -> None:
        """One end is closed, or its process is killed: the other sees it when word of that has passed."""
        line = self.up if end == self.node else self.down
        line.put(None)
        (self.down if end == self.node else self.up).end()

    def _forget(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None
        self.network.streams.pop(self, None)


def broken(why: str) -> FalError:
    """The error of a transport that is gone."""
    return FalError(Code.UNAVAILABLE, why, remedy="It is tried again.")
