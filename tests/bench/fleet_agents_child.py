"""Simulated agents over real gRPC for `bench_fleet`: `python fleet_agents_child.py FOLDER ADDRESS FIRST COUNT GPUS`.

FOLDER holds an identity file for each node, named by its number. Every node dials, beats every 5 s, and tells of each
assignment that it is STAGING, then in SETUP, then IDLE. Writes JSON lines: `{"dialled": COUNT}` once all are welcome,
`{"placed": RUNNER, "at_s": T}` for each assignment of an app whose name begins with `one`, T on the machine's
monotonic clock. Ends when it is killed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sim_nodes import SimNode

from fal_contract.identity import Identity
from fal_contract.limits import HEARTBEAT_INTERVAL_S
from fal_contract.v1 import agent_pb2, state_pb2
from scheduler_process import Process
from scheduler_rig import status_of

DIALS_AT_ONCE = 16
WELCOME_TIMEOUT_S = 60.0
STARTING = (state_pb2.RUNNER_STATE_STAGING, state_pb2.RUNNER_STATE_SETUP, state_pb2.RUNNER_STATE_IDLE)


class FleetNode(SimNode):
    """Tells of what it was given in whole reports, as agents do."""

    def __init__(self, address: str, own: Identity, *, gpus: int) -> None:
        super().__init__(cast("Process", SimpleNamespace(address=address)), own, gpus=gpus)
        self.is_welcome = asyncio.Event()

    async def _receive(self, message: agent_pb2.SchedulerMessage) -> None:
        await super()._receive(message)
        if message.WhichOneof("kind") == "complete":
            self.is_welcome.set()

    def _take(self, assignments: Any) -> None:
        given = list(assignments)
        starting = [one for one in given if one.goal == state_pb2.GOAL_RUN]
        ending = [one for one in given if one.goal != state_pb2.GOAL_RUN]
        for one in starting:
            if one.app.partition("/")[2].startswith("one"):
                tell(placed=f'"{one.runner_id}"', at_s=time.perf_counter())
        for state in STARTING if starting else ():
            self.report(*(status_of(one, state) for one in starting))
        if ending:
            self.report(*(status_of(one, state_pb2.RUNNER_STATE_TERMINATED) for one in ending))
            self.report(gone=tuple(one.runner_id for one in ending))


def tell(**facts: object) -> None:
    """One line; the values are JSON."""
    print("{" + ", ".join(f'"{name}": {value}' for name, value in facts.items()) + "}", flush=True)


async def dial(node: FleetNode, turn: asyncio.Semaphore) -> None:
    """Open its session, a few at a time."""
    async with turn:
        node.dial()
        assert node.task is not None
        welcome = asyncio.create_task(node.is_welcome.wait())
        done, _ = await asyncio.wait(
            [node.task, welcome], timeout=WELCOME_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if welcome not in done:
            raise SystemExit(f"{node.node_id} was not welcome: {node.task}")


async def main(folder: Path, address: str, numbers: range, gpus: int) -> None:
    """Until killed, or until a stream ends."""
    nodes = [FleetNode(address, Identity.load(folder / str(number)), gpus=gpus) for number in numbers]
    turn = asyncio.Semaphore(DIALS_AT_ONCE)
    await asyncio.gather(*(dial(node, turn) for node in nodes))
    tell(dialled=len(nodes))
    beats = [
        asyncio.create_task(node.beat(HEARTBEAT_INTERVAL_S * place / len(nodes))) for place, node in enumerate(nodes)
    ]
    sessions = [node.task for node in nodes if node.task is not None]
    done, _ = await asyncio.wait([*sessions, *beats], return_when=asyncio.FIRST_COMPLETED)
    raise SystemExit(f"a session ended: {done}")


if __name__ == "__main__":
    _, place, where, first, count, gpus_each = sys.argv
    asyncio.run(main(Path(place), where, range(int(first), int(first) + int(count)), int(gpus_each)))
