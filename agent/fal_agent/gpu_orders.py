"""Orders about single GPUs that come down a session, and their answers up it. One object per session.

What an order has begun goes on when the session ends (fal_agent.gpu_care): the same order in the next one joins it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_ORDER_TIMEOUT_S, GPU_ORDERS_PER_NODE_MAX
from fal_contract.v1 import agent_pb2

Send = Callable[[agent_pb2.AgentMessage], Awaitable[None]]
CarryOut = Callable[[agent_pb2.GpuOrder], Awaitable[agent_pb2.GpuOrderResult]]


async def no_gpus(order: agent_pb2.GpuOrder) -> agent_pb2.GpuOrderResult:
    """Where nobody keeps watch over GPUs."""
    what = f"this node's agent carries out no orders about GPUs, {order.action!r} was one"
    return agent_pb2.GpuOrderResult(id=order.id, error=what, remedy="Upgrade the agent.")


class GpuOrders:
    """`carry_out` never raises but for cancellation."""

    def __init__(self, carry_out: CarryOut, send: Send) -> None:
        self._carry_out = carry_out
        self._send = send
        self._waiting: dict[int, asyncio.Task[None]] = {}

    def take(self, order: agent_pb2.GpuOrder) -> None:
        """Begin one; it answers by itself. One that came already is under way."""
        if order.id in self._waiting:
            return
        busy = len(self._waiting) >= GPU_ORDERS_PER_NODE_MAX
        task = asyncio.create_task(self._answer(order, busy), name=f"GPU order {order.id}")
        self._waiting[order.id] = task
        task.add_done_callback(lambda _: self._waiting.pop(order.id, None))

    async def _answer(self, order: agent_pb2.GpuOrder, busy: bool) -> None:
        timeout_s = min(order.timeout_s or GPU_ORDER_TIMEOUT_S, 2 * GPU_ORDER_TIMEOUT_S)
        try:
            async with asyncio.timeout(timeout_s):
                if busy:
                    raise FalError(Code.BUSY, f"{GPU_ORDERS_PER_NODE_MAX} orders are under way", remedy="Try later.")
                result = await self._carry_out(order)
        except TimeoutError:
            what = f"it was not done within {timeout_s:g} s, and goes on"
            result = agent_pb2.GpuOrderResult(id=order.id, error=what, remedy="Give the same order again.")
        except FalError as exc:
            result = agent_pb2.GpuOrderResult(id=order.id, error=exc.what, remedy=exc.remedy)
        await self._send(agent_pb2.AgentMessage(gpu_result=result))

    async def close(self) -> None:
        """Wait for no answer any more."""
        for task in list(self._waiting.values()):
            task.cancel()
        await asyncio.gather(*self._waiting.values(), return_exceptions=True)


__all__ = ["CarryOut", "GpuOrders", "no_gpus"]
