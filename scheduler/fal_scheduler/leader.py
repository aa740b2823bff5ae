"""The life of a leader: campaign, build a term's parts, serve until leadership is lost, begin again from the store.

Nothing of one term survives into the next but the event files and blobs: a fresh engine loads the store, agents and
gateways dial again and tell what they hold. Must not be used by the APIs; they look at `CurrentLeadership`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError
from fal_contract.ids import random_suffix
from fal_contract.limits import ELECTION_RETRY_CAP_S
from fal_contract.telemetry import get_logger
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.assignments import AssignmentBuilder
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.cache_builds import CacheBuilds
from fal_scheduler.cache_sessions import CacheSessions
from fal_scheduler.collector import calm
from fal_scheduler.core.events import Effect, Logged, NodeChanged, Revoked
from fal_scheduler.core.tickets import TICKET_PURPOSE
from fal_scheduler.decision_log import DecisionLog
from fal_scheduler.dispatch import Dispatcher
from fal_scheduler.engine import Engine
from fal_scheduler.engine_port import EngineOptions
from fal_scheduler.event_feed import EventFeed
from fal_scheduler.image_packs import ImagePacks
from fal_scheduler.leadership import CurrentLeadership, Leadership, not_leading
from fal_scheduler.models import ModelRegistrar, origin_lister
from fal_scheduler.revocations import RevocationIndex
from fal_scheduler.sessions import AgentSessions
from fal_scheduler.store.interface import Store

# What no waiting cures: the process ends and says so.
FATAL: Final = frozenset({Code.CORRUPT, Code.VERSION_MISMATCH, Code.INVARIANT, Code.INVALID, Code.FAILED_PRECONDITION})
_log = get_logger("scheduler.leader")


class Leader:
    """Runs one term after the other. `cut_revoked` ends streams whose certificate is revoked by now.

    `rng`: where ids and waits come from; the system's, unless a simulation gives a seeded one.
    """

    def __init__(
        self,
        *,
        store: Store,
        ca: CertificateAuthority,
        clock: Clock,
        data_dir: Path,
        model_roots: tuple[Path, ...],
        holder: str,
        current: CurrentLeadership,
        revocations: RevocationIndex,
        cut_revoked: Callable[[], object],
        rng: Random | None = None,
        credentials_file: Path | None = None,
    ) -> None:
        self._store = store
        self._ca = ca
        self._clock = clock
        self._data_dir = data_dir
        self._model_roots = model_roots
        self._holder = holder
        self._current = current
        self._revocations = revocations
        self._cut_revoked = cut_revoked
        self._rng = rng or SystemRandom()
        self._credentials_file = credentials_file
        self._engine: Engine | None = None
        self.began = asyncio.Event()  # set once the first term began

    async def run(self) -> None:
        """Lead whenever possible, until cancelled. Raises FalError where the store cannot be worked with."""
        while True:
            engine = Engine(
                self._store,
                clock=self._clock,
                rng=self._rng,
                options=EngineOptions(self._ca.cluster_id, self._data_dir / "events", recorder=self._decision_log),
            )
            try:
                await engine.start(self._holder)
                calm()  # the records are loaded: long pauses of the collector would show in every answer
                why = await self._term(engine)
                _log.warning("leadership_lost", reason=str(why))
            except FalError as error:
                if error.code in FATAL:
                    raise
                _log.error("leadership_not_won", code=str(error.code), message=str(error))
                await asyncio.sleep(self._rng.uniform(0.0, ELECTION_RETRY_CAP_S))
            finally:
                await engine.stop()

    def _decision_log(self) -> DecisionLog:
        folder = self._data_dir / "decisions"
        return DecisionLog(folder, cluster_id=self._ca.cluster_id, wall_s=self._clock.wall_s())

    def _parts(self, engine: Engine) -> Leadership:
        """What a term is made of; nothing runs yet."""
        alarms = EdgeAlarms()
        feed = EventFeed(engine, engine.events)
        manifests = ManifestBlobs(self._data_dir / "blobs", self._ca.public_key)
        models = ModelRegistrar(
            engine,
            manifests,
            self._ca,
            clock=self._clock,
            note=feed.note,
            roots=self._model_roots,
            lister=origin_lister(self._credentials_file),
        )
        sessions = AgentSessions(
            engine,
            AssignmentBuilder(models.desk),
            clock=self._clock,
            alarms=alarms,
            note=feed.note,
            new_id=lambda: random_suffix(self._rng, 12),
        )
        dispatcher = Dispatcher(engine, clock=self._clock, push=sessions.push)
        sessions.set_gateways(dispatcher.tunnels.gateway_set)
        caches = self._caches(engine, models, alarms, feed)
        commits_before = _commits(self._store)
        return Leadership(
            engine=engine,
            sessions=sessions,
            caches=caches,
            dispatcher=dispatcher,
            feed=feed,
            models=models,
            manifests=manifests,
            builds=CacheBuilds(engine, models.desk, self._ca),
            packs=ImagePacks(engine, models.desk, self._ca, caches),
            alarms=alarms,
            revocations=self._revocations,
            ca=self._ca,
            clock=self._clock,
            store=self._store.name,
            commits=lambda: _commits(self._store) - commits_before,
            load=self._store.load,
        )

    async def _term(self, engine: Engine) -> FalError:
        """One term, from its first moment to its last; returns why it ended."""
        leadership = self._parts(engine)
        self._revocations.refresh(engine.view)
        unsubscribe = engine.subscribe(self._on_effect(engine))
        upkeep = [
            asyncio.create_task(leadership.dispatcher.expire(), name="dispatch-expiry"),
            asyncio.create_task(leadership.caches.upkeep(), name="cache-upkeep"),
        ]
        for task in upkeep:
            task.add_done_callback(_say_failed)
        self._engine = engine
        self._current.set(leadership)
        self.began.set()
        now_s = self._clock.wall_s()
        leadership.feed.note(Logged("LEADER", self._holder, f"leads term {engine.view.term}", now_s))
        _log.info("leads", term=engine.view.term, revision=engine.view.store_revision, store=self._store.name)
        try:
            leadership.models.resume()
            return await engine.lost()
        finally:
            self._current.set(None)
            self._engine = None
            unsubscribe()
            why = not_leading()
            leadership.sessions.close(why)
            leadership.caches.close(why)
            leadership.dispatcher.close(why)
            leadership.feed.close(why)
            for task in upkeep:
                task.cancel()
            await asyncio.gather(*upkeep, return_exceptions=True)
            await leadership.builds.close()
            await leadership.packs.close()
            await leadership.models.close()

    def _caches(self, engine: Engine, models: ModelRegistrar, alarms: EdgeAlarms, feed: EventFeed) -> CacheSessions:
        """Sessions of the nodes' caches, and what the registrar asks of them."""
        caches = CacheSessions(
            engine,
            models,
            secret=self._ca.derive(TICKET_PURPOSE),
            clock=self._clock,
            alarms=alarms,
            note=feed.note,
        )
        models.want_manifest = caches.want_manifest
        models.counts = caches.nodes_with
        models.wished_nodes = caches.wished_names
        return caches

    def _on_effect(self, engine: Engine) -> Callable[[Effect], None]:
        def listen(effect: Effect) -> None:
            if isinstance(effect, Revoked) or (isinstance(effect, NodeChanged) and _is_revoked(engine, effect.node_id)):
                self._revocations.refresh(engine.view)
                self._cut_revoked()

        return listen

    def statistics(self) -> Mapping[str, float]:
        """Of the term under way, for metrics; empty on a standby."""
        leadership = self._current.get() if self._current.leads else None
        if leadership is None or self._engine is None:
            return {"leads": 0.0}
        return {
            "leads": 1.0,
            "term": float(leadership.view.term),
            **{f"engine_{name}": float(value) for name, value in self._engine.statistics().items()},
            **{f"session_{name}": float(value) for name, value in leadership.sessions.statistics().items()},
            **{f"cache_{name}": float(value) for name, value in leadership.caches.statistics().items()},
            **{f"dispatch_{name}": float(value) for name, value in leadership.dispatcher.statistics().items()},
        }


def _say_failed(task: asyncio.Task[None]) -> None:
    """What runs beside a term has no one who waits for it before the end."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("upkeep_failed", task=task.get_name(), exc_info=error)


def _is_revoked(engine: Engine, node_id: str) -> bool:
    node = engine.view.nodes.get(node_id)
    return node is not None and node.revoked


def _commits(store: Store) -> int:
    return int(store.statistics().get("commits", 0.0))


__all__ = ["FATAL", "Leader"]
