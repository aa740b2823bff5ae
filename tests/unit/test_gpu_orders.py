"""Orders about single GPUs on the scheduler's side, and what falctl makes of a layout."""

from __future__ import annotations

import asyncio

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_ORDERS_PER_NODE_MAX
from fal_contract.v1 import agent_pb2
from fal_scheduler.gpu_orders import GpuOrders
from falctl.gpus import health_text, parse_layout


class Line:
    """Sessions of nodes: keeps what was pushed."""

    def __init__(self) -> None:
        self.up = True
        self.pushed: list[tuple[str, agent_pb2.GpuOrder]] = []
        self.more = asyncio.Event()

    def push(self, node_id: str, message: agent_pb2.SchedulerMessage) -> bool:
        if self.up:
            self.pushed.append((node_id, message.gpu_order))
            self.more.set()
        return self.up

    async def last(self) -> agent_pb2.GpuOrder:
        async with asyncio.timeout(10):
            await self.more.wait()
        self.more.clear()
        return self.pushed[-1][1]


async def failed(job: asyncio.Task[list[str]]) -> FalError:
    with pytest.raises(FalError) as caught:
        await job
    return caught.value


def test_an_order_is_answered_by_its_node_only() -> None:
    async def main() -> None:
        line = Line()
        orders = GpuOrders(line.push)
        job = asyncio.create_task(orders.give("n-1", "GPU-1", "mig", ["1g.10gb"], timeout_s=10))
        order = await line.last()
        assert (order.gpu, order.action, list(order.layout), order.timeout_s) == ("GPU-1", "mig", ["1g.10gb"], 10)
        orders.take("n-2", agent_pb2.GpuOrderResult(id=order.id, error="no"))
        orders.take("n-1", agent_pb2.GpuOrderResult(id=order.id + 1, error="no"))
        orders.take("n-1", agent_pb2.GpuOrderResult(id=order.id, lines=["cut"]))
        orders.take("n-1", agent_pb2.GpuOrderResult(id=order.id, error="late"))
        assert await job == ["cut"]
        orders.take("n-1", agent_pb2.GpuOrderResult(id=order.id, error="later"))

    asyncio.run(main())


def test_a_node_that_refuses_is_silent_or_slow() -> None:
    async def main() -> None:
        line = Line()
        orders = GpuOrders(line.push)
        job = asyncio.create_task(orders.give("n-1", "GPU-1", "release"))
        order = await line.last()
        orders.take("n-1", agent_pb2.GpuOrderResult(id=order.id, error="it is held", remedy="Wait."))
        error = await failed(job)
        assert (error.code, error.what, error.remedy) == (Code.FAILED_PRECONDITION, "it is held", "Wait.")

        job = asyncio.create_task(orders.give("n-1", "GPU-1", "release"))
        await line.last()
        orders.node_gone("n-2")
        assert not job.done()
        orders.node_gone("n-1")
        assert (await failed(job)).code is Code.UNAVAILABLE

        slow = asyncio.create_task(orders.give("n-1", "GPU-1", "release", timeout_s=0.01))
        assert (await failed(slow)).code is Code.TIMEOUT
        line.up = False
        assert (await failed(asyncio.create_task(orders.give("n-1", "GPU-1", "release")))).code is Code.UNAVAILABLE

    asyncio.run(main())


def test_a_node_gets_so_many_at_once() -> None:
    async def main() -> None:
        orders = GpuOrders(Line().push)
        jobs = [asyncio.create_task(orders.give("n-1", "GPU-1", "release")) for _ in range(GPU_ORDERS_PER_NODE_MAX)]
        await asyncio.sleep(0)
        assert (await failed(asyncio.create_task(orders.give("n-1", "GPU-1", "release")))).code is Code.BUSY
        other = asyncio.create_task(orders.give("n-2", "GPU-1", "release"))
        await asyncio.sleep(0)
        assert not other.done()
        for job in (*jobs, other):
            job.cancel()
        await asyncio.gather(*jobs, other, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "profiles"),
    [
        ("1g.10gb", ["1g.10gb"]),
        ("3x1g.10gb+2g.20gb", ["1g.10gb"] * 3 + ["2g.20gb"]),
        ("2x3g.40gb+me", ["3g.40gb", "3g.40gb", "me"]),  # the node says that there is no such profile
        ("1g.10gb + 1g.10gb", ["1g.10gb", "1g.10gb"]),
        ("", []),
        ("8x1g.10gb", None),
        ("0x1g.10gb", None),
        ("1g.10gb++2g.20gb", None),
    ],
)
def test_layouts(text: str, profiles: list[str] | None) -> None:
    if profiles is not None:
        assert parse_layout(text) == profiles
    else:
        with pytest.raises(FalError) as caught:
            parse_layout(text)
        assert (caught.value.code, caught.value.field) == (Code.INVALID, "--layout")


def test_health_in_words() -> None:
    row = {"health": "OK", "health_state": "", "health_class": "", "health_reason": ""}
    assert health_text(row) == "OK"
    assert health_text(row | {"health": "QUARANTINED", "health_reason": "in use"}) == "QUARANTINED: in use"
    sick = {"health_state": "diagnosing", "health_class": "reset", "health_reason": "XID 48"}
    assert health_text(row | sick) == "DIAGNOSING (reset): XID 48"
