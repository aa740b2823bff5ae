"""When a model will be ready on a node: gathers what `eta.predict` needs from the table of residency. Pure.

Make one for a model, ask it for many nodes: medians and the holders worth naming are worked out once, so that an
answer costs O(1) of the cluster's size. It is a picture of the moment; make a new one after a second or so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median_low
from typing import Final

from fal_contract.origin_source import origin_source
from fal_scheduler.core.cache_paths import shared_endpoints
from fal_scheduler.core.eta import Eta, PeerSupply, Question, predict
from fal_scheduler.core.records import Model, ModelState, Pool
from fal_scheduler.core.residency import CacheNode, ResidencyTable
from fal_scheduler.core.state import State

HOLDERS_NAMED_MAX: Final = 24  # of each region; more senders than a node uses at once
POOL_SAMPLE_MAX: Final = 32  # nodes whose rates stand for their pool's
SMALL_BYTES: Final = 512 << 20  # goes before everything larger (LoRAs)
ISLAND: Final = "no path to any of the {count} nodes that have it ({names}), and the origin does not answer here"


class Readiness:
    """Predictions for one model. `assumed_bytes_s`: a rate for what nobody has measured; 0: answers say so."""

    def __init__(self, state: State, table: ResidencyTable, model: Model, *, assumed_bytes_s: int = 0) -> None:
        self._state = state
        self._table = table
        self._model = model
        self._assumed = assumed_bytes_s
        self._artifact = model.artifact_id or model.manifest_digest
        self._source = origin_source(model.resolved_uri or model.uri)
        self._usual: dict[str, int] = {}  # by pool
        self._holders = self._pick_holders()
        self._origin_rates = self._medians()

    def of(self, node_id: str, *, memory: bool = False) -> Eta:
        """Milliseconds until it is ready on this node if its staging began now, and why. `memory`: locked, too."""
        node = self._table.node(node_id)
        if node is None:
            return Eta(-1, "its weight cache has not been heard")
        holding = node.holdings.get(self._artifact)
        rate, whose = self._origin_rate(node)
        answers = rate != 0
        peers = self._peers(node)
        missing = holding is None or not holding.complete
        if missing and not answers and not peers and (others := self._with_bytes(node_id)):
            return Eta(-1, self._island(others))
        return predict(
            Question(
                bytes_total=self._model.bytes,
                bytes_here=holding.bytes_disk if holding else 0,
                bytes_memory=holding.bytes_memory if holding else 0,
                ready=holding is not None and holding.ready,
                attested=self._model.state is ModelState.ATTESTED,
                memory=memory,
                origin_answers=answers,
                origin_bytes_s=rate or 0,
                origin_measured=whose,
                peers=peers,
                arriving_bytes_s=holding.rate_bytes_s if holding is not None and holding.fetching else 0,
                ahead_bytes=self._ahead(node),
                fed_bytes_s=node.fed_bytes_s,
                disk_bytes_s=node.rates.get("disk", 0),
                waits_for=holding.waits_for if holding is not None and holding.staging else "",
                assumed_bytes_s=self._assumed,
            )
        )

    def _ahead(self, node: CacheNode) -> int:
        """Bytes of other artifacts that the node fetches before this one, or beside it."""
        small = self._model.bytes < SMALL_BYTES
        others = [node.holdings[artifact_id] for artifact_id in node.fetching if artifact_id != self._artifact]
        return sum(max(0, x.bytes - x.bytes_disk) for x in others if not small or x.bytes < SMALL_BYTES)

    # --- the origin -------------------------------------------------------------------------------------------------

    def _origin_rate(self, node: CacheNode) -> tuple[int | None, str]:
        """Bytes per second from the origin and whose measurement it is; 0: it does not answer; None: never measured."""
        own = node.rates.get(self._source)
        if own is not None:
            return own, ""
        if self._source == "origin:file":
            return (0, "") if self._origin_rates else (None, "")  # a folder of another machine, once it was read on one
        pool = self._pool(node.node_id)
        for key, whose in ((_pool_key(pool), "its pool"), (_region_key(pool), "its region"), ("", "others")):
            if key in self._origin_rates:
                return self._origin_rates[key], whose
        return None, ""

    def _medians(self) -> dict[str, int]:
        """Of the origin's rates that were measured: by pool, by region, of all."""
        rates: dict[str, list[int]] = defaultdict(list)
        for node in self._table.nodes():
            rate = node.rates.get(self._source)
            if rate:
                pool = self._pool(node.node_id)
                for key in (_pool_key(pool), _region_key(pool), ""):
                    rates[key].append(rate)
        return {key: median_low(values) for key, values in rates.items()}

    # --- peers ------------------------------------------------------------------------------------------------------

    def _pick_holders(self) -> dict[str, list[str]]:
        """Some holders of each region, complete ones first."""
        by_region: dict[str, list[str]] = defaultdict(list)
        partial: list[str] = []
        for node_id, holding in self._table.holders(self._artifact).items():
            node = self._table.node(node_id)
            if node is None or node.stale or not (holding.bytes_disk or holding.ready):
                continue
            if not holding.complete:
                partial.append(node_id)
            elif len(named := by_region[_region(self._pool(node_id))]) < HOLDERS_NAMED_MAX:
                named.append(node_id)
        for node_id in partial:
            named = by_region[_region(self._pool(node_id))]
            if len(named) < HOLDERS_NAMED_MAX:
                named.append(node_id)
        return dict(by_region)

    def _peers(self, node: CacheNode) -> list[PeerSupply]:
        """Reachable holders: those of its own region first, then some of the others."""
        here = _region(self._pool(node.node_id))
        found: list[PeerSupply] = []
        for region in sorted(self._holders, key=lambda name: (name != here, name)):
            found += self._reached(node, self._holders[region])
            if len(found) >= HOLDERS_NAMED_MAX:
                break
        return found

    def _reached(self, node: CacheNode, named: Iterable[str]) -> list[PeerSupply]:
        holders = self._table.holders(self._artifact)
        usual = _usual(node) or self._usual_in_pool(node)
        found = []
        for peer_id in named:
            peer = self._table.node(peer_id)
            if peer is None or peer_id == node.node_id or not (self._dials(node, peer) or self._dials(peer, node)):
                continue
            holding = holders[peer_id]
            rate = node.rates.get(f"peer:{peer_id}", usual)
            found.append(PeerSupply(peer_id, rate, holding.bytes if holding.ready else holding.bytes_disk))
        return found

    def _usual_in_pool(self, node: CacheNode) -> int:
        """For a node that no peer ever fed: what its pool's nodes are fed at, by some of them."""
        pool = self._pool(node.node_id)
        name = pool.name if pool is not None else ""
        if name not in self._usual:
            rates: list[int] = []
            for other in self._table.nodes():
                if self._pool(other.node_id) == pool and (rate := _usual(other)):
                    rates.append(rate)
                    if len(rates) == POOL_SAMPLE_MAX:
                        break
            self._usual[name] = median_low(rates) if rates else 0
        return self._usual[name]

    def _dials(self, caller: CacheNode, server: CacheNode) -> bool:
        if server.node_id in caller.unreachable:
            return False
        return bool(shared_endpoints(self._pool(caller.node_id), self._pool(server.node_id), server.endpoints))

    def _with_bytes(self, node_id: str) -> list[str]:
        holders = self._table.holders(self._artifact)
        return sorted(i for i, x in holders.items() if i != node_id and (x.ready or x.bytes_disk))

    def _island(self, holders: list[str]) -> str:
        records = (self._state.nodes.get(i) for i in holders[:3])
        names = ", ".join(record.name for record in records if record is not None)
        return ISLAND.format(count=len(holders), names=f"{names} …" if len(holders) > 3 else names)

    def _pool(self, node_id: str) -> Pool | None:
        record = self._state.nodes.get(node_id)
        return self._state.pools.get(record.pool) if record is not None else None


def _usual(node: CacheNode) -> int:
    """What a peer that was never measured will do, as the median of those that were; 0: none was."""
    rates = [rate for source, rate in node.rates.items() if source.startswith("peer:") and rate]
    return median_low(rates) if rates else 0


def _pool_key(pool: Pool | None) -> str:
    return f"pool/{pool.name if pool is not None else ''}"


def _region_key(pool: Pool | None) -> str:
    return f"region/{_region(pool)}"


def _region(pool: Pool | None) -> str:
    return pool.region if pool is not None else ""


__all__ = ["HOLDERS_NAMED_MAX", "SMALL_BYTES", "Readiness"]
