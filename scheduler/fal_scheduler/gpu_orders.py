"""Orders about single GPUs between an operator's call and a node's session.

An order waits for its answer as long as it says; a node that is silent, or whose session ends, fails it at once. The
node goes on with what it has begun: the same order again joins it. Nothing is kept.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_ORDER_TIMEOUT_S, GPU_ORDERS_PER_NODE_MAX
from fal_contract.v1 import agent_pb2

_REMEDY = "Look at `falctl node list`, and give the same order again: one that is under way is joined."
Push = Callable[[str, agent_pb2.SchedulerMessage], bool]


class GpuOrders:
    """All orders of one leader. `push` sends a message to a node, False where it has no session."""

    def __init__(self, push: Push) -> None:
        self._push = push
        self._open: dict[int, tuple[str, asyncio.Future[agent_pb2.GpuOrderResult]]] = {}
        self._ids = itertools.count(1)

    async def give(
        self, node_id: str, gpu: str, action: str, layout: Sequence[str] = (), *, timeout_s: float = GPU_ORDER_TIMEOUT_S
    ) -> list[str]:
        """What the node found and did, a line each.

        FAILED_PRECONDITION: the node refused or failed; UNAVAILABLE: it is silent; TIMEOUT; BUSY: it has many.
        """
        if sum(1 for asked, _ in self._open.values() if asked == node_id) >= GPU_ORDERS_PER_NODE_MAX:
            raise FalError(Code.BUSY, f"{GPU_ORDERS_PER_NODE_MAX} orders wait for node {node_id}", remedy="Try later.")
        id_ = next(self._ids)
        answer: asyncio.Future[agent_pb2.GpuOrderResult] = asyncio.get_running_loop().create_future()
        self._open[id_] = (node_id, answer)
        try:
            order = agent_pb2.GpuOrder(id=id_, gpu=gpu, action=action, layout=layout, timeout_s=timeout_s)
            if not self._push(node_id, agent_pb2.SchedulerMessage(gpu_order=order)):
                raise _silent(node_id)
            async with asyncio.timeout(timeout_s):
                result = await answer
        except TimeoutError:
            what = f"node {node_id} has not done it within {timeout_s:g} s"
            raise FalError(Code.TIMEOUT, what, remedy=_REMEDY) from None
        finally:
            del self._open[id_]
        if result.error:
            raise FalError(Code.FAILED_PRECONDITION, result.error, remedy=result.remedy or "Look at `falctl gpu show`.")
        return list(result.lines)

    def take(self, node_id: str, result: agent_pb2.GpuOrderResult) -> None:
        """An answer; a late one, or another node's, changes nothing."""
        asked, answer = self._open.get(result.id, ("", None))
        if answer is not None and asked == node_id and not answer.done():
            answer.set_result(result)

    def node_gone(self, node_id: str) -> None:
        """Its session ended."""
        for asked, answer in self._open.values():
            if asked == node_id and not answer.done():
                answer.set_exception(_silent(node_id))


def _silent(node_id: str) -> FalError:
    return FalError(Code.UNAVAILABLE, f"node {node_id} does not answer", remedy=_REMEDY)


__all__ = ["GpuOrders"]
