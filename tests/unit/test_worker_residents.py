"""Models and LoRAs come and go in a live worker: in order, bounded, and never at another's cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fal_contract.limits import RESIDENTS_MAX
from fal_runtime.worker.fake import FakeEngine
from worker_client import DEADLINE_S, Gate, Running, running


def check(folder: Path, engine: FakeEngine, body: Callable[[Running], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with running(engine, folder, name="default/a", **options) as worker:
            await body(worker)

    asyncio.run(main())


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("w")  # short: a socket's path has at most 107 bytes
    for name in ("b", "c"):
        (made / name).mkdir()
        (made / name / "weights").write_bytes(b"x" * 100)
    return made


async def change(worker: Running, verb: str, **body: Any) -> tuple[int, Any]:
    status, answer, _ = await worker.client.post(f"/{verb}", body, x_fal_control="1")
    return status, answer


def names(answer: Any) -> list[str]:
    return [one["model"] for one in answer["resident"]]


def test_a_second_model_is_loaded_asked_for_by_name_and_let_go(folder: Path) -> None:
    async def body(worker: Running) -> None:
        post = worker.client.post
        assert names((await worker.client.get("/readyz"))[1]) == ["default/a"]
        status, answer = await change(worker, "load", model="default/b", path=str(folder / "b"))
        assert (status, names(answer)) == (200, ["default/a", "default/b"])
        assert answer["resident"][1]["bytes"] == 100
        again = await change(worker, "load", model="default/b", path=str(folder / "b"))
        assert (again[0], again[1]["seconds"]) == (200, 0.0)
        request = {"prompt": "p", "seed": 1}
        by_a, by_b = [await post("/infer", request, x_fal_model=f"default/{one}") for one in "ab"]
        assert (by_a[0], by_b[0]) == (200, 200)
        assert by_a[1] != by_b[1], "another model draws another picture"
        assert (await post("/infer", request | {"model": "default/b"}))[1] == by_b[1]
        assert names((await change(worker, "unload", model="default/a"))[1]) == ["default/b"]
        assert (await post("/infer", request))[0] == 200, "the only one needs no name"

    check(folder, FakeEngine(), body)


def test_a_model_that_is_not_here_is_refused_with_what_is(folder: Path) -> None:
    async def body(worker: Running) -> None:
        post = worker.client.post
        status, answer, headers = await post("/infer", {"prompt": "p", "model": "rivals/secret"})
        assert (status, answer["error"]["code"], "x-fal-not-run" in headers) == (409, "CONFLICT", False)
        assert "loaded: default/a" in answer["error"]["what"]
        status, answer, headers = await post("/infer", {"prompt": "p"}, x_fal_model="default/b")
        assert (status, headers["x-fal-not-run"]) == (409, "BUSY"), "its gateway may send it again"
        both = await post("/infer", {"prompt": "p", "model": "default/b"}, x_fal_model="default/a")
        assert (both[0], both[1]["error"]["field"]) == (400, "model")
        await change(worker, "load", model="default/b", path=str(folder / "b"))
        unnamed = await post("/infer", {"prompt": "p"})
        assert unnamed[0] == 409, "of two none is meant by itself"

    check(folder, FakeEngine(), body)


def test_only_the_agent_changes_what_is_loaded(folder: Path) -> None:
    async def body(worker: Running) -> None:
        for verb in ("load", "unload"):
            status, answer, _ = await worker.client.post(f"/{verb}", {"model": "default/a", "path": "/"})
            assert (status, answer["error"]["code"]) == (403, "PERMISSION_DENIED")
        for bad in ({}, {"model": 3}, {"model": "m"}, {"model": "m", "lora": []}, {"model": "m", "lora": {"name": ""}}):
            assert (await change(worker, "load", **bad))[0] == 400
        assert names((await worker.client.get("/readyz"))[1]) == ["default/a"]

    check(folder, FakeEngine(), body)


def test_a_model_that_does_not_load_harms_nobody(folder: Path) -> None:
    def refuse(path: Path) -> None:
        if path.name == "b":
            raise RuntimeError("shapes differ")

    async def body(worker: Running) -> None:
        status, answer = await change(worker, "load", model="default/b", path=str(folder / "b"))
        assert (status, answer["error"]["code"]) == (500, "RUNNER_FAILED")
        assert "shapes differ" in answer["error"]["what"]
        status, answer = await change(worker, "load", model="default/d", path=str(folder / "d"))
        assert (status, answer["error"]["code"]) == (404, "NOT_FOUND")
        assert (await worker.client.post("/infer", {"prompt": "p"}))[0] == 200
        assert (await change(worker, "load", model="default/c", path=str(folder / "c")))[0] == 200

    check(folder, FakeEngine(before_add=refuse), body)


def test_a_change_waits_for_requests_and_a_second_change_is_told_busy(folder: Path) -> None:
    gate, loading, go_on = Gate("slow"), threading.Event(), threading.Event()

    def hold(path: Path) -> None:
        loading.set()
        assert go_on.wait(DEADLINE_S)

    async def body(worker: Running) -> None:
        request = asyncio.create_task(worker.client.post("/infer", {"prompt": "slow"}))
        await asyncio.to_thread(gate.reached.wait, DEADLINE_S)
        both = [
            asyncio.create_task(change(worker, "load", model=f"default/{one}", path=str(folder / one))) for one in "bc"
        ]
        [refused], [load] = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result()[0] == 503
        assert not loading.is_set(), "nothing is loaded while a request is under way"
        gate.open.set()
        assert (await request)[0] == 200
        await asyncio.to_thread(loading.wait, DEADLINE_S)
        assert not load.done()
        go_on.set()
        assert (await load)[0] == 200

    check(folder, FakeEngine(before_step=gate, before_add=hold), body)


def test_loras_come_and_go_in_a_loaded_model(folder: Path) -> None:
    async def body(worker: Running) -> None:
        lora = {"name": "ink", "path": str(folder / "c")}
        request = {"prompt": "p", "lora": {"name": "ink"}}
        assert (await worker.client.post("/infer", request))[0] == 400
        status, answer = await change(worker, "load", model="default/a", lora=lora)
        assert (status, answer["resident"][0]["loras"]) == (200, ["neon", "ink"])
        assert (await worker.client.post("/infer", request))[0] == 200
        assert (await change(worker, "load", model="default/z", lora=lora))[0] == 409
        status, answer = await change(worker, "unload", model="default/a", lora={"name": "ink"})
        assert (status, answer["resident"][0]["loras"]) == (200, ["neon"])
        assert (await worker.client.post("/infer", request))[0] == 400

    check(folder, FakeEngine(), body)


def test_models_are_bounded(folder: Path) -> None:
    async def body(worker: Running) -> None:
        for at in range(RESIDENTS_MAX - 1):
            assert (await change(worker, "load", model=f"default/m{at}", path=str(folder / "b")))[0] == 200
        status, answer = await change(worker, "load", model="default/more", path=str(folder / "b"))
        assert (status, answer["error"]["code"]) == (507, "NO_CAPACITY")

    check(folder, FakeEngine(), body)
