"""Sessions of nodes' weight caches: what they hold comes up, swarms, wishes and withdrawals go down.

One session a node, the newest. Up: CacheHello with everything, then reports; they fill the table of residency, which
is never stored. Down goes Welcome (ticket keys, place, room), what of the node's artifacts must go or has become
ATTESTED, its wishes, its swarms; then whatever changes. What waits to go down is sets of ids, so it cannot grow beyond
what the node holds, and a short queue of requests; a full queue or a send that takes too long ends the session, and
the cache starts over. The scheduler never carries a byte of a model.

Transport-free: `run` is given an async iterator and a send function. Must not decide about placement or runners.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final, Protocol

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import CACHE_EVENTS_PER_REPORT_MAX
from fal_contract.v1 import state_pb2, weights_pb2
from fal_contract.versions import agree
from fal_scheduler import cache_wire
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.cache_outbox import Outbox, Send, Sources
from fal_scheduler.cache_swarms import Swarms
from fal_scheduler.cache_telling import CacheTelling
from fal_scheduler.cache_warmth import Warmth
from fal_scheduler.cache_wishes import Manifests, WishKeeper
from fal_scheduler.core.artifact_standing import standing_of
from fal_scheduler.core.events import Effect, Logged, ModelChanged, NodeChanged, WishesChanged
from fal_scheduler.core.readiness import Readiness
from fal_scheduler.core.records import Model
from fal_scheduler.core.residency import Changed, Counts, ResidencyTable
from fal_scheduler.core.state import State
from fal_scheduler.core.tickets import TicketOffice
from fal_scheduler.engine_port import EnginePort
from fal_scheduler.stream_edges import first_message, send_bounded, until_first
from fal_scheduler.witnesses import Witnesses

TICK_S: Final = 5.0
RENEW_EVERY_TICKS: Final = 12
REKEYED_AT_ONCE_MIN: Final = 50  # and never less than a thirtieth of all: new keys are told within half an hour
MANIFEST_ASKED_MAX: Final = 3  # nodes that are asked for a manifest which was lost
EVENT_QUIET_S: Final = 60.0  # one event of a node for the same thing in this time
EVENTS_KEPT_MAX: Final = 4096
_TEXT_CHARS_MAX: Final = 500


class Registrar(Manifests, Protocol):
    """What is done with what caches tell about content (`models.ModelRegistrar`)."""

    def on_claims(self, node_id: str, claims: weights_pb2.PieceClaims) -> None: ...

    def on_attestation(self, node_id: str, attestation: weights_pb2.Attestation) -> None: ...

    def offer_manifest(self, message: state_pb2.ModelManifest) -> bool: ...

    @property
    def wanted(self) -> tuple[str, ...]:
        """Artifact ids whose manifests this scheduler lacks."""
        ...


class CacheSessions:
    """All caches of one leader. Make a new one for each term; `upkeep` runs beside it, `close` ends all of them."""

    def __init__(
        self,
        engine: EnginePort,
        registrar: Registrar,
        *,
        secret: bytes,
        clock: Clock,
        alarms: EdgeAlarms,
        note: Callable[[Logged], None],
    ) -> None:
        self._engine = engine
        self._registrar = registrar
        self._clock = clock
        self._alarms = alarms
        self._note = note
        self.office = TicketOffice(secret)
        self._sessions: dict[str, Outbox] = {}
        self._noted: dict[tuple[str, str, str], float] = {}
        self.on_manifest: Callable[[str, state_pb2.ModelManifest], bool] = lambda node_id, manifest: False
        self.table = ResidencyTable()
        self.swarms = Swarms(self.table, lambda: engine.view, self.office, clock=clock, tell=self._swarm_due)
        self.wishes = WishKeeper(
            self.table, lambda: engine.view, registrar, clock=clock, alarms=alarms, tell=self._wishes_due
        )
        self.warmth = Warmth(self.table, lambda: engine.view, self.wishes, clock=clock, push=self._push)
        self._sources = Sources(lambda: engine.view, self.table, self.swarms, self.wishes, registrar)
        self.telling = CacheTelling(self.table, lambda: engine.view, engine.offer, clock)
        self.witnesses = Witnesses(lambda: engine.view, engine.offer, clock, self._sessions.__contains__)
        self._generation = TicketOffice.generation(clock.wall_s())
        self._old_keys: dict[str, None] = {}  # nodes that were told keys on another day
        self._unsubscribe = engine.subscribe(self._on_effect)

    @property
    def _view(self) -> State:
        return self._engine.view

    # --- one stream -------------------------------------------------------------------------------------------------

    async def run(self, peer_name: str, incoming: AsyncIterator[weights_pb2.CacheUp], send: Send) -> None:
        """Serve one stream until it ends. Returns when the node closed it; raises FalError to close it."""
        message = await first_message(incoming)
        hello = cache_wire.hello_in(message, peer_name)
        version = agree(f"the cache of node {peer_name}", hello.versions.min, hello.versions.max)
        welcome = self._welcome(peer_name, version)
        session = self._enter(peer_name)
        try:
            changed = self._take_hello(session, hello)
            await send_bounded(send, weights_pb2.CacheDown(welcome=welcome), f"the cache of node {peer_name}")
            session.ready = True
            self._spread(peer_name, changed)
            for holding in list(self.table.node(peer_name).holdings.values()):  # type: ignore[union-attr]
                session.judge(holding)
            self._ask_manifests(peer_name)
            self.swarms.session_began(peer_name)
            self.wishes.nodes_changed()
            self.warmth.session_began(peer_name)
            session.signal.set()
            writer = asyncio.create_task(session.write(send))
            reader = asyncio.create_task(self._read(session, incoming))
            await until_first(session.closed, writer, reader)
        finally:
            self._leave(session)

    def _welcome(self, node_id: str, version: int) -> weights_pb2.CacheWelcome:
        state = self._view
        node = state.nodes.get(node_id)
        if node is None or node.revoked:
            raise FalError(
                Code.PERMISSION_DENIED,
                f"node {node_id} is {'revoked' if node is not None else 'not known'}",
                remedy="Join again with a new token.",
            )
        assert state.meta is not None, "a leader has loaded its store"
        pool = state.pools.get(node.pool)
        return weights_pb2.CacheWelcome(
            version=version,
            cluster_id=state.meta.cluster_id,
            term=state.term,
            ticket_keys=self.office.keys(node_id, self._clock.wall_s()),
            pool=node.pool,
            region=pool.region if pool is not None else "",
            zone=state.domain_of(node_id),
            trusted_network=pool is not None and pool.trusted_network,
            disk_bytes_max=pool.cache_bytes if pool is not None else 0,
        )

    def _enter(self, node_id: str) -> Outbox:
        session = Outbox(node_id, self._sources, asyncio.get_running_loop().create_future())
        older = self._sessions.get(node_id)
        self._sessions[node_id] = session
        if older is not None:
            what = f"a newer session of the cache of node {node_id} took this one's place"
            older.close(FalError(Code.UNAVAILABLE, what, remedy="Nothing to do where fsd has restarted."))
        return session

    def _leave(self, session: Outbox) -> None:
        session.end()
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]
            self.table.left(session.node_id, self._clock.monotonic_s())
            self.wishes.nodes_changed()

    # --- up ---------------------------------------------------------------------------------------------------------

    def _take_hello(self, session: Outbox, hello: weights_pb2.CacheHello) -> Changed:
        changed = self.table.hello(
            session.node_id,
            cache_wire.holdings_in(hello.artifacts, self._view.catalog),
            endpoints=cache_wire.endpoints_in(hello.endpoints),
            room=cache_wire.room_in(hello.status),
            capabilities=cache_wire.capabilities_in(hello.status),
            manifests=cache_wire.manifests_in(hello.manifests),
        )
        self._check_refused(session.node_id)
        self.telling.hello(session.node_id)
        return changed

    async def _read(self, session: Outbox, incoming: AsyncIterator[weights_pb2.CacheUp]) -> None:
        async for message in incoming:
            kind = message.WhichOneof("kind")
            if kind == "report":
                self._take_report(session, message.report)
            elif kind == "claims":
                self._registrar.on_claims(session.node_id, message.claims)
            elif kind == "attestation":
                self._registrar.on_attestation(session.node_id, message.attestation)
            elif kind == "manifest":
                self._offered(session, message.manifest)
            elif kind == "hello":
                raise invalid("hello", session.node_id, "came twice in one session", remedy="Open a new stream.")
            # A kind of a later release: ignored, as features are agreed before they are used.

    def _take_report(self, session: Outbox, report: weights_pb2.CacheReport) -> None:
        holdings = cache_wire.holdings_in(report.artifacts, self._view.catalog)
        has_status = report.HasField("status")
        rates = cache_wire.rates_in(report.links)
        changed = self.table.report(
            session.node_id,
            holdings=holdings,
            gone=report.gone,
            rates=rates,
            unreachable=cache_wire.peers_in(report.unreachable, self._view.nodes) if report.unreachable_told else None,
            room=cache_wire.room_in(report.status) if has_status else None,
            capabilities=cache_wire.capabilities_in(report.status) if has_status else None,
        )
        session.gone(set(report.gone))
        for holding in holdings:
            session.judge(holding)
        if holdings:
            self._ask_manifests(session.node_id)
        self._spread(session.node_id, changed)
        self.witnesses.told(session.node_id, report)
        self.telling.report(session.node_id, (*report.gone, *(one.artifact_id for one in holdings)), rates)
        for event in list(report.events)[:CACHE_EVENTS_PER_REPORT_MAX]:
            self._note_event(session.node_id, event)
        if holdings:
            self._check_refused(session.node_id)

    def _spread(self, node_id: str, changed: Changed) -> None:
        """Others hear what concerns them of what a node told."""
        self.swarms.changed(node_id, changed)
        self.wishes.holders_changed(changed.members)
        for other in changed.copies:
            session = self._sessions.get(other)
            if session is not None:
                session.copies_due()

    def _offered(self, session: Outbox, manifest: state_pb2.ModelManifest) -> None:
        """What a pack task left (`image_packs`), or a manifest that this scheduler lacked; who waits for it is told."""
        if self.on_manifest(session.node_id, manifest):
            return
        if self._registrar.offer_manifest(manifest):
            for other in self._sessions.values():
                if manifest.artifact_id in other.stuck:
                    other.try_again()

    def _note_event(self, node_id: str, event: weights_pb2.CacheEvent) -> None:
        """One event a minute for each node, kind and subject, so that no node can flood the log."""
        key = (node_id, event.kind[:64], event.subject[:200])
        now_s = self._clock.monotonic_s()
        last_s = self._noted.pop(key, float("-inf"))
        quiet = now_s - last_s < EVENT_QUIET_S
        self._noted[key] = last_s if quiet else now_s
        if len(self._noted) > EVENTS_KEPT_MAX:
            del self._noted[next(iter(self._noted))]
        if not quiet:
            at_s = event.at_s or self._clock.wall_s()
            self._note(Logged(key[1], key[2], event.message[:_TEXT_CHARS_MAX], at_s, f"node/{node_id}"))

    def _check_refused(self, node_id: str) -> None:
        node = self.table.node(node_id)
        if node is None or not node.refused:
            self._alarms.clear("CACHE_FACTS", node_id)
            return
        text = f"the cache of node {node_id} tells more artifacts than are kept in mind; {node.refused} are not counted"
        remedy = "Evict what nobody uses (`falctl weights evict`); what is not counted still serves on its node."
        self._alarms.raise_alarm("CACHE_FACTS", node_id, text, remedy=remedy, since_s=self._clock.wall_s())

    # --- down -------------------------------------------------------------------------------------------------------

    def _push(self, node_id: str, message: weights_pb2.CacheDown) -> bool:
        session = self._sessions.get(node_id)
        return session is not None and session.push(message)

    def _swarm_due(self, node_id: str, artifact_id: str) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.swarm_due(artifact_id)

    def _wishes_due(self, node_id: str) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.wishes_due()

    # --- from the engine --------------------------------------------------------------------------------------------

    def _on_effect(self, effect: Effect) -> None:
        if isinstance(effect, ModelChanged):
            self.wishes.model_changed(effect.model_id)
            model = self._view.catalog.models.get(effect.model_id)
            if model is not None:
                self._model_changed(model)
        elif isinstance(effect, WishesChanged):
            self.wishes.model_changed(effect.model_id)
        elif isinstance(effect, NodeChanged):
            self.wishes.nodes_changed()
            node = self._view.nodes.get(effect.node_id)
            if node is not None and node.revoked:
                self._node_revoked(effect.node_id)

    def _model_changed(self, model: Model) -> None:
        """Everybody hears of a withdrawal, who has it of an attestation."""
        artifact_id = cache_wire.artifact_of(model)
        standing = standing_of(self._view.catalog, artifact_id)
        self.swarms.model_changed(artifact_id)
        if standing.revoked:
            for everybody in self._sessions.values():
                everybody.drop(artifact_id, standing)
            return
        for node_id, holding in self.table.holders(artifact_id).items():
            session = self._sessions.get(node_id)
            if session is not None:
                session.judge(holding)

    def _node_revoked(self, node_id: str) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            what = f"node {node_id} is revoked"
            session.close(FalError(Code.UNAUTHENTICATED, what, remedy="Join again with a new token."))
        self._spread(node_id, self.table.forget(node_id))
        self.telling.left(node_id)

    # --- upkeep -----------------------------------------------------------------------------------------------------

    async def upkeep(self) -> None:
        """Wishes, ends of everything that lasts so long only; until cancelled."""
        workers = {asyncio.create_task(one.run(), name="cache-wishes") for one in (self.wishes, self.warmth)}
        try:
            ticks, done = 0, set[asyncio.Task[None]]()
            while not done:
                done, _ = await asyncio.wait(workers, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                ticks += 1
                self.tick(renew=ticks % RENEW_EVERY_TICKS == 0)
            done.pop().result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def tick(self, *, renew: bool = True) -> None:
        """Forget nodes that stayed away; try again what could not be told; make tickets and keys anew."""
        for node_id, changed in self.table.expire(self._clock.monotonic_s()):
            self._spread(node_id, changed)
            self.telling.left(node_id)
        self.wishes.tick()
        self.witnesses.tick()
        if not renew:
            return
        self.swarms.renew()
        for session in self._sessions.values():
            session.try_again()
        self._rekey()

    def _rekey(self) -> None:
        """A new day has new keys. Nodes have them since yesterday, so the next ones can be told little by little."""
        generation = TicketOffice.generation(self._clock.wall_s())
        if generation != self._generation:
            self._generation = generation
            self._old_keys = dict.fromkeys(self._sessions)
        for node_id in list(self._old_keys)[: max(REKEYED_AT_ONCE_MIN, len(self._sessions) // 30)]:
            del self._old_keys[node_id]
            node = self._view.nodes.get(node_id)
            if node is not None and not node.revoked:
                self._push(node_id, weights_pb2.CacheDown(welcome=self._welcome(node_id, 1)))

    # --- asked ------------------------------------------------------------------------------------------------------

    def counts(self, artifact_id: str) -> Counts:
        """Nodes that have an artifact, nodes to which it comes, bytes read at the origin."""
        return self.table.counts(artifact_id)

    def nodes_with(self, artifact_id: str) -> tuple[int, int]:
        """Nodes that have an artifact READY, and nodes to which it comes."""
        counts = self.table.counts(artifact_id)
        return counts.nodes_ready, counts.nodes_staging

    def wished_names(self, model_id: str) -> list[str]:
        """As `nodes_wished`, by name and in its order."""
        return sorted(self._view.nodes[node_id].name for node_id in self.nodes_wished(model_id))

    def nodes_wished(self, model_id: str) -> tuple[str, ...]:
        """Nodes that should have a model now by its wishes, in order of id; works it out at once."""
        return self.wishes.work_out(model_id)

    def readiness(self, model: Model, *, assumed_bytes_s: int = 0) -> Readiness:
        """Predictions for a model on any node, as of now."""
        return Readiness(self._view, self.table, model, assumed_bytes_s=assumed_bytes_s)

    def connected(self, node_id: str) -> bool:
        """Whether the node's cache has a session now."""
        return node_id in self._sessions

    def evict(self, artifact_id: str, node_ids: Iterable[str], reason: str) -> list[str]:
        """Ask nodes to let go of an artifact that nothing pins; those that were told."""
        drop = weights_pb2.DropArtifact(id=artifact_id, reason=reason)
        return [i for i in node_ids if self._push(i, weights_pb2.CacheDown(drop=drop))]

    def verify(self, artifact_id: str, node_ids: Iterable[str]) -> list[str]:
        """Ask nodes to read an artifact again and compare; those that were told."""
        verify = weights_pb2.VerifyArtifact(id=artifact_id)
        return [i for i in node_ids if self._push(i, weights_pb2.CacheDown(verify=verify))]

    def want_manifest(self, artifact_id: str) -> None:
        """Ask some caches for a manifest that this scheduler lacks; those that come later are asked at Hello."""
        asked = 0
        for node in self.table.nodes():
            asked += self._ask_manifest(node.node_id, artifact_id)
            if asked == MANIFEST_ASKED_MAX:
                break

    def ask_manifest(self, node_id: str, artifact_id: str) -> bool:
        """Ask one cache for a manifest that nobody has signed yet; False where it has no session."""
        return self._push(node_id, weights_pb2.CacheDown(want_manifest=weights_pb2.WantManifest(id=artifact_id)))

    def _ask_manifests(self, node_id: str) -> None:
        for artifact_id in self._registrar.wanted:
            self._ask_manifest(node_id, artifact_id)

    def _ask_manifest(self, node_id: str, artifact_id: str) -> bool:
        """Ask one that told that it has it: with the digest where it is attested. Once a session."""
        node, session = self.table.node(node_id), self._sessions.get(node_id)
        if node is None or session is None or artifact_id in session.asked:
            return False
        standing = standing_of(self._view.catalog, artifact_id)
        digest = standing.model.manifest_digest if standing.model is not None else ""
        holding = node.holdings.get(artifact_id)
        has = holding is not None and (not standing.attested or bool(holding.manifest_digest))
        if not has and not {artifact_id, digest} & node.manifests:
            return False
        session.asked.add(artifact_id)
        return session.push(weights_pb2.CacheDown(want_manifest=weights_pb2.WantManifest(id=artifact_id)))

    def close(self, error: FalError) -> None:
        """End all sessions: the leader is one no longer."""
        self._unsubscribe()
        self.swarms.close()
        self.telling.close()
        for session in list(self._sessions.values()):
            session.close(error)

    def statistics(self) -> dict[str, int]:
        """Sessions, facts, and what waits."""
        return {
            "sessions": len(self._sessions),
            "facts": len(self.table),
            "waiting": sum(len(x.control) + len(x.swarms) + len(x.attested) for x in self._sessions.values()),
            "facts_told": self.telling.told,
            **self.swarms.statistics(),
            **self.warmth.statistics(),
        }


__all__ = ["CacheSessions", "Registrar"]
