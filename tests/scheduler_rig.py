"""A leader over a store in memory, without sockets, and agents that speak the session protocol to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fal_contract.clock import SystemClock
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api import apps, pools
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.events import CreateToken, RedeemToken
from fal_scheduler.core.tokens import create
from fal_scheduler.leader import Leader
from fal_scheduler.leadership import CurrentLeadership, Leadership
from fal_scheduler.revocations import RevocationIndex
from fal_scheduler.store.interface import Store
from fal_scheduler.store.memory import MemoryBackend, MemoryStore

CLUSTER = "c-test00000000"
ACTOR = "operator/ada"


async def eventually(check: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Wait until `check` holds."""
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110  (a deadline, and nothing to wait on)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def leading(folder: Path, store: Store | None = None) -> AsyncIterator[Leadership]:
    """A leader in its term; everything it keeps lies in `folder`."""
    async with campaigning(folder, store or MemoryStore(MemoryBackend())) as current:
        yield current.get()


@asynccontextmanager
async def campaigning(folder: Path, store: Store) -> AsyncIterator[CurrentLeadership]:
    """A process that leads now, and again after every loss."""
    identity = folder / "identity"
    clock = SystemClock()
    if identity.exists():
        ca = CertificateAuthority.open(identity)
    else:
        ca = CertificateAuthority.create(identity, cluster_id=CLUSTER, now_s=clock.wall_s())
    current, revocations = CurrentLeadership(), RevocationIndex()
    leader = Leader(
        store=store,
        ca=ca,
        clock=clock,
        data_dir=folder,
        model_roots=(),
        holder="test",
        current=current,
        revocations=revocations,
        cut_revoked=lambda: None,
    )
    task = asyncio.create_task(leader.run())
    began = asyncio.create_task(leader.began.wait())
    await asyncio.wait({task, began}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    if task.done():
        began.cancel()
        task.result()
    try:
        yield current
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def join(leader: Leadership, node_id: str, *, pool: str = "p") -> None:
    """Make pool and node as a join does."""
    await pools.apply_pool(leader, cluster_pb2.ApplyPoolRequest(pool=state_pb2.Pool(name=pool, cloud="metal")), ACTOR)
    now_s = leader.clock.wall_s()
    token = create(f"t-{node_id}", "secret", pool=pool, ttl_s=60, uses=1, created_by=ACTOR, now_s=now_s)
    await leader.engine.submit(CreateToken(token))
    await leader.engine.submit(RedeemToken(token.id, "secret", node_id, f"name-{node_id}"))


class Agent:
    """A node that obeys: every assignment is started at once, or ended at once. `gpus`: of 80 GB H100s."""

    def __init__(self, leader: Leadership, node_id: str, *, gpus: int = 8, boot_id: str = "b1") -> None:
        self.node_id = node_id
        self.cluster_id = CLUSTER
        self.term_seen = 0
        self.epoch_seen = 0
        self.incarnation = ""
        self.welcome: agent_pb2.Welcome | None = None
        self.held: dict[str, agent_pb2.Assignment] = {}
        self.statuses: dict[str, agent_pb2.RunnerStatus] = {}
        self.gateways: agent_pb2.GatewaySet | None = None
        self.revoked: list[str] = []
        self.logs: list[str] = ["first line", "second line"]
        self.log_error = ""
        self.features: tuple[str, ...] = ()
        self.on_assignment: Callable[[agent_pb2.Assignment], agent_pb2.RunnerStatus | None] = self._obey
        self._leader = leader
        self._gpus = gpus
        self._boot_id = boot_id
        self._up: asyncio.Queue[agent_pb2.AgentMessage | None] = asyncio.Queue()
        self._seq = 0
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Agent:
        self.dial()
        await eventually(lambda: self._leader.view.health_of(self.node_id) == "ready")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()
        assert self.task is not None
        await asyncio.gather(self.task, return_exceptions=True)

    def dial(self) -> None:
        """Open a session."""
        self._up, self._seq = asyncio.Queue(), 0
        gpus = [
            agent_pb2.Gpu(
                id=f"GPU-{self.node_id}-{n}", index=n, model="H100-80GB", memory_bytes=80 << 30,
                health=agent_pb2.GPU_HEALTH_OK,
            )
            for n in range(self._gpus)
        ]  # fmt: skip
        hello = agent_pb2.Hello(
            versions=agent_pb2.Versions(min=1, max=1, software="test"),
            node_id=self.node_id,
            boot_id=self._boot_id,
            inventory=agent_pb2.Inventory(gpus=gpus, cpu_milli=64000, memory_bytes=512 << 30),
            runners=list(self.statuses.values()),
            endpoints=[agent_pb2.Endpoint(network="lan", host="10.0.0.1", port=7443)],
            capabilities=agent_pb2.Capabilities(driver="fake", isolates=True, features=self.features),
            cluster_id=self.cluster_id if self.statuses else "",
            term_seen=self.term_seen,
            epoch_seen=self.epoch_seen,
            incarnation=self.incarnation,
        )
        self._say(agent_pb2.AgentMessage(hello=hello))
        self.task = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        await self._leader.sessions.run(self.node_id, self._incoming(), self._receive)

    def hang_up(self) -> None:
        """Close the stream."""
        self._up.put_nowait(None)

    def report(self, *statuses: agent_pb2.RunnerStatus, gone: tuple[str, ...] = ()) -> None:
        """Tell what changed."""
        for status in statuses:
            self.statuses[status.runner_id] = status
        for runner_id in gone:
            self.statuses.pop(runner_id, None)
        self._say(agent_pb2.AgentMessage(report=agent_pb2.Report(runners=statuses, gone=gone)))

    def tell_access(self, access: agent_pb2.AccessList) -> None:
        """Report what a recorded start has read."""
        self._say(agent_pb2.AgentMessage(report=agent_pb2.Report(access=[access])))

    def tell_event(self, kind: str, subject: str, message: str) -> None:
        """Report an event of the node."""
        event = agent_pb2.NodeEvent(time_s=1.0, kind=kind, subject=subject, message=message)
        self._say(agent_pb2.AgentMessage(report=agent_pb2.Report(events=[event])))

    def _say(self, message: agent_pb2.AgentMessage) -> None:
        self._seq += 1
        message.seq = self._seq
        self._up.put_nowait(message)

    async def _incoming(self) -> AsyncIterator[agent_pb2.AgentMessage]:
        while (message := await self._up.get()) is not None:
            yield message

    async def _receive(self, message: agent_pb2.SchedulerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "welcome":
            self.welcome = message.welcome
        elif kind == "complete":
            self.held = {x.runner_id: x for x in message.complete.assignments}
            self._take(message.complete.assignments)
        elif kind == "delta":
            for runner_id in message.delta.drop:
                self.held.pop(runner_id, None)
            self.held.update({x.runner_id: x for x in message.delta.put})
            self._take(message.delta.put)
        elif kind == "revocations":
            self.revoked = [one.subject for one in message.revocations.revoked]
        elif kind == "gateways":
            self.gateways = message.gateways
        elif kind == "log_request" and not message.log_request.cancel:
            lines = [agent_pb2.LogLine(stream="stdout", text=text) for text in self.logs]
            end = bool(self.log_error) or not message.log_request.follow
            chunk = agent_pb2.LogChunk(id=message.log_request.id, lines=lines, end=end, error=self.log_error)
            self._say(agent_pb2.AgentMessage(log_chunk=chunk))

    def _take(self, assignments: object) -> None:
        for assignment in assignments:  # type: ignore[attr-defined]
            status = self.on_assignment(assignment)
            if status is not None:
                self.report(status)
                if status.state == state_pb2.RUNNER_STATE_TERMINATED:
                    self.report(gone=(status.runner_id,))

    def _obey(self, assignment: agent_pb2.Assignment) -> agent_pb2.RunnerStatus:
        running = assignment.goal == state_pb2.GOAL_RUN
        return status_of(assignment, state_pb2.RUNNER_STATE_IDLE if running else state_pb2.RUNNER_STATE_TERMINATED)


def status_of(assignment: agent_pb2.Assignment, state: int, **more: object) -> agent_pb2.RunnerStatus:
    """The status of what an assignment asked for."""
    return agent_pb2.RunnerStatus(
        runner_id=assignment.runner_id,
        assignment_id=assignment.id,
        term=assignment.term,
        app=assignment.app,
        revision=assignment.revision,
        state=state,  # type: ignore[arg-type]
        gpus=assignment.gpus,
        max_multiplexing=assignment.spec.scaling.max_multiplexing or 1,
        memory_bytes=assignment.spec.resources.memory_bytes,
        cpu_milli=assignment.spec.resources.cpu_milli,
        **more,  # type: ignore[arg-type]
    )


def app_request(
    name: str = "a", *, runners: int = 1, expected: int | None = None, **fields: object
) -> cluster_pb2.ApplyAppRequest:
    """An app of team t that runs `true` on one GPU."""
    from fal_contract.manifest import AppManifest

    more: dict[str, object] = {"command": ["true"], "min_concurrency": runners, "max_concurrency": 10, **fields}
    manifest = AppManifest.model_validate({"team": "t", "name": name, "image": "host", **more})
    return cluster_pb2.ApplyAppRequest(id=f"t/{name}", spec=manifest.to_proto(), expected_generation=expected)


async def deployed(leader: Leadership, name: str = "a", **more: object) -> None:
    """Apply an app and wait until its runners are ready."""
    request = app_request(name, **more)  # type: ignore[arg-type]
    await apps.apply_app(leader, request, ACTOR)
    wanted = request.spec.scaling.min_concurrency
    await eventually(lambda: ready(leader, name) == wanted)


def ready(leader: Leadership, name: str = "a") -> int:
    """How many runners of an app are ready."""
    view = apps.get_app(leader, cluster_pb2.GetAppRequest(id=f"t/{name}"))
    return sum(1 for runner in view.runners if runner.state == state_pb2.RUNNER_STATE_IDLE)


Test = Callable[[Leadership], Awaitable[None]]
