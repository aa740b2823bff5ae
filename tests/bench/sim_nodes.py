"""Nodes that are no machines: they join over HTTPS, hold real gRPC streams and obey; and a look at a process."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import psutil

from fal_contract.identity import Identity, Role, dns_name_of, new_csr, new_key
from fal_contract.join_token import parse_token
from fal_contract.join_wire import JOIN_PATH, JoinReply, JoinRequest
from fal_contract.limits import HEARTBEAT_INTERVAL_S
from fal_contract.tls import pinned_client_context
from fal_contract.v1 import agent_pb2
from scheduler_process import Process, RemoteAgent

NODES_PER_ADDRESS = 40  # joins are limited per address and minute


class Usage:
    """Looks at one process from outside."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def memory(self) -> dict[str, float]:
        """MiB resident, proportional, unique."""
        found = self._process.memory_full_info()
        return {name: getattr(found, name) / 2**20 for name in ("rss", "pss", "uss")}

    async def idle_cpu(self, seconds_s: float) -> float:
        """Percent of one core over so long."""
        before, begun_s = self.cpu_s(), time.perf_counter()
        await asyncio.sleep(seconds_s)
        return 100.0 * (self.cpu_s() - before) / (time.perf_counter() - begun_s)

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        spent = self._process.cpu_times()
        return spent.user + spent.system


class SimNode(RemoteAgent):
    """An obedient node with heartbeats that tell how far it has followed its assignments."""

    _revision = 0

    async def _receive(self, message: agent_pb2.SchedulerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind in ("complete", "delta"):
            self._revision = (message.complete if kind == "complete" else message.delta).revision
        await super()._receive(message)

    def _say(self, message: agent_pb2.AgentMessage) -> None:
        if message.HasField("report"):
            message.report.assignments_revision = self._revision
        super()._say(message)

    async def beat(self, delay_s: float) -> None:
        """A heartbeat every interval, for ever."""
        await asyncio.sleep(delay_s)
        while True:
            self.report()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)


async def joined(process: Process, token_text: str, ca_pem: bytes, number: int) -> Identity:
    """A node that joined; few share an address."""
    token, key = parse_token(token_text), new_key()
    name = f"sim{number:04d}"
    request = JoinRequest(
        token_id=token.id, secret=token.secret, csr=new_csr(key, name).decode(), node_name=name, boot_id="b"
    )
    connector = aiohttp.TCPConnector(local_addr=(f"127.0.1.{number // NODES_PER_ADDRESS + 1}", 0))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(
            f"https://127.0.0.1:{process.ports['join']}{JOIN_PATH}",
            data=request.model_dump_json(),
            headers={"Content-Type": "application/json"},
            ssl=pinned_client_context(ca_pem),
            server_hostname=dns_name_of(_cluster_id(process), Role.SCHEDULER),
        ) as answer,
    ):
        body = await answer.read()
        assert answer.status == 200, body
    reply = JoinReply.model_validate_json(body)
    return Identity.issued(cert_pem=reply.certificate.encode(), key_pem=key, ca_pem=ca_pem)


def _cluster_id(process: Process) -> str:
    return Identity.load(process.data / "operator").peer.cluster_id
