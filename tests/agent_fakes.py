"""A node in memory: fakes of everything under fal_agent.node, and links to a scheduler in the test's hand.

`Box` plays the machine: it survives `agent()` objects, as disk, containers, proxy and fsd survive a kill -9.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from cryptography.hazmat.primitives.asymmetric import ec

from fal_agent.core.admission import GpuView
from fal_agent.journal_codec import Record, Recorded, decode, encode
from fal_agent.node import Facts, Node
from fal_agent.packing import Packer
from fal_agent.ports import Control, MachineView, Places, Usage
from fal_agent.proxy.messages import GatewayEntry, ProxyStats, RunnerEntry, RunnerStats
from fal_agent.reboot import Reboot
from fal_agent.runner_secrets import AskSecrets
from fal_agent.tools import Tools
from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.revocation import RevokedPeer
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.fake import FakeDriver
from fal_runtime.fake import Machine as FakeMachine
from fal_runtime.network.reach import Port

MIB = 1 << 20


class MemoryJournal:
    """A journal whose disk is a dict of the box; `full` makes every write fail, `write_s` makes it slow."""

    def __init__(self, disk: list[bytes]) -> None:
        self.disk = disk
        self.full = False
        self.write_s = 0.0

    def recorded(self) -> Recorded:
        recorded = Recorded()
        for payload in self.disk:
            recorded.add(decode(payload))
        return recorded

    async def write(self, *records: Record) -> None:
        if self.write_s:
            await asyncio.sleep(self.write_s)
        if self.full:
            raise FalError(Code.STORE_FAILED, "the journal cannot be written: No space left", remedy="Free space.")
        self.disk.extend(encode(record) for record in records)


class FakeCache:
    """fsd: `stage_s` of waiting, `refuse` maps a model to its error, `away` makes everything UNAVAILABLE."""

    def __init__(self) -> None:
        self.stage_s = 0.0
        self.refuse: dict[str, FalError] = {}
        self.away = False
        self.pins: dict[str, set[str]] = {}
        self.staged: list[str] = []  # models, the whole of which was asked for
        self.mount = False  # whether unfinished artifacts can be read
        self.cancelled: list[int] = []
        self.accesses: dict[str, list[int]] = {}
        self.recording: set[str] = set()  # artifacts
        self.taken_in: list[tuple[Path, str, int, str, float]] = []
        self.unpinned: list[tuple[str, str]] = []  # owner, artifact

    async def view(self, artifact: agent_pb2.Artifact, owner: str, *, record: bool = False) -> tuple[Path, bool]:
        if not self.mount:
            return await self.stage(artifact, owner), True
        self._answer()
        self.pins.setdefault(owner, set()).add(artifact.model)
        if record:
            self.recording.add(artifact.artifact_id)
        return Path("/in-flight") / artifact.model, False

    async def take_access(self, artifact_id: str) -> list[int]:
        self._answer()
        self.recording.discard(artifact_id)
        return self.accesses.pop(artifact_id, [])

    async def cancel_reads(self, pids: Sequence[int]) -> None:
        self._answer()
        self.cancelled += pids

    async def stage(self, artifact: agent_pb2.Artifact, owner: str) -> Path:
        self._answer()
        self.staged.append(artifact.model)
        self.pins.setdefault(owner, set()).add(artifact.model)
        await asyncio.sleep(self.stage_s)
        if artifact.model in self.refuse:
            raise self.refuse[artifact.model]
        return Path("/cache") / artifact.model

    async def ingest(
        self, folder: Path, *, model: str, bytes_max: int, owner: str, keep_s: float, kind: str = "cache"
    ) -> state_pb2.ModelManifest:
        self._answer()
        self.taken_in.append((folder, model, bytes_max, owner, keep_s))
        if model in self.refuse:
            raise self.refuse[model]
        made = state_pb2.ModelManifest(artifact_id="ab" * 32, kind=kind)
        for path in sorted(path for path in folder.rglob("*") if kind == "image" and path.is_file()):
            made.files.add(path=path.name, bytes=path.stat().st_size, sha256=b"s" * 32, blake3=b"b" * 32)
        return made

    async def unpin(self, owner: str, artifact: str = "") -> None:
        self._answer()
        self.unpinned.append((owner, artifact))
        if not artifact:
            self.pins.pop(owner, None)

    def _answer(self) -> None:
        if self.away:
            raise FalError(Code.UNAVAILABLE, "fsd does not answer", remedy="It is started again.")


class FakeProxy:
    """Routes and counts; `away` makes every call fail."""

    def __init__(self) -> None:
        self.away = False
        self.entries: dict[str, RunnerEntry] = {}
        self.draining: set[str] = set()
        self.usages: dict[str, Usage] = {}
        self.term = 0
        self.gateways: list[GatewayEntry] = []
        self.revoked: list[RevokedPeer] = []
        self.seen: list[str] = []

    async def put(self, entry: RunnerEntry) -> None:
        self._answer(f"put {entry.runner_id}")
        self.entries[entry.runner_id] = entry

    async def drain(self, runner_id: str) -> None:
        self._answer(f"drain {runner_id}")
        self.draining.add(runner_id)

    async def remove(self, runner_id: str) -> None:
        self._answer(f"remove {runner_id}")
        self.entries.pop(runner_id, None)

    async def usage(self, runner_id: str) -> Usage:
        self._answer(f"usage {runner_id}")
        return self.usages.get(runner_id, Usage())

    async def set_term(self, term: int) -> None:
        self._answer(f"term {term}")
        self.term = term

    async def set_gateways(self, gateways: Sequence[GatewayEntry]) -> None:
        self._answer("gateways")
        self.gateways = list(gateways)

    async def set_revoked(self, peers: Sequence[RevokedPeer]) -> None:
        self._answer("revoked")
        self.revoked = list(peers)

    def _answer(self, call: str) -> None:
        if self.away:
            raise FalError(Code.UNAVAILABLE, "the proxy does not answer", remedy="It is started again.")
        self.seen.append(call)


class FakeProber:
    """Workers: ready as their container's script says; `sick` names runners whose /livez fails."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.sick: set[str] = set()

    async def ask(self, socket: Path | Port, path: str, timeout_s: float) -> str:
        for container in self._box.machine.containers.values():
            if isinstance(socket, Path) and container.spec.socket_dir == socket.parent:
                after_s, status = container.script.ready_after_s, container.status
                if status.pid is None:
                    return "the worker's socket is not there yet"
                if path == "/livez":
                    return f"{path}: HTTP 500" if container.spec.id in self.sick else ""
                age_s = self._box.clock.wall_s() - (status.started_at_s or 0)
                return "" if after_s is not None and age_s >= after_s else "/readyz: HTTP 503 loading"
        return "the worker's socket is not there yet"


class FakeHardware:
    """GPUs GPU-0 … as fal_agent.ports.Machine; `used` is memory in use by GPU."""

    def __init__(self, gpus: int, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.used: dict[str, int] = {}
        self.unhealthy: dict[str, str] = {}
        self.generation = 1
        self._ids = [f"GPU-{n}" for n in range(gpus)]

    async def look(self) -> MachineView:
        inventory = agent_pb2.Inventory(generation=self.generation, memory_bytes=self.memory_bytes, cpu_milli=64_000)
        for n, id in enumerate(self._ids):
            why = self.unhealthy.get(id, "")
            health = agent_pb2.GPU_HEALTH_QUARANTINED if why else agent_pb2.GPU_HEALTH_OK
            inventory.gpus.add(
                id=id, index=n, model="H100-80GB", memory_bytes=80 << 30, health=health, health_reason=why
            )
        views = {id: GpuView(id, self.unhealthy.get(id, ""), self.used.get(id, 0)) for id in self._ids}
        return MachineView(inventory, views, self.memory_bytes, 64_000)


@dataclass
class Box:
    """One machine with everything that outlives an agent process."""

    root: Path
    clock: Clock
    gpus: int = 4
    rng: Random = field(default_factory=lambda: Random(1))

    def __post_init__(self) -> None:
        self.machine = FakeMachine(clock=self.clock)
        self.disk: list[bytes] = []
        self.cache = FakeCache()
        self.proxy = FakeProxy()
        self.prober = FakeProber(self)
        self.hardware = FakeHardware(self.gpus, 64 << 30)
        self.places = Places(self.root / "s", self.root / "m", self.root / "r", ("worker",))
        self.journal = MemoryJournal(self.disk)
        self.ca_key: ec.EllipticCurvePublicKey | None = None
        self.packer = Packer()
        self.secrets: AskSecrets | None = None
        self.reboot: Reboot | None = None
        self.control: Control | None = None  # None: the real one

    def agent(self, *, agent_id: str = "a-1", node_id: str = "n-000000000001") -> Node:
        """A new agent process on this machine (not started)."""
        self.journal = replace_journal(self.journal)
        capabilities = agent_pb2.Capabilities(
            driver="fake", isolates=True, runtime="fake 1", cgroup="none", features=["images"]
        )
        tools = Tools(
            driver=FakeDriver(self.machine), cache=self.cache, proxy=self.proxy, prober=self.prober,
            machine=self.hardware, places=self.places, clock=self.clock, rng=Random(self.rng.getrandbits(64)),
            on_event=lambda *_: None, save=_unset, ca_key=lambda: self.ca_key, packer=self.packer,
        )  # fmt: skip
        if self.secrets is not None:
            tools = replace(tools, secrets=self.secrets)
        if self.reboot is not None:
            tools = replace(tools, reboot=self.reboot)
        if self.control is not None:
            tools = replace(tools, control=self.control)
        return Node(Facts(node_id, "boot-1", agent_id, capabilities), tools, self.journal)

    def push(self, node: Node) -> None:
        """The proxy pushes its counters to the agent."""
        rows = tuple(
            RunnerStats(id, 1, False, usage.in_flight, usage.served, 0, 0, usage.last_used_age_s)
            for id, usage in sorted(self.proxy.usages.items())
        )
        node.count(ProxyStats("p-1", 0, rows, ()))


def replace_journal(old: MemoryJournal) -> MemoryJournal:
    fresh = MemoryJournal(old.disk)
    fresh.full, fresh.write_s = old.full, old.write_s
    return fresh


async def _unset(_: object) -> None:
    raise AssertionError("the node sets this")


def assignment(runner: str = "default/digits-00000001", **changes: object) -> agent_pb2.Assignment:
    """A wire assignment that every fake node can run; fields of the message by name, `spec` fields too."""
    spec_names = {f.name for f in state_pb2.AppSpec.DESCRIPTOR.fields}
    spec = state_pb2.AppSpec(
        image="host",
        network="none",
        scaling=state_pb2.Scaling(max_multiplexing=2, startup_timeout_s=60, request_timeout_s=100),
        resources=state_pb2.Resources(memory_bytes=512 * MIB),
        probe=state_pb2.Probe(interval_s=10, timeout_s=1, failures_max=3),
    )
    message = agent_pb2.Assignment(
        id=f"as-{runner[-8:]}", term=1, runner_id=runner, goal=state_pb2.GOAL_RUN, app="default/digits", revision=1,
        share_group="default/digits", spec=spec,
    )  # fmt: skip
    for name, value in changes.items():
        part = message.spec if name in spec_names else message
        target = getattr(part, name)
        if hasattr(target, "MergeFrom") and not hasattr(target, "append"):
            target.MergeFrom(value)  # a message: given fields win
        elif hasattr(target, "extend"):
            target.extend(value)
        else:
            setattr(part, name, value)
    return message


def model(name: str = "default/digits-model", kind: str = "model") -> agent_pb2.Artifact:
    return agent_pb2.Artifact(model=name, kind=kind, uri="file:///models", manifest_digest="ab" * 32, bytes=3)


def welcome(**changes: object) -> agent_pb2.Welcome:
    given: dict[str, object] = {"version": 1, "cluster_id": "c-1", "epoch": 1, "incarnation": "i-1", "term": 1}
    return agent_pb2.Welcome(**(given | {"heartbeat_interval_s": 5.0} | changes))  # type: ignore[arg-type]


class Wire:
    """A link in memory. The test is the scheduler: `down` messages, read `up`; `cut` breaks both ways.

    As with gRPC, a `send` that is cancelled while there is no `room` breaks the link, too.
    """

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()
        self.up: asyncio.Queue[agent_pb2.AgentMessage] = asyncio.Queue()
        self.down: asyncio.Queue[agent_pb2.SchedulerMessage | None] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        try:
            await self.room.wait()
        except asyncio.CancelledError:
            self.cut()
            raise
        if self.closed.is_set():
            raise _broken()
        self.up.put_nowait(agent_pb2.AgentMessage.FromString(message.SerializeToString()))

    async def receive(self) -> agent_pb2.SchedulerMessage:
        message = await self.down.get()
        if message is None:
            raise _broken()
        return message

    async def close(self) -> None:
        self.closed.set()

    def tell(self, **kind: object) -> None:
        self.down.put_nowait(agent_pb2.SchedulerMessage(**kind))  # type: ignore[arg-type]

    def cut(self) -> None:
        self.closed.set()
        self.down.put_nowait(None)


class Dial:
    """A dialer: each call makes a Wire, or raises while `refuse` is set."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.refuse: FalError | None = None
        self.at_s: list[float] = []

    async def __call__(self) -> Wire:
        self.at_s.append(asyncio.get_running_loop().time())
        if self.refuse is not None:
            raise self.refuse
        self.wires.append(Wire())
        return self.wires[-1]


def _broken() -> FalError:
    return FalError(Code.UNAVAILABLE, "the stream broke", remedy="It is opened again.")


async def until(what: Callable[[], object], *, within_s: float = 60.0) -> None:
    """Poll on the loop's own time until `what()` is true."""
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110  (anything may make it true)
            await asyncio.sleep(0.01)
