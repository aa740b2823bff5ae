"""What a spec needs before it serves, and which lines it shares with what is under way elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from fal_contract.origin_source import origin_source
from fal_scheduler.core.cache_events import CachedFact
from fal_scheduler.core.records import Model, Spec
from fal_scheduler.core.state import State

IMAGE_FIRST_PERC: Final = 25  # of an image whose first pieces nobody has recorded
UNDER_WAY_MAX: Final = 64  # artifacts looked at; beyond that a shared source is busy anyway
PEERS_MAX: Final = 8
MILLI: Final = 1000
_IMAGE_PIECE_BYTES: Final = 256 << 10
_IMAGE_PIECES_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class SharedLine:
    """What an artifact's sources give all nodes together, in bytes per second (0: never measured), and the bytes of
    other artifacts that they send meanwhile, none counted for more than the artifact itself. `one_of_all_milli`: what
    the origin gives one node at most, over what it gives all."""

    origin_bytes_s: int = 0
    origin_bytes: int = 0
    peers_bytes_s: int = 0
    peers_bytes: int = 0
    one_of_all_milli: int = MILLI


def artifact_of(model: Model) -> str:
    """What names a model's artifact: its id, or its digest where a first release registered it."""
    return model.artifact_id or model.manifest_digest


def needed(state: State, spec: Spec) -> list[Model]:
    """Models, LoRAs and entries of the compile cache that a runner needs, as far as they are registered."""
    found = [state.models[name] for name in spec.models if name in state.models]
    for key in spec.compile_caches:
        entry = next((one for (_, name), one in state.catalog.cache_entries.items() if name == key), None)
        if entry is not None and entry.model in state.models:
            found.append(state.models[entry.model])
    return found


def compile_missing(state: State, spec: Spec) -> bool:
    """Whether an entry that it names is in no namespace, so that it compiles for itself."""
    if not spec.compile_caches:
        return False
    have = {name: None for _, name in state.catalog.cache_entries}
    return any(key not in have for key in spec.compile_caches)


def first_bytes(image: Model) -> int:
    """Bytes of an image that its start reads: as recorded, else a share of it."""
    facts = image.image
    if facts is None or not facts.first_pieces:
        return image.bytes * IMAGE_FIRST_PERC // 100
    piece_bytes = _IMAGE_PIECE_BYTES
    while image.bytes > piece_bytes * _IMAGE_PIECES_MAX:
        piece_bytes <<= 1
    return min(image.bytes, len(facts.first_pieces) * piece_bytes)


def shared_line(state: State, model: Model) -> SharedLine:
    """As of now. A swarm reads an origin once, so others' fetches of the same artifact take nothing away."""
    facts, artifact = state.cache_facts, artifact_of(model)
    source = origin_source(model.resolved_uri or model.uri)
    peers = list(islice(facts.holders.get(artifact, ()), PEERS_MAX))
    at_origin = at_peers = 0
    for other in islice(facts.under_way, UNDER_WAY_MAX):
        if other == artifact:
            continue
        fetchers = islice(facts.under_way[other], UNDER_WAY_MAX)
        left = min(model.bytes, max(facts.remaining(other, node_id, state.facts_at_ms) for node_id in fetchers))
        holders = facts.holders.get(other, {})
        if any(peer in holders and holders[peer].ready for peer in peers):
            at_peers += left
        elif (
            not any(fact.ready for fact in islice(holders.values(), UNDER_WAY_MAX)) and _source(state, other) == source
        ):
            at_origin += left
    capacity = sum(facts.capacity(f"peer:{node_id}") for node_id in peers)
    whole = facts.capacity(source)
    share = facts.best.get(source, 0) * MILLI // whole if whole else MILLI
    return SharedLine(whole, at_origin, capacity, at_peers, share)


def _whole_somewhere(holders: Mapping[str, CachedFact]) -> bool:
    return any(fact.ready for fact in islice(holders.values(), UNDER_WAY_MAX))


def _source(state: State, artifact: str) -> str:
    names = state.models_by_artifact.get(artifact) or state.models_by_digest.get(artifact)
    if not names:
        return ""
    model = state.models[names[0]]
    return origin_source(model.resolved_uri or model.uri)


__all__ = ["SharedLine", "artifact_of", "compile_missing", "first_bytes", "needed", "shared_line"]
