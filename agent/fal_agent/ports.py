"""What the node's logic needs of the world: weight cache, proxy, probes, machine, files.

The driver's protocol is `fal_runtime.driver.Driver`, the journal's `fal_agent.journal.Journal`. The real ones are put
together in fal_agent.main; the simulation and the tests give fakes. Errors are FalError; a retryable code means
that the agent tries again by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fal_agent.core.admission import GpuView
from fal_agent.proxy.messages import GatewayEntry, RunnerEntry
from fal_contract.revocation import RevokedPeer
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.network.reach import Port


class WeightCache(Protocol):
    """The node's fsd. Every call is idempotent."""

    async def stage(self, artifact: agent_pb2.Artifact, owner: str) -> Path:
        """The folder with the artifact's files, all digests checked, pinned for `owner`. CORRUPT, UNAVAILABLE …"""
        ...

    async def view(self, artifact: agent_pb2.Artifact, owner: str, *, record: bool = False) -> tuple[Path, bool]:
        """The folder in which the artifact can be read soonest, and whether that is the finished one.

        An unfinished one is a mount whose reads wait for what they need; where there is none, it is waited for.
        `record`: through a mount even if it is finished, where there are mounts, until `take_access`.
        """
        ...

    async def take_access(self, artifact_id: str) -> list[int]:
        """The pieces that were read through the mount, in order of first use; ends their recording."""
        ...

    async def ingest(
        self, folder: Path, *, model: str, bytes_max: int, owner: str, keep_s: float, kind: str = "cache"
    ) -> state_pb2.ModelManifest:
        """Take a folder's files in as an artifact, kept for `owner` so long. INVALID, NO_CAPACITY …"""
        ...

    async def cancel_reads(self, pids: Sequence[int]) -> None:
        """End what these processes wait for in unfinished files."""
        ...

    async def unpin(self, owner: str, artifact: str = "") -> None:
        """Let go of all pins of `owner`, or of that on one artifact (its id or manifest digest)."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What the proxy knows of one runner. `last_used_age_s` is -1 before the first request ended."""

    in_flight: int = 0
    served: int = 0
    last_used_age_s: float = -1.0
    busy_s: float = 0.0  # with a request under way


class ProxyPort(Protocol):
    """The node's proxy. Calls fail with UNAVAILABLE while it is away; what it serves it serves on."""

    async def put(self, entry: RunnerEntry) -> None:
        """Send requests to this runner."""
        ...

    async def drain(self, runner_id: str) -> None:
        """Send no new ones. Unknown runners are fine."""
        ...

    async def remove(self, runner_id: str) -> None:
        """Forget it. Unknown runners are fine."""
        ...

    async def usage(self, runner_id: str) -> Usage:
        """Fresh counts."""
        ...

    async def set_term(self, term: int) -> None:
        """The leader's term, for tickets."""
        ...

    async def set_gateways(self, gateways: Sequence[GatewayEntry]) -> None:
        """All gateways that want a tunnel."""
        ...

    async def set_revoked(self, peers: Sequence[RevokedPeer]) -> None:
        """All certificates of callers that are refused."""
        ...


class Prober(Protocol):
    """Asks a worker over its unix socket, or on its port."""

    async def ask(self, socket: Path | Port, path: str, timeout_s: float) -> str:
        """Empty when `path` answered 200 in time, else what happened instead. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class MachineView:
    """One look at the machine. `inventory.generation` rises with every change worth telling."""

    inventory: agent_pb2.Inventory
    gpus: Mapping[str, GpuView]
    memory_bytes: int = 0
    cpu_milli: int = 0
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # GPU id → device nodes
    cdi: Mapping[str, str] = field(default_factory=dict)  # GPU id → CDI name, of those that have one


class Machine(Protocol):
    """The node's hardware."""

    async def look(self) -> MachineView:
        """What is there now."""
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where files of runners lie on this host, and what a container runs when its app names no command."""

    sockets: Path  # short: a unix socket's path has 107 bytes
    models: Path
    runners: Path
    worker_command: tuple[str, ...]
    worker_env: Mapping[str, str] = field(default_factory=dict)  # what finds our packages; an app's own wins


OnEvent = Callable[[str, str, str], None]  # kind, subject, message
OnAccess = Callable[[agent_pb2.AccessList], None]
Sleep = Callable[[float], Awaitable[None]]
# Address of a worker, path, body (None: GET), seconds: see fal_agent.worker_control.
Control = Callable[[Path | Port, str, Mapping[str, object] | None, float], Awaitable[Mapping[str, Any]]]
