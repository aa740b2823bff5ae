"""Wishes as nodes are told them: which node should have what, kept up to date as wishes, nodes and caches change.

One model is worked out at a time (`core.wishes.meant`), only where something about it changed, so many in one turn of
the loop; what changed within a window is worked out together. Only nodes whose set differs are told, each the whole
set. A manifest travels with its wish where it is small; the cache reads a larger one with GetManifest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from fal_contract.clock import Clock
from fal_contract.errors import FalError
from fal_contract.limits import INLINE_MANIFEST_BYTES_MAX, WISHES_PER_NODE_MAX
from fal_contract.pieces import BLAKE3_BYTES, piece_bytes_of
from fal_contract.v1 import agent_pb2, state_pb2, weights_pb2
from fal_scheduler.alarms import EdgeAlarms
from fal_scheduler.cache_wire import artifact_of
from fal_scheduler.core.records import Model, Wish
from fal_scheduler.core.residency import ResidencyTable
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Health
from fal_scheduler.core.wishes import Wanted, WishNode, WishNodes, meant, merge, wanted_of
from fal_scheduler.leading_edge import LeadingEdge

WISH_WINDOW_S: Final = 0.5
MODELS_AT_ONCE_MAX: Final = 32
SETTLE_S: Final = 30.0  # after that a cache that has not been heard is not waited for
INLINE_BYTES_MAX: Final = 1 << 20  # of all manifests in one set
_PIECE_NUMBER_BYTES: Final = 3
_FILE_BYTES: Final = 160  # about what a file takes in a manifest, beside its pieces


class Manifests(Protocol):
    """Where manifests are (`models.ModelRegistrar`)."""

    def manifest_of(self, id_: str) -> state_pb2.ModelManifest:
        """By artifact id or digest. Raises NOT_FOUND, CORRUPT."""
        ...


class WishKeeper:
    """Wishes of one leader. `tell(node_id)`: this node's `message` is due."""

    def __init__(
        self,
        table: ResidencyTable,
        view: Callable[[], State],
        manifests: Manifests,
        *,
        clock: Clock,
        alarms: EdgeAlarms,
        tell: Callable[[str], None],
    ) -> None:
        self._table = table
        self._view = view
        self._manifests = manifests
        self._clock = clock
        self._alarms = alarms
        self._tell = tell
        self._began_s = clock.monotonic_s()
        self._dirty: dict[str, None] = {}
        self._nodes = WishNodes(())
        self._nodes_dirty = True
        self._signal = LeadingEdge(WISH_WINDOW_S)
        self._of_model: dict[str, dict[str, Wanted]] = {}  # model -> node
        self._of_node: dict[str, dict[str, Wanted]] = {}  # node -> model
        self._automatic: dict[str, dict[str, Wanted]] = {}  # node -> model, by `cache_warmth`
        self._before: dict[tuple[str, str], frozenset[str]] = {}  # (model, target) -> nodes it meant
        self._ends_s: dict[str, float] = {}  # model -> wall clock moment at which the first of its wishes ends
        self._revision = 0
        self.model_changed(*view().catalog.wishes)

    # --- what changes -----------------------------------------------------------------------------------------------

    def model_changed(self, *model_ids: str) -> None:
        """Wishes for these, or what they are, may have changed."""
        for model_id in model_ids:
            if model_id in self._of_model or model_id in self._view().catalog.wishes:
                self._dirty[model_id] = None
                self._signal.set()

    def holders_changed(self, artifact_ids: Iterable[str]) -> None:
        """Caches hold more or less of these."""
        catalog = self._view().catalog
        for artifact_id in artifact_ids:
            for model_id in catalog.by_artifact.get(artifact_id, ()):
                if "replicas" in catalog.wishes.get(model_id, ()):
                    self._dirty[model_id] = None
                    self._signal.set()

    def nodes_changed(self) -> None:
        """Nodes came, went, fell silent or were cordoned."""
        self._nodes_dirty = True
        self._signal.set()

    def tick(self) -> None:
        """Wishes end; a new leader has waited long enough. Call it every few seconds."""
        now_s = self._clock.wall_s()
        ended = [model_id for model_id, end_s in self._ends_s.items() if end_s <= now_s]
        self.model_changed(*ended)
        if not self._nodes.settled:
            self.nodes_changed()

    async def run(self) -> None:
        """Work out what changed, until cancelled."""
        while True:
            await self._signal.wait()
            self._refresh_nodes()
            while self._dirty:
                for model_id in list(self._dirty)[:MODELS_AT_ONCE_MAX]:
                    self.work_out(model_id)
                await asyncio.sleep(0)

    def _refresh_nodes(self) -> None:
        """Arrange the nodes anew; where they differ, every wish is worked out again."""
        if not self._nodes_dirty or not (self._of_model or self._view().catalog.wishes):
            return
        self._nodes_dirty = False
        before, self._nodes = self._nodes, self._arranged()
        if _standing(before) != _standing(self._nodes):
            self.model_changed(*self._view().catalog.wishes)

    def _arranged(self) -> WishNodes:
        state, nodes, all_heard = self._view(), [], True
        for node in state.nodes.values():
            health, cache = state.health_of(node.id), self._table.node(node.id)
            heard = cache is not None and not cache.stale
            all_heard = all_heard and (heard or health is not Health.READY)
            room = cache.room.disk_bytes_max - cache.room.disk_bytes_used if cache is not None else 0
            nodes.append(
                WishNode(
                    id=node.id,
                    pool=node.pool,
                    domain=state.domain_of(node.id),
                    open=heard and health is Health.READY and not node.cordoned,
                    alive=not node.revoked and (heard or health is not Health.LOST),
                    room_bytes=room,
                )
            )
        waited = self._clock.monotonic_s() - self._began_s > SETTLE_S
        return WishNodes(nodes, settled=waited or (state.settled and all_heard))

    # --- worked out -------------------------------------------------------------------------------------------------

    def work_out(self, model_id: str) -> tuple[str, ...]:
        """Which nodes should have this model now; who is told something else than before hears of it."""
        self._dirty.pop(model_id, None)
        self._refresh_nodes()
        catalog = self._view().catalog
        model = catalog.models.get(model_id)
        found: dict[str, Wanted] = {}
        wishes: list[Wish] = []
        if model is not None:
            wishes = wanted_of(catalog.wishes_of(model_id), model, self._clock.wall_s())
            for wish in wishes:
                self._spread(wish, model, found)
        for target in [key for key in self._before if key[0] == model_id] if not wishes else ():
            del self._before[target]
        ends = [wish.expires_at_s for wish in wishes if wish.expires_at_s]
        self._ends_s.pop(model_id, None)
        if ends:
            self._ends_s[model_id] = min(ends)
        self._replace(model_id, found)
        return tuple(sorted(found))

    def _spread(self, wish: Wish, model: Model, found: dict[str, Wanted]) -> None:
        key = (wish.model, wish.target)
        holders = self._table.holders(artifact_of(model))
        nodes = meant(wish, model, self._nodes, holders, self._before.get(key, frozenset()))
        if wish.target == "replicas":
            self._before[key] = frozenset(nodes)
        one = Wanted(model.id, artifact_of(model), wish.tier or "disk", wish.expires_at_s)
        for node_id in nodes:
            found[node_id] = merge(found[node_id], one) if node_id in found else one

    def _replace(self, model_id: str, found: dict[str, Wanted]) -> None:
        before = self._of_model.pop(model_id, {})
        if found:
            self._of_model[model_id] = found
        for node_id in before.keys() | found.keys():
            if before.get(node_id) == found.get(node_id):
                continue
            wanted = self._of_node.setdefault(node_id, {})
            if node_id in found:
                wanted[model_id] = found[node_id]
            else:
                del wanted[model_id]
                if not wanted:
                    del self._of_node[node_id]
            self._tell(node_id)

    def wished_on(self, node_id: str) -> dict[str, str]:
        """What operators' wishes mean on a node: artifact id to tier."""
        return {one.artifact_id: one.tier for one in self._merged(self._of_node.get(node_id, {})).values()}

    def set_automatic(self, node_id: str, wanted: dict[str, Wanted]) -> None:
        """What a node should have beside that, by model; the whole set. Not stored, and not shown as a wish."""
        if self._automatic.get(node_id, {}) == wanted:
            return
        self._automatic[node_id] = wanted
        if not wanted:
            del self._automatic[node_id]
        self._tell(node_id)

    # --- told -------------------------------------------------------------------------------------------------------

    def _merged(self, *sets: dict[str, Wanted]) -> dict[str, Wanted]:
        by_artifact: dict[str, Wanted] = {}
        for wanted in sets:
            for _, one in sorted(wanted.items()):
                known = by_artifact.get(one.artifact_id)
                by_artifact[one.artifact_id] = merge(known, one) if known is not None else one
        return by_artifact

    def message(self, node_id: str) -> weights_pb2.WishSet:
        """The node's whole set, in order of model; operators' wishes first."""
        catalog = self._view().catalog
        wished = self._of_node.get(node_id, {})
        self._check_count(node_id, len(self._merged(wished)))
        by_artifact = self._merged(wished, self._automatic.get(node_id, {}))
        self._revision += 1
        message = weights_pb2.WishSet(revision=(self._view().term << 32) + self._revision)
        room = INLINE_BYTES_MAX
        for one in list(by_artifact.values())[:WISHES_PER_NODE_MAX]:
            model = catalog.models.get(one.model)
            if model is not None:
                artifact = artifact_out(model)
                if model.image is not None and len(model.image.first_pieces) * _PIECE_NUMBER_BYTES <= room:
                    artifact.first_pieces.extend(model.image.first_pieces)
                    room -= len(model.image.first_pieces) * _PIECE_NUMBER_BYTES
                room -= self._inline(artifact, model, room)
                message.wishes.add(artifact=artifact, tier=one.tier, expires_at_s=one.expires_at_s)
        return message

    def _inline(self, artifact: agent_pb2.Artifact, model: Model, room: int) -> int:
        """Put a small manifest in; bytes that it took."""
        pieces = model.bytes // piece_bytes_of(model.kind, model.bytes) + model.files
        about = model.files * _FILE_BYTES + pieces * BLAKE3_BYTES
        if about > min(room, INLINE_MANIFEST_BYTES_MAX):
            return 0
        try:
            manifest = self._manifests.manifest_of(artifact.artifact_id)
        except FalError:
            return 0  # not on this scheduler's disk; a cache that has it is asked for it when somebody reads it
        size = manifest.ByteSize()
        if size > min(room, INLINE_MANIFEST_BYTES_MAX):
            return 0
        artifact.manifest.CopyFrom(manifest)
        return size

    def _check_count(self, node_id: str, count: int) -> None:
        if count <= WISHES_PER_NODE_MAX:
            self._alarms.clear("WISHES", node_id)
            return
        text = f"{count} artifacts are wished on node {node_id}; it is told of {WISHES_PER_NODE_MAX}"
        remedy = "Take wishes back with `falctl weights unstage`, or wish to fewer nodes."
        self._alarms.raise_alarm("WISHES", node_id, text, remedy=remedy, since_s=self._clock.wall_s())


def artifact_out(model: Model) -> agent_pb2.Artifact:
    """A model as nodes are told it, without its manifest."""
    return agent_pb2.Artifact(
        model=model.id,
        kind=model.kind,
        uri=model.resolved_uri or model.uri,
        manifest_digest=model.manifest_digest,
        bytes=model.bytes,
        artifact_id=model.artifact_id,
    )


def _standing(nodes: WishNodes) -> object:
    """What of the nodes decides about wishes; room alone moves nothing."""
    return nodes.settled, {i: (x.pool, x.domain, x.open, x.alive) for i, x in nodes.by_id.items()}


__all__ = ["Manifests", "WishKeeper", "artifact_out"]
