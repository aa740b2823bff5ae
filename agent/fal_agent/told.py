"""The inventory, and what is announced for the machine, as the scheduler is told them. Pure but for protobuf.

Invariant: a GPU that nothing holds but whose memory is in use (a container just ended, or a process that we do
not know) is told as quarantined, so that nothing is placed on it before it is really free.
"""

from __future__ import annotations

from collections.abc import Set

from fal_agent.core.admission import in_use
from fal_agent.core.notice import Announced
from fal_agent.ports import MachineView
from fal_contract.v1 import agent_pb2


def inventory_told(view: MachineView, held: Set[str]) -> agent_pb2.Inventory:
    """A copy of the inventory; `held` are GPUs of live runners."""
    told = agent_pb2.Inventory()
    told.CopyFrom(view.inventory)
    for gpu in told.gpus:
        seen = view.gpus.get(gpu.id)
        if seen is None or gpu.id in held:
            continue
        if gpu.health != agent_pb2.GPU_HEALTH_QUARANTINED and (busy := in_use(seen)) is not None:
            gpu.health = agent_pb2.GPU_HEALTH_QUARANTINED
            gpu.health_reason = busy
    return told


class NoticeTold:
    """What is announced, and whether the scheduler knows. Nothing is told before it is known."""

    def __init__(self) -> None:
        self._now: Announced | None = None
        self._known = False
        self._fresh = False

    def set(self, announced: Announced | None) -> None:
        """What is announced now; None: nothing."""
        self._now, self._known, self._fresh = announced, True, True

    def into_hello(self, hello: agent_pb2.Hello, *, now_s: float) -> None:
        """Whatever is known. `now_s`: Unix seconds."""
        if self._known:
            hello.notice.CopyFrom(self._message(now_s))
            self._fresh = False

    def into_report(self, report: agent_pb2.Report, *, now_s: float) -> None:
        """What changed."""
        if self._fresh:
            report.notice.CopyFrom(self._message(now_s))
            self._fresh = False

    def _message(self, now_s: float) -> agent_pb2.Notice:
        one = self._now
        if one is None:
            return agent_pb2.Notice()
        within_s = -1.0 if one.at_s is None else max(0.0, one.at_s - now_s)
        return agent_pb2.Notice(kind=one.kind, within_s=within_s, reason=one.reason)
