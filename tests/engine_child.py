"""A scheduler engine on SQLite in a process of its own, for tests that kill it.

Run as `python engine_child.py STORE SEED`. Frames (4 bytes length, pickle) come on standard input and go to standard
output; both ends are our own test. After a frame ("arm", n, (POINT, COUNT)), POINT being "before commit" or "after
commit", the process kills itself with SIGKILL at the COUNT-th such point from then, which no handler can see. Must not
be used outside of tests.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import struct
import sys
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
for root in ("proto", "scheduler"):
    sys.path.insert(0, str(HERE.parent / root))

from fal_contract.clock import SystemClock  # noqa: E402
from fal_contract.errors import FalError  # noqa: E402
from fal_scheduler.core.events import AssignmentChanged, Effect, NodeHello, NodeReport  # noqa: E402
from fal_scheduler.engine import Engine, EngineOptions  # noqa: E402
from fal_scheduler.store.faults import FaultStore  # noqa: E402
from fal_scheduler.store.sqlite import SqliteStore  # noqa: E402


class Trap:
    """Kills the process at a chosen commit."""

    point = ""
    left = 0

    def hook(self, point: str) -> None:
        """The store passes `point`."""
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Child:
    """Frames in, engine calls, frames out."""

    def __init__(self, engine: Engine, trap: Trap) -> None:
        self.engine = engine
        self.trap = trap
        self.tasks: set[asyncio.Task[None]] = set()
        engine.subscribe(self._on_effect)

    def send(self, *frame: Any) -> None:
        data = pickle.dumps(frame)
        sys.stdout.buffer.write(struct.pack("!I", len(data)) + data)
        sys.stdout.buffer.flush()

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, AssignmentChanged):
            runner = self.engine.assignment(effect.node_id, effect.runner_id)
            self.send("put", effect.node_id, effect.runner_id, runner, self.engine.view.term)

    def take(self, kind: str, number: int, value: Any) -> None:
        match kind:
            case "submit":
                task = asyncio.create_task(self._submit(number, value))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
            case "arm":
                self.trap.point, self.trap.left = value
            case "offer":
                self.engine.offer(value)
            case "dump":
                view = self.engine.view
                wanted = {app.id: view.revision_of(app) for app in view.apps.values() if not app.deleting}
                orphans = list(view.orphans)
                self.send("dump", number, (wanted, dict(view.runners), orphans, view.term, dict(view.alarms)))

    async def _submit(self, number: int, event: Any) -> None:
        try:
            await self.engine.submit(event)
        except FalError as error:
            self.send("refused", number, str(error))
            return
        self.send("done", number, None)
        if isinstance(event, NodeHello):
            mine = self.engine.assignments(event.node_id)
            self.send("complete", event.node_id, mine, self.engine.view.term)


async def main() -> None:
    path, seed = Path(sys.argv[1]), int(sys.argv[2])
    trap = Trap()
    store = FaultStore(SqliteStore(path), hook=trap.hook)
    options = EngineOptions("c1", path.parent / "events", tick_s=0.05, strict=True)
    engine = Engine(store, clock=SystemClock(), rng=Random(seed), options=options)
    await engine.start(f"child-{os.getpid()}")
    child = Child(engine, trap)
    child.send("ready", engine.view.term, None)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        try:
            (size,) = struct.unpack("!I", await reader.readexactly(4))
        except asyncio.IncompleteReadError:
            return  # the test has ended
        kind, number, event = pickle.loads(await reader.readexactly(size))
        if isinstance(event, NodeHello | NodeReport):
            # Monotonic readings of two processes of one machine compare.
            assert event.arrived_s > 0.0
        child.take(kind, number, event)


if __name__ == "__main__":
    asyncio.run(main())
