"""A scheduler's engine killed with SIGKILL at random points, over and over on one SQLite file: 0 lost, 0 doubled.

The engine is a real process; three simulated agents live here and keep their containers through every kill. Half of
the kills come at a random moment from outside, half at a chosen commit, just before or just after it. After each kill
a new engine starts on the file and must show: every acknowledged command, one live container for every runner that is
wanted, none besides, and no GPU that two containers were given.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from core_world import GIB, SimNode, sim_gpus, spec_of
from fal_scheduler.core import tokens
from fal_scheduler.core.events import ApplyApp, ApplyPool, CreateToken, DeleteApp, NodeHello, NodeReport, RedeemToken
from fal_scheduler.core.records import Meta, Pool, RunnerState
from fal_scheduler.core.told import Inventory

CHILD = Path(__file__).resolve().parent.parent / "engine_child.py"
APPS = [f"default/app{at}" for at in range(3)]
REST_S = 20.0  # how long a new engine may take to bring everything to rest
META = Meta("c1", 0, "", 0.0)  # what the agents claim: nothing of the store's life
Wish = tuple[int, str] | None


class Rig:
    """The agents, the operator's memory of what was acknowledged, and the engine of the moment."""

    def __init__(self, path: Path, rng: Random) -> None:
        self.path, self.rng = path, rng
        self.nodes = {
            node_id: SimNode(node_id, Inventory(1, sim_gpus(node_id, 4, "H100-80GB", 80), "", "", 64_000, 64 * GIB))
            for node_id in ("n-0", "n-1", "n-2")
        }
        self.acked: dict[str, Wish] = dict.fromkeys(APPS)
        self.asked: dict[int, tuple[str, Wish]] = {}  # not answered yet
        self.numbers = 0
        self.frames = 0
        self.dump: Any = None
        self.process: Process | None = None

    async def start(self) -> None:
        """A new engine on the file that the last one left."""
        seed = str(self.rng.getrandbits(31))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(CHILD), str(self.path), seed, stdin=PIPE, stdout=PIPE
        )
        frame = await asyncio.wait_for(self.receive(), REST_S)
        assert frame is not None, "the engine did not start"
        assert frame[0] == "ready"

    async def kill(self) -> None:
        """End the engine, whatever it does."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    def send(self, kind: str, event: Any) -> int:
        """A frame to the engine; a dead one loses it."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.numbers += 1
        data = pickle.dumps((kind, self.numbers, event))
        if not self.process.stdin.is_closing():
            self.process.stdin.write(struct.pack("!I", len(data)) + data)
        return self.numbers

    async def receive(self) -> Any:
        """The next frame; None when the engine is dead. A frame that it wrote before it died still counts."""
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            (size,) = struct.unpack("!I", await self.process.stdout.readexactly(4))
            return pickle.loads(await self.process.stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return None

    def take(self, frame: Any) -> None:
        """What the engine says, to agents and operator."""
        self.frames += 1
        match frame:
            case ("done", number, _) if number in self.asked:
                app_id, wish = self.asked.pop(number)
                self.acked[app_id] = wish
            case ("refused", number, _):
                self.asked.pop(number, None)
            case ("complete", node_id, runners, term):
                self.nodes[node_id].assign(runners, term=term)
                known = {runner.id for runner in runners}
                for runner_id in [id_ for id_ in self.nodes[node_id].containers if id_ not in known]:
                    self.nodes[node_id].drop(runner_id)
            case ("put", node_id, runner_id, runner, term):
                node = self.nodes[node_id]
                if runner is None:
                    node.drop(runner_id)
                elif term >= node.term_seen:
                    node.put(runner)
            case ("dump", _, dump):
                self.dump = dump

    def hello(self) -> None:
        """All agents dial the new engine."""
        for node in self.nodes.values():
            told = node.hello(time.monotonic(), META)
            self.send("submit", NodeHello(**{name: getattr(told, name) for name in told.__slots__}))

    def work(self) -> None:
        """Agents bring their containers on and tell."""
        for node in self.nodes.values():
            for runner_id, status in list(node.containers.items()):
                if status.state in (RunnerState.STAGING, RunnerState.SETUP, RunnerState.DRAINING):
                    node.advance(runner_id)
            if node.changed or node.gone:
                told = node.report(time.monotonic())
                self.send("offer", NodeReport(**{name: getattr(told, name) for name in told.__slots__}))

    def command(self) -> None:
        """An operator deploys or deletes an app that nothing is asked of already."""
        app_id = self.rng.choice(APPS)
        if any(app_id == asked for asked, _ in self.asked.values()):
            return
        if self.rng.randrange(5) == 0:
            self.asked[self.send("submit", DeleteApp(app_id))] = (app_id, None)
            return
        least, tag = self.rng.randrange(3), str(self.rng.randrange(1000))
        spec, digest = spec_of(gpus=1, least=least, most=4, tag=tag)
        self.asked[self.send("submit", ApplyApp(app_id, spec, digest))] = (app_id, (least, tag))

    async def until_dead(self, kill_after_frames: int | None) -> None:
        """Operators and agents work until the engine is killed."""
        assert self.process is not None
        first = self.frames
        while True:
            self.command()
            self.work()
            frame = await asyncio.wait_for(self.receive(), REST_S)
            if frame is None:
                break
            self.take(frame)
            if kill_after_frames is not None and self.frames - first >= kill_after_frames:
                self.process.kill()
                kill_after_frames = None
        assert await self.process.wait() == -9

    async def rest(self) -> None:
        """A new engine, no commands: agents work until records and containers agree."""
        self.hello()
        deadline_s = time.monotonic() + REST_S
        why = "no dump came"
        while why:
            assert time.monotonic() < deadline_s, why
            self.dump = None
            number = self.send("dump", None)
            while self.dump is None:
                frame = await asyncio.wait_for(self.receive(), REST_S)
                assert frame is not None, "the engine died by itself"
                self.take(frame)
            assert number
            self.work()
            why = self.unrest()

    def unrest(self) -> str:
        """What is not as it should be; empty when all is."""
        revisions, runners, orphans, _, _ = self.dump
        wanted = {app_id: revision.spec.scaling.min_concurrency for app_id, revision in revisions.items()}
        live = {
            runner_id: status
            for node in self.nodes.values()
            for runner_id, status in node.containers.items()
            if not status.ended
        }
        if orphans or set(live) != set(runners):
            return f"containers {sorted(live)}, records {sorted(runners)}, orphans {orphans}"
        for app_id in APPS:
            serving = (
                [
                    one
                    for one in live.values()
                    if one.app == app_id and one.serves and one.revision == revisions[app_id].number
                ]
                if app_id in revisions
                else []
            )
            mine = [one for one in live.values() if one.app == app_id]
            # A new leader leaves alone for minutes what is more than wanted: nobody may have told it of a request yet.
            enough = len(serving) >= wanted.get(app_id, 0) if app_id in revisions else not serving
            if not enough or len(mine) != len(serving):
                return f"{app_id} wants {wanted.get(app_id, 0)}, {len(serving)} of {len(mine)} serve"
        return ""

    def check(self) -> None:
        """Nothing lost, nothing doubled. What was asked and not answered may have happened or not."""
        revisions = self.dump[0]
        for app_id in APPS:
            revision = revisions.get(app_id)
            found = (revision.spec.scaling.min_concurrency, revision.spec.env["TAG"]) if revision is not None else None
            allowed = [self.acked[app_id], *(wish for asked, wish in self.asked.values() if asked == app_id)]
            assert found in allowed, f"{app_id} is {found}, acknowledged or asked was {allowed}"
            self.acked[app_id] = found
        self.asked.clear()
        for node in self.nodes.values():
            assert not node.doubled
            held = [gpu for one in node.containers.values() if not one.ended for gpu in one.gpus]
            assert len(held) == len(set(held))


async def found(rig: Rig) -> None:
    """Pool, token and nodes, once."""
    await rig.start()
    rig.send("submit", ApplyPool(Pool("metal")))
    token = tokens.create("t", "s", pool="metal", ttl_s=86400.0, uses=9, created_by="", now_s=time.clock_gettime(0))
    rig.send("submit", CreateToken(token))
    last = 0
    for node_id in rig.nodes:
        last = rig.send("submit", RedeemToken("t", "s", node_id, node_id))
    while (frame := await asyncio.wait_for(rig.receive(), REST_S))[1] != last:
        assert frame[0] == "done", frame
    await rig.kill()


async def crash_points(rig: Rig, points: int) -> None:
    """Kill, restart and check so often."""
    await found(rig)
    await rig.start()
    for point in range(points):
        if point % 2:
            where = rig.rng.choice(("before commit", "after commit"))
            rig.send("arm", (where, rig.rng.randrange(1, 12)))
            await rig.until_dead(None)
        else:
            await rig.until_dead(rig.rng.randrange(1, 40))
        await rig.start()
        await rig.rest()
        rig.check()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_points_nothing_is_lost_or_doubled(
    tmp_path: Path, base_seed: int, scale: Callable[[int], int]
) -> None:
    points = scale(200)
    rig = Rig(tmp_path / "store.db", Random(base_seed))

    async def go() -> None:
        try:
            await crash_points(rig, points)
        finally:
            if rig.process is not None and rig.process.returncode is None:
                await rig.kill()

    asyncio.run(go())
    print(f"{points} kills, 0 lost, 0 doubled")
