"""`falctl runner exec` against a stub: a command that ends before its input has been told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import pytest

from fal_contract.errors import FalError
from fal_contract.v1 import agent_pb2, cluster_pb2
from falctl.remote_command import Streams, run_remote


class _Ended(grpc.aio.AioRpcError):
    def __init__(self) -> None:
        super().__init__(
            grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core", None
        )


class Call:
    """A stream whose other side ends at once: every further write fails, as gRPC's does, and so does its end."""

    def __init__(self, outputs: list[agent_pb2.ExecOutput]) -> None:
        self._outputs = outputs
        self._refused = asyncio.Event()
        self.cancelled = False

    async def write(self, request: cluster_pb2.ExecRequest) -> None:
        if not request.HasField("open"):
            self._refused.set()
            raise _Ended

    async def read(self) -> object:
        if len(self._outputs) == 1:  # the last word comes after the write has failed
            await self._refused.wait()
        return cluster_pb2.ExecReply(output=self._outputs.pop(0)) if self._outputs else grpc.aio.EOF

    async def done_writing(self) -> None:
        raise _Ended

    def cancel(self) -> None:
        self.cancelled = True


class Stub:
    def __init__(self, call: Call) -> None:
        self._call = call

    def ExecRunner(self) -> Call:
        return self._call


def ran(outputs: list[agent_pb2.ExecOutput], out: Path) -> tuple[int, str, bool]:
    async def go(streams: Streams) -> tuple[int, bool]:
        call = Call(outputs)
        return await run_remote(Stub(call), "default/a", ("true",), streams), call.cancelled

    with Path(os.devnull).open("rb") as nothing, out.open("wb") as kept:
        code, cancelled = asyncio.run(asyncio.wait_for(go(Streams(nothing.fileno(), kept.fileno())), 20))
    return code, out.read_text(), cancelled


def test_a_command_that_ended_before_its_input_keeps_its_exit_code(tmp_path: Path) -> None:
    outputs = [
        agent_pb2.ExecOutput(),
        agent_pb2.ExecOutput(stream="stdout", data=b"done\n"),
        agent_pb2.ExecOutput(end=True, exit_code=7),
    ]
    assert ran(outputs, tmp_path / "out") == (7, "done\n", True)


def test_an_error_of_the_other_side_is_told_not_the_failed_write(tmp_path: Path) -> None:
    outputs = [agent_pb2.ExecOutput(), agent_pb2.ExecOutput(end=True, error="the node is gone")]
    with pytest.raises(FalError, match="the node is gone"):
        ran(outputs, tmp_path / "out")
