"""The proxy in front of the real worker server: events stream, and a cancelled request leaves no failure behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import worker_client
from dataplane import RUNNER, address_of, call, dial, serving, until
from fal_agent.proxy.messages import RunnerEntry
from fal_contract.datapath import Address
from fal_runtime.worker.fake import FakeEngine


async def infer(address: Address, prompt: str) -> tuple[int, bytes | None]:
    connection = await dial(address)
    try:
        body = json.dumps({"prompt": prompt, "steps": 3}).encode()
        answer = await call(connection, "/infer", body)
        await answer.read(1 << 20)
        return answer.status, answer.header(b"fal-code")
    finally:
        connection.abort()


def test_a_cancelled_request_makes_room_within_its_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = worker_client.Gate("slow", at=2)
        engine = FakeEngine(before_step=gate)
        async with worker_client.running(engine, tmp_path), serving(tmp_path / "p") as proxy:
            proxy.put_runner(RunnerEntry(RUNNER, str(tmp_path / "s"), 1, 30.0))
            address = address_of(proxy)
            slow = asyncio.create_task(infer(address, "slow"))
            await asyncio.to_thread(gate.reached.wait, 10)
            slow.cancel()
            await until(lambda: proxy.stats().runners[0].in_flight == 0)
            # The slot is free, the worker is still in the cancelled request's step: no room, and nothing ran.
            assert await infer(address, "quick") == (503, b"BUSY")
            gate.open.set()
            await until(lambda: ("slow", 2) in engine.steps_run)
            status, code = 503, None
            async with asyncio.timeout(10):
                while status != 200:
                    status, code = await infer(address, "quick")
                    assert (status, code) in ((200, None), (503, b"BUSY"))
            counted = proxy.stats().runners[0]
            assert (counted.served, counted.failed, counted.cancelled) == (1, 0, 1)
            assert ("slow", 3) not in engine.steps_run, "it stopped within a step"

    asyncio.run(scenario())


def test_progress_streams_through(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with worker_client.running(FakeEngine(), tmp_path), serving(tmp_path / "p") as proxy:
            proxy.put_runner(RunnerEntry(RUNNER, str(tmp_path / "s"), 1, 30.0))
            connection = await dial(address_of(proxy))
            headers = [("host", "t"), ("fal-ticket", "term=1;lease="), ("accept", "text/event-stream")]
            body = json.dumps({"prompt": "p", "steps": 3}).encode()
            answer = await connection.request("POST", f"/v1/runners/{RUNNER}/infer", headers, body)
            events = (await answer.read(1 << 20)).decode()
            names = [line.removeprefix("event: ") for line in events.splitlines() if line.startswith("event: ")]
            assert names[0] == "start"
            assert names.count("step") == 3
            assert names[-1] == "completed"
            connection.close()

    asyncio.run(scenario())
