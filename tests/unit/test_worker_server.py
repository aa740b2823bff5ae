"""The worker's HTTP side on a real unix socket, with a scripted engine."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fal_runtime.worker.engine import DeviceFailed, OutOfMemory
from fal_runtime.worker.fake import FakeEngine
from fal_runtime.worker.log import log
from fal_runtime.worker.main import EXIT_DEVICE_FAILED, EXIT_DONE
from worker_client import Gate, Running, running, until

PNG = b"\x89PNG\r\n\x1a\n"


def check(folder: Path, engine: FakeEngine, body: Callable[[Running], Awaitable[None]], **options: Any) -> None:
    """Run `body` against a ready worker that serves `engine`."""

    async def main() -> None:
        async with running(engine, folder, **options) as worker:
            await body(worker)

    asyncio.run(main())


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")  # short: a socket's path has at most 107 bytes


def test_png_by_default_and_json_by_format_or_accept(folder: Path) -> None:
    async def body(worker: Running) -> None:
        post = worker.client.post
        status, png, headers = await post("/infer", {"prompt": "a", "seed": 3}, x_fal_request_id="r-1")
        assert (status, headers["content-type"], headers["x-fal-request-id"]) == (200, "image/png", "r-1")
        assert (png[:8], headers["x-fal-seed"]) == (PNG, "3")
        by_format = await post("/infer", {"prompt": "a", "seed": 3, "format": "json"})
        by_accept = await post("/infer", {"prompt": "a", "seed": 3}, accept="application/json")
        for status, answer, _ in (by_format, by_accept):
            assert status == 200
            assert base64.b64decode(answer["image"]) == png
            assert (answer["seed"], answer["width"], answer["content_type"]) == (3, 16, "image/png")
            assert set(answer["timings"]) == {"queue_s", "infer_s", "encode_s"}
        wins = await post("/infer", {"prompt": "a", "format": "png"}, accept="application/json")
        assert wins[2]["content-type"] == "image/png"

    check(folder, FakeEngine(), body)


def test_lines_that_an_engine_writes_name_their_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Chatty(FakeEngine):
        def infer(self, request: Any, on_step: Any) -> Any:
            log("inside", prompt=request.prompt)
            return super().infer(request, on_step)

    async def body(worker: Running) -> None:
        for id in ("r-1", "r-2"):
            assert (await worker.client.post("/infer", {"prompt": id, "seed": 1}, x_fal_request_id=id))[0] == 200
        log("outside")

    check(folder, Chatty(), body)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    named = [(line["event"], line.get("request_id")) for line in lines if line["event"] in ("inside", "outside")]
    assert [pair for pair in named if pair[1]] == [("inside", "r-1"), ("inside", "r-2")]
    assert ("outside", None) in named


def test_a_seed_that_is_left_out_is_drawn_and_told(folder: Path) -> None:
    async def body(worker: Running) -> None:
        first = (await worker.client.post("/infer", {"prompt": "a", "format": "json"}))[1]
        second = (await worker.client.post("/infer", {"prompt": "a", "format": "json"}))[1]
        assert first["seed"] != second["seed"]
        again = await worker.client.post("/infer", {"prompt": "a", "format": "json", "seed": first["seed"]})
        assert again[1]["image"] == first["image"]

    check(folder, FakeEngine(), body)


def test_progress_as_server_sent_events(folder: Path) -> None:
    async def body(worker: Running) -> None:
        seen = [e async for e in worker.client.events({"prompt": "a", "seed": 5, "steps": 3}, x_fal_request_id="r")]
        assert [name for name, _ in seen] == ["start", "step", "step", "step", "output", "completed"]
        assert seen[0][1] == {"request_id": "r", "seed": 5, "steps": 3}
        assert [data for name, data in seen if name == "step"] == [{"i": i, "n": 3} for i in (1, 2, 3)]
        assert base64.b64decode(seen[4][1]["image"])[:8] == PNG
        assert seen[5][1]["seconds"] >= 0

    check(folder, FakeEngine(), body)


def test_each_step_is_told_while_the_next_one_runs(folder: Path) -> None:
    gate = Gate("slow", at=3)

    async def body(worker: Running) -> None:
        stream = worker.client.events({"prompt": "slow", "steps": 4})
        early = [await anext(stream) for _ in range(3)]  # the engine waits in step 3
        assert [data for name, data in early if name == "step"] == [{"i": 1, "n": 4}, {"i": 2, "n": 4}]
        gate.open.set()
        assert [name async for name, _ in stream] == ["step", "step", "output", "completed"]

    check(folder, FakeEngine(before_step=gate), body)


def test_a_failure_in_a_stream_is_an_error_event(folder: Path) -> None:
    async def body(worker: Running) -> None:
        seen = [e async for e in worker.client.events({"prompt": "huge"})]
        assert [name for name, _ in seen] == ["start", "error"]
        assert seen[1][1]["code"] == "OUT_OF_MEMORY"

    check(folder, FakeEngine(failures={"huge": OutOfMemory("too big")}), body)


def test_cancel_stops_within_one_step(folder: Path) -> None:
    gate, engine = Gate("long", at=3), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        post = worker.client.post
        drawing = asyncio.create_task(post("/infer", {"prompt": "long", "steps": 50}, x_fal_request_id="r-9"))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        assert (await post("/cancel/r-9"))[:2] == (202, {"cancelled": "r-9"})
        gate.open.set()
        status, answer, _ = await drawing
        assert (status, answer["error"]["code"]) == (499, "CANCELLED")
        assert engine.steps_run == [("long", 1), ("long", 2), ("long", 3)]
        assert (await post("/infer", {"prompt": "next"}))[0] == 200

    check(folder, engine, body)


def test_cancelling_what_is_not_there_says_so(folder: Path) -> None:
    async def body(worker: Running) -> None:
        status, answer, _ = await worker.client.post("/cancel/nobody")
        assert (status, answer["error"]["code"]) == (404, "NOT_FOUND")

    check(folder, FakeEngine(), body)


@pytest.mark.parametrize("accept", ["image/png", "text/event-stream"])
def test_a_client_that_disconnects_stops_its_inference(folder: Path, accept: str) -> None:
    gate, engine = Gate("long", at=150), FakeEngine()
    started = Gate("long", at=2)

    def before_step(request: Any, step: int) -> None:
        started(request, step)
        gate(request, step)

    engine.before_step = before_step

    async def body(worker: Running) -> None:
        reader, writer = await asyncio.open_unix_connection(str(folder / "s"))
        data = b'{"prompt": "long", "steps": 200}'
        head = f"POST /infer HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        assert await asyncio.to_thread(started.reached.wait, 10)
        writer.close()
        await writer.wait_closed()
        # The server learns of it on its loop; each answered request is a turn of that loop.
        for _ in range(5):
            await worker.client.get("/livez")
        started.open.set()
        gate.open.set()
        await until(lambda: _is(worker.client.ended("cancelled"), 1), "the inference is cancelled")
        assert len(engine.steps_run) == 2
        assert (await worker.client.post("/infer", {"prompt": "next"}))[0] == 200
        del reader

    check(folder, engine, body)


async def _is(number: Awaitable[int], wanted: int) -> bool:
    return await number == wanted


def test_one_at_a_time_and_busy_beyond_the_bound(folder: Path) -> None:
    gate, engine = Gate("first", at=1), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        post = worker.client.post
        first = asyncio.create_task(post("/infer", {"prompt": "first", "steps": 1}, x_fal_request_id="1"))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        waiting = worker.client.events({"prompt": "second", "steps": 1}, x_fal_request_id="2")
        assert (await anext(waiting))[0] == "start"  # admitted, and waits
        twin = await post("/infer", {"prompt": "x"}, x_fal_request_id="1")
        assert (twin[0], twin[1]["error"]["code"]) == (409, "ALREADY_EXISTS")
        third = await post("/infer", {"prompt": "third"})
        assert (third[0], third[1]["error"]["code"], third[2]["retry-after"]) == (503, "BUSY", "1")
        assert b"fal_worker_in_flight 2.0" in (await worker.client.get("/metrics"))[1]
        assert (await worker.client.get("/livez"))[0] == 200  # the loop is free while the engine works
        gate.open.set()
        assert (await first)[0] == 200
        assert [name async for name, _ in waiting] == ["step", "output", "completed"]
        assert engine.steps_run == [("first", 1), ("second", 1)]

    check(folder, engine, body, max_multiplexing=2)


def test_a_waiting_request_is_cancelled_at_once(folder: Path) -> None:
    gate, engine = Gate("first", at=1), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        post = worker.client.post
        first = asyncio.create_task(post("/infer", {"prompt": "first", "steps": 1}))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        stream = worker.client.events({"prompt": "second"}, x_fal_request_id="2")
        await anext(stream)
        assert (await post("/cancel/2"))[0] == 202
        assert [(name, data["code"]) async for name, data in stream] == [("error", "CANCELLED")]
        assert not first.done()
        gate.open.set()
        assert (await first)[0] == 200
        assert engine.steps_run == [("first", 1)]

    check(folder, engine, body, max_multiplexing=2)


def test_a_request_that_takes_too_long_is_stopped(folder: Path) -> None:
    gate, engine = Gate("slow", at=2), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        status, answer, _ = await worker.client.post("/infer", {"prompt": "slow", "steps": 9})
        assert (status, answer["error"]["code"]) == (504, "TIMEOUT")
        gate.open.set()
        await until(lambda: _is(worker.client.ended("cancelled"), 1), "the inference is cancelled")
        assert len(engine.steps_run) == 2

    check(folder, engine, body, request_timeout_s=0.2)


@pytest.mark.parametrize("failure", [MemoryError(), OutOfMemory("CUDA out of memory")], ids=["host", "device"])
def test_out_of_memory_fails_the_request_not_the_process(folder: Path, failure: Exception) -> None:
    async def body(worker: Running) -> None:
        for _ in range(3):
            status, answer, _ = await worker.client.post("/infer", {"prompt": "huge"})
            assert (status, answer["error"]["code"]) == (507, "OUT_OF_MEMORY")
        assert (await worker.client.post("/infer", {"prompt": "small"}))[0] == 200
        assert (await worker.client.get("/readyz"))[0] == 200
        assert await worker.client.ended("out_of_memory") == 3

    check(folder, FakeEngine(failures={"huge": failure}), body)


def test_a_pipeline_that_raises_fails_the_request_only(folder: Path) -> None:
    async def body(worker: Running) -> None:
        status, answer, _ = await worker.client.post("/infer", {"prompt": "odd"})
        assert (status, answer["error"]["code"]) == (500, "RUNNER_FAILED")
        assert "ValueError: shapes differ" in answer["error"]["what"]
        assert "second line" not in answer["error"]["what"]
        assert (await worker.client.post("/infer", {"prompt": "fine"}))[0] == 200

    check(folder, FakeEngine(failures={"odd": ValueError("shapes differ\nsecond line")}), body)


def test_the_second_device_failure_ends_the_process_with_its_own_code(folder: Path) -> None:
    async def body(worker: Running) -> None:
        first = await worker.client.post("/infer", {"prompt": "bad"})
        assert (first[0], first[1]["error"]["code"]) == (500, "RUNNER_FAILED")
        assert (await worker.client.get("/readyz"))[0] == 200
        second = await worker.client.post("/infer", {"prompt": "bad"})
        assert second[0] == 500
        assert await asyncio.wait_for(worker.task, 10) == EXIT_DEVICE_FAILED

    check(folder, FakeEngine(failures={"bad": DeviceFailed("illegal address")}), body)


def test_bad_requests_never_kill_it(folder: Path) -> None:
    async def body(worker: Running) -> None:
        post = worker.client.post
        unknown = await post("/infer", {"prompt": "a", "stpes": 3})
        error = {
            "code": "INVALID",
            "field": "stpes",
            "what": "stpes = 3 is not a known key",
            "remedy": "Known keys: prompt, seed, steps, guidance, width, height, lora, format, model.",
        }
        assert unknown[:2] == (400, {"error": error})
        assert (await post("/infer", b"\x00\xff{"))[0] == 400
        assert (await post("/infer", b"x" * (2 << 20)))[0] == 413
        assert (await post("/infer", {"prompt": "a"}, x_fal_request_id="a b"))[0] == 400
        assert (await worker.client.get("/infer"))[0] == 405
        status, nowhere = await worker.client.get("/nowhere")
        assert (status, nowhere["error"]["code"]) == (404, "INVALID")
        for raw in (
            b"\x16\x03\x01garbage\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /infer HTTP/1.1\r\ncontent-length: -4\r\n\r\n",
        ):
            reader, writer = await asyncio.open_unix_connection(str(folder / "s"))
            writer.write(raw)
            assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            await writer.wait_closed()
        assert (await post("/infer", {"prompt": "a"}))[0] == 200

    check(folder, FakeEngine(), body)


def test_a_body_that_never_arrives_is_given_up(folder: Path) -> None:
    async def body(worker: Running) -> None:
        reader, writer = await asyncio.open_unix_connection(str(folder / "s"))
        writer.write(b"POST /infer HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{")
        assert b" 504 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        await writer.wait_closed()
        assert (await worker.client.post("/infer", {"prompt": "a"}))[0] == 200

    check(folder, FakeEngine(), body, body_timeout_s=0.05)


def test_not_ready_until_loaded_and_warm(folder: Path) -> None:
    gates = {phase: Gate(phase) for phase in ("import", "load", "warm")}

    def hold(phase: str) -> None:
        gates[phase].reached.set()
        assert gates[phase].open.wait(20)

    async def body(worker: Running) -> None:
        for phase, gate in gates.items():
            assert await asyncio.to_thread(gate.reached.wait, 10)
            await until(lambda phase=phase: _in_phase(worker, phase), f"phase {phase}")
            assert (await worker.client.get("/livez"))[0] == 200
            refused = await worker.client.post("/infer", {"prompt": "a"})
            assert (refused[0], refused[1]["error"]["code"]) == (503, "UNAVAILABLE")
            assert f'fal_worker_phase{{phase="{phase}"}} 1.0'.encode() in (await worker.client.get("/metrics"))[1]
            gate.open.set()
        await until(lambda: _in_phase(worker, "ready", status=200), "ready")
        assert (await worker.client.post("/infer", {"prompt": "a"}))[0] == 200
        metrics = (await worker.client.get("/metrics"))[1].decode()
        assert 'fal_worker_phase_seconds{phase="load"}' in metrics
        assert 'fal_worker_requests_total{outcome="ok"} 1.0' in metrics
        assert "fal_worker_steps_total 4.0" in metrics

    check(folder, FakeEngine(on_load=hold), body, wait_ready=False)


async def _in_phase(worker: Running, phase: str, *, status: int = 503) -> bool:
    try:
        seen, body = await worker.client.get("/readyz")
    except aiohttp.ClientConnectorError:
        return False
    return (seen, body["phase"]) == (status, phase)


def test_stopping_finishes_what_runs_and_takes_nothing_new(folder: Path) -> None:
    gate, engine = Gate("last", at=1), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        last = asyncio.create_task(worker.client.post("/infer", {"prompt": "last"}))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        worker.stop.set()
        await until(lambda: _in_phase(worker, "draining"), "draining")
        assert (await worker.client.post("/infer", {"prompt": "late"}))[0] == 503
        gate.open.set()
        assert (await last)[0] == 200
        assert await asyncio.wait_for(worker.task, 10) == EXIT_DONE
        assert not (folder / "s").exists()

    check(folder, engine, body, grace_s=20.0)


def test_stopping_is_bounded_by_the_grace(folder: Path) -> None:
    gate, engine = Gate("endless", at=1), FakeEngine()
    engine.before_step = gate

    async def body(worker: Running) -> None:
        endless = asyncio.create_task(worker.client.post("/infer", {"prompt": "endless"}))
        assert await asyncio.to_thread(gate.reached.wait, 10)
        worker.stop.set()
        # The engine never reaches the end of its step: the process goes all the same, the client sees a closed door.
        assert await asyncio.wait_for(worker.task, 10) == EXIT_DONE
        gate.open.set()
        with pytest.raises(aiohttp.ClientError):
            await endless

    check(folder, engine, body, grace_s=0.1)
