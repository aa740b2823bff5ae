"""What a live worker has loaded follows its assignment: staged, shown, loaded; told; let go, unpinned; never fatal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent_fakes import Box, assignment, model, until, welcome
from fal_agent import wire, worker_control
from fal_agent.core.tasks import Phase
from fal_agent.launch import container_id
from fal_agent.node import Node
from fal_contract.errors import Code, FalError
from fal_contract.v1 import agent_pb2, state_pb2
from virtual_time import LoopClock, run_virtually

RUNNER = "default/digits-00000001"


@dataclass
class Worker:
    """What a worker would answer. `refuse`: models that do not load; `busy`: so many changes are told to wait."""

    models: dict[str, list[str]] = field(default_factory=lambda: {"default/a": []})
    refuse: set[str] = field(default_factory=set)
    busy: int = 0
    asked: list[str] = field(default_factory=list)

    async def __call__(
        self, address: object, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Mapping[str, Any]:
        del address, timeout_s
        if body is not None:
            name, lora = str(body["model"]), str(body.get("lora", {}).get("name", ""))
            self.asked.append(f"{path} {lora or name}")
            await asyncio.sleep(1.0)
            self._change(path, name, lora)
        return {"resident": [{"model": one, "loras": loras, "bytes": 7} for one, loras in self.models.items()]}

    def _change(self, path: str, name: str, lora: str) -> None:
        if self.busy:
            self.busy -= 1
            raise FalError(Code.BUSY, "another is being changed", remedy="Try again.")
        if path == "/load" and (lora or name) in self.refuse:
            raise FalError(Code.RUNNER_FAILED, "shapes differ", remedy="Look at its log.")
        if path == "/load":
            self.models.setdefault(name, []).extend([lora] if lora else [])
        elif lora:
            self.models[name].remove(lora)
        else:
            del self.models[name]


def play(tmp_path: Path, scenario: Callable[[Box, Worker], Awaitable[None]]) -> None:
    async def main() -> None:
        box, worker = Box(tmp_path, LoopClock()), Worker()
        box.control = worker
        await scenario(box, worker)

    run_virtually(main())


def wants(*names: str) -> list[agent_pb2.Assignment]:
    """The runner with these models; one with "@" is a LoRA of what follows it."""
    residencies, artifacts = [], []
    for name in names:
        own, _, base = name.partition("@")
        residencies.append(state_pb2.Residency(id=name, model=own, base=base))
        artifact = model(own, "lora" if base else "model")
        artifact.artifact_id = f"id of {own}"
        artifacts.append(artifact)
    return [assignment(RUNNER, share_group="g", residencies=residencies, artifacts=artifacts)]


async def begin(box: Box) -> Node:
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    await node.receive(
        wire.complete_of(agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=wants("default/a")))
    )
    await until(lambda: states(node) == {"default/a": "loaded"})
    return node


async def change(node: Node, base: int, *names: str) -> None:
    delta = agent_pb2.Delta(base=base, revision=base + 1, term=1, store_revision=1, put=wants(*names))
    await node.receive(wire.delta_of(delta))


def status(node: Node) -> agent_pb2.RunnerStatus:
    [found] = node.hello().runners
    return found


def states(node: Node) -> dict[str, str]:
    """Read without the marks of a report."""
    told = agent_pb2.RunnerStatus()
    runners: Sequence[Any] = list(node._runners.values())
    for runner in runners:
        runner.residents.tell(told)
    return {one.id: one.state for one in told.residents}


def shown(box: Box) -> set[str]:
    return set(box.machine.containers[container_id(RUNNER)].models)


def test_a_model_comes_beside_the_first_and_goes_again(tmp_path: Path) -> None:
    async def scenario(box: Box, worker: Worker) -> None:
        node = await begin(box)
        await change(node, 1, "default/a", "default/b")
        await until(lambda: states(node) == {"default/a": "loaded", "default/b": "loaded"})
        assert shown(box) == {"default.a", "default.b"}
        told = status(node)
        assert [one.model for one in told.residencies] == ["default/a", "default/b"]
        assert [(one.bytes, one.load_seconds >= 1.0) for one in told.residents] == [(7, False), (7, True)]
        assert "default/b" in box.cache.pins[RUNNER]
        node.welcome(wire.leader_of(welcome()))  # a hello begins a session anew
        await node.receive(
            wire.complete_of(agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=wants("default/b")))
        )
        await until(lambda: states(node) == {"default/b": "loaded"} and shown(box) == {"default.b"})
        assert box.cache.unpinned == [(RUNNER, "id of default/a")]
        assert worker.asked == ["/load default/b", "/unload default/a"]
        await node.close()

    play(tmp_path, scenario)


def test_a_model_that_does_not_load_is_told_and_ends_nothing(tmp_path: Path) -> None:
    async def scenario(box: Box, worker: Worker) -> None:
        worker.refuse.add("default/b")
        node = await begin(box)
        await change(node, 1, "default/a", "default/b", "default/c")
        await until(lambda: states(node).get("default/c") == "loaded")
        assert states(node) == {"default/a": "loaded", "default/b": "failed", "default/c": "loaded"}
        assert "shapes differ" in next(one.reason for one in status(node).residents if one.id == "default/b")
        assert node.tasks()[0].phase is Phase.SERVING
        await asyncio.sleep(600)
        assert worker.asked.count("/load default/b") == 1, "it is not tried for ever"
        await node.close()

    play(tmp_path, scenario)


def test_files_that_never_come_fail_that_residency_and_a_busy_worker_is_asked_again(tmp_path: Path) -> None:
    async def scenario(box: Box, worker: Worker) -> None:
        box.cache.refuse["default/b"] = FalError(Code.CORRUPT, "a digest differs", remedy="Add it again.")
        worker.busy = 3
        node = await begin(box)
        await change(node, 1, "default/a", "default/b", "default/c")
        await until(lambda: states(node).get("default/c") == "loaded")
        assert states(node)["default/b"] == "failed"
        assert worker.asked == ["/load default/c"] * 4
        await node.close()

    play(tmp_path, scenario)


def test_loras_come_after_their_model_and_go_before_it(tmp_path: Path) -> None:
    async def scenario(box: Box, worker: Worker) -> None:
        node = await begin(box)
        await change(node, 1, "default/a", "default/ink@default/b", "default/b")
        await until(lambda: states(node).get("default/ink@default/b") == "loaded")
        await change(node, 2, "default/a")
        await until(lambda: states(node) == {"default/a": "loaded"})
        assert worker.asked == ["/load default/b", "/load ink", "/unload ink", "/unload default/b"]
        await node.close()

    play(tmp_path, scenario)


def test_a_new_agent_asks_the_worker_what_it_has(tmp_path: Path) -> None:
    async def scenario(box: Box, worker: Worker) -> None:
        first = await begin(box)
        await change(first, 1, "default/a", "default/b")
        await until(lambda: states(first).get("default/b") == "loaded")
        await first.close()
        second = box.agent(agent_id="a-2")
        await second.start()
        await until(lambda: states(second) == {"default/a": "loaded", "default/b": "loaded"})
        assert worker.asked == ["/load default/b"]
        await second.close()

    play(tmp_path, scenario)


def test_a_worker_is_asked_within_bounds_whatever_it_answers(tmp_path: Path) -> None:
    """The real client against sockets that misbehave: each is one FalError."""

    async def answer_with(raw: bytes) -> FalError | Mapping[str, Any]:
        path = tmp_path / "w"
        path.unlink(missing_ok=True)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_unix_server(serve, str(path)):
            try:
                return await worker_control.ask(path, "/load", {"model": "m"}, 5.0)
            except FalError as error:
                return error

    async def main() -> None:
        good = await answer_with(b'HTTP/1.1 200 OK\r\n\r\n{"resident": []}')
        assert good == {"resident": []}
        said = await answer_with(b'HTTP/1.1 503 x\r\n\r\n{"error": {"code": "BUSY", "what": "wait"}}')
        assert isinstance(said, FalError)
        assert (said.code, said.what) == (Code.BUSY, "wait")
        pieces = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        for raw in (b"", b"SSH-2.0\r\n", b"HTTP/1.1 abc\r\n\r\n", pieces):
            odd = await answer_with(raw)
            assert isinstance(odd, FalError)
            assert odd.code is Code.UNAVAILABLE
        odd = await answer_with(b'HTTP/1.1 500 x\r\n\r\n{"error": {"code": "MINE"}}')
        assert isinstance(odd, FalError)
        assert odd.code is Code.RUNNER_FAILED
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "w")
        with pytest.raises(FalError, match="is not a socket"):
            await worker_control.ask(link, "/readyz", None, 5.0)

    asyncio.run(main())
