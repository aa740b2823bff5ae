"""When a runner of a spec would be ready on a node if it were placed there now: the prediction that placement ranks by.

    up      = image + make                    image: bytes that a start reads first; make: its root and container
    ready   = rest + max(up, weights) + start + setup + compile                    weights first, then the process
            = rest + max(up + start + setup, weights + tail) + compile             where the app streams its weights

`rest`: orders and reports on their way; `start`: the process begins; `setup`: initialise, load, warm up: a line over
the bytes to load, by tier and GPU; `compile`: where an entry of the compile cache is missing. Weights of all artifacts
share the node's line with what is under way there, and an origin's or peer's line with what is under way elsewhere:

    weights = learnt( max( (missing + ahead) / supply of this node, (missing + others) / capacity of the sources ) )

Every part is learnt (`learning`); what is assumed says so. A node that nothing leads to gets NEVER_MS. `ready_ms` is
the same arithmetic on columns (`ready_columns`), integers throughout: both give the same numbers, on every machine.
Form: design, section 4; here the container starts once unstreamed weights are whole, as our agent does (ADR 0023).

Pure. Read by placement, `expectations`, views. Must change nothing; its columns follow from the State.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np

from fal_contract.origin_source import origin_source
from fal_scheduler.core.fleet import Bools
from fal_scheduler.core.learning import MILLI, Learning, default_line
from fal_scheduler.core.ready_columns import ArtifactColumns, Columns, Ints
from fal_scheduler.core.records import HOST_IMAGE, Model, ModelState, Spec
from fal_scheduler.core.state import State

NEVER_MS: Final = 1 << 40  # 35 years: after everything that can be reached
ASSUMED_BYTES_S: Final = 25_000_000  # where nobody has measured: on the slow side, so that a measured way goes first
ATTEST_MS: Final = 1000
PEERS_AT_ONCE_MAX: Final = 8
IMAGE_FIRST_PERC: Final = 25  # of an image whose first pieces nobody has recorded
UNDER_WAY_MAX: Final = 64
_KIB: Final = 10
_MS: Final = 1000
MEMORY, DISK, PEER, ORIGIN = range(4)
TIERS: Final = ("memory", "disk", "peer", "origin")
_LOADED_FROM: Final = ("memory", "disk", "arrived", "arrived")  # what has just come lies in the page cache


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the prediction: its name, milliseconds, what it rests on."""

    name: str
    ms: int
    because: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one node. `total_ms`: NEVER_MS where nothing leads there; `tier`: where the weights come from.

    `terms` name all parts, overlapping ones too, so that they need not sum up. `inputs`: (family, x) of each term that
    is learnt, for `expectations`.
    """

    total_ms: int
    terms: tuple[Term, ...]
    node_id: str = ""
    tier: str = ""
    inputs: tuple[tuple[str, int], ...] = ()

    def ms(self, name: str) -> int:
        """A term's milliseconds; 0 where there is no such term."""
        return sum(term.ms for term in self.terms if term.name == name)


def predict(state: State, node_id: str, spec: Spec, *, now_s: float = 0.0, app: str = "") -> Prediction:
    """For one node, with reasons. `app`: what it is placed for, whose own times count."""
    return predictor(state).predict(node_id, spec, app=app)


def ready_ms(state: State, spec: Spec, node_ids: Sequence[str], *, app: str = "") -> Ints:
    """Milliseconds for each of these nodes; the same list object again costs no look-ups. Shape (n,), int64."""
    return predictor(state).ready_ms(spec, node_ids, app=app)


_PREDICTORS: WeakKeyDictionary[State, Predictor] = WeakKeyDictionary()


def predictor(state: State) -> Predictor:
    """The columns of a state, made once for it."""
    have = _PREDICTORS.get(state)
    if have is None:
        have = _PREDICTORS[state] = Predictor(state)
    return have


@dataclass(slots=True)
class _Weights:
    """All artifacts of a spec, a value each row. `raw`: before what was learnt; `tier`: index into TIERS."""

    missing: Ints
    raw: Ints
    tier: Ints
    unmeasured: Ints
    bytes_total: int


@dataclass(slots=True)
class _Parts:
    """A value each row."""

    total: Ints
    weights: _Weights
    by_name: dict[str, Ints]


class Predictor:
    """`predict` and `ready_ms` of one State."""

    def __init__(self, state: State) -> None:
        self._columns = Columns(state)
        self._asked: Sequence[str] = ()
        self._rows: Ints = np.zeros(0, np.int64)
        self._rows_of: object = None

    def ready_ms(self, spec: Spec, node_ids: Sequence[str], *, app: str = "") -> Ints:
        """See the function."""
        columns = self._columns.fresh()
        totals = self._compute(columns, spec, app).total
        if node_ids is columns.node_ids:
            return totals
        if node_ids is not self._asked or self._rows_of is not columns.row_of or len(node_ids) != len(self._rows):
            row_of = columns.row_of
            self._rows = np.fromiter((row_of[node_id] for node_id in node_ids), np.int64, len(node_ids))
            self._asked, self._rows_of = node_ids, row_of
        return totals[self._rows]

    def predict(self, node_id: str, spec: Spec, *, app: str = "") -> Prediction:
        """See the function."""
        columns = self._columns.fresh()
        row = columns.row_of[node_id]
        parts = self._compute(columns, spec, app)
        learning = columns.state.learning
        tier = int(parts.weights.tier[row])
        inputs = tuple(self._inputs(columns, spec, parts, row))
        families = dict(inputs)
        terms = []
        for name, values in parts.by_name.items():
            ms = int(values[row])
            family = next((one for one in families if one.partition("/")[0] == name), "")
            if ms or family:
                terms.append(Term(name, ms, self._because(columns, learning, name, family, parts, row)))
        return Prediction(int(parts.total[row]), tuple(terms), node_id, TIERS[tier], inputs)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _compute(self, columns: Columns, spec: Spec, app: str) -> _Parts:
        state, rows = columns.state, len(columns.node_ids)
        weights = self._weights(columns, spec)
        families = _Families(columns, spec, weights.tier)
        app_subject = f"app/{app}" if app else ""
        weights_ms = families.at("weights", weights.raw, "")
        weights_ms = np.where((weights.missing > 0) & (weights.raw < NEVER_MS), weights_ms, weights.raw)
        by_name = {
            "rest": families.at("rest", 0, ""),
            "image": self._image(columns, spec),
            "make": families.at("make", 0, f"image/{spec.image}"),
            "weights": weights_ms,
            "start": families.at("start", 0, f"image/{spec.image}"),
            "setup": families.at("setup", weights.bytes_total >> _KIB, app_subject),
            "compile": np.zeros(rows, np.int64),
        }
        if compile_missing(state, spec):
            by_name["compile"] = families.at("compile", 0, app_subject)
        up = by_name["image"] + by_name["make"]
        if spec.stream_weights:
            by_name["tail"] = np.where(weights.missing > 0, by_name["setup"] // 20, 0)
            both = np.maximum(up + by_name["start"] + by_name["setup"], weights_ms + by_name["tail"])
        else:
            both = np.maximum(up, weights_ms) + by_name["start"] + by_name["setup"]
        total = np.minimum(by_name["rest"] + both + by_name["compile"], NEVER_MS)
        return _Parts(total, weights, by_name)

    def _weights(self, columns: Columns, spec: Spec) -> _Weights:
        """All models, LoRAs and entries: their bytes come over one line."""
        state, rows = columns.state, len(columns.node_ids)
        zeros: Ints = np.zeros(rows, np.int64)
        found = _Weights(zeros, zeros, zeros, zeros, 0)
        for at, model in enumerate(_artifacts(state, spec)):
            size = model.bytes
            found.bytes_total += size if model.kind != "cache" else 0
            have = columns.artifact(model.artifact_id or model.manifest_digest)
            ready = have.ready > 0
            missing = np.where(ready, 0, np.maximum(size - have.here, 0))
            here = np.where(have.memory >= max(size, 1), MEMORY, DISK)
            fetch, tier, unmeasured = self._fetch(columns, model, have, missing, first=at == 0)
            attest = 0 if model.state is ModelState.ATTESTED else ATTEST_MS
            raw = np.where(missing > 0, fetch + attest, np.where(ready, 0, attest))
            found.raw = np.minimum(found.raw + raw, NEVER_MS)
            found.tier = np.maximum(found.tier, np.where(missing > 0, tier, here))
            found.missing = found.missing + missing
            found.unmeasured = found.unmeasured | ((missing > 0) & (unmeasured > 0))
        return found

    def _fetch(
        self, columns: Columns, model: Model, have: ArtifactColumns, missing: Ints, *, first: bool
    ) -> tuple[Ints, Ints, Ints]:
        """Milliseconds for what is missing, the tier that most of it comes from, where no rate was ever measured."""
        source = origin_source(model.resolved_uri or model.uri)
        origin = columns.origin(source)
        peers = np.clip(columns.holders(have), 0, PEERS_AT_ONCE_MAX)
        from_peers = peers * np.maximum(columns.peer(), 0)
        from_origin = np.maximum(origin, 0)
        unmeasured = (((origin < 0) | (origin == 0) & (peers > 0)) & (from_peers == 0)).astype(np.int64)
        supply = from_origin + from_peers
        several = (from_peers > 0) & ((from_origin > 0) | (peers > 1)) & (columns.fed > 0)
        single = np.maximum(from_origin, np.maximum(columns.peer(), 0))
        supply = np.where(several, np.minimum(supply, np.maximum(columns.fed, single)), supply)
        supply = np.where(unmeasured > 0, ASSUMED_BYTES_S, supply)
        ahead = columns.ahead(model.bytes) if first else 0
        own = have.known * np.minimum(columns.ahead_bytes, missing)  # its own fetch is part of what is under way
        node_ms = _ceil_ms(missing + np.maximum(ahead - own, 0), supply)
        shared_ms = self._shared(columns, model, source, missing, from_origin > 0, peers > 0)
        arriving = (have.rate > 0) & (missing > 0)
        ms = np.where(arriving, _ceil_ms(missing, have.rate), np.maximum(node_ms, shared_ms))
        ms = np.where((supply == 0) & ~arriving, NEVER_MS, ms)
        tier = np.where(from_peers > from_origin, PEER, np.where((peers > 0) & (origin <= 0), PEER, ORIGIN))
        return ms, tier, unmeasured

    def _shared(
        self, columns: Columns, model: Model, source: str, missing: Ints, by_origin: Bools, by_peers: Bools
    ) -> Ints:
        """Milliseconds until the sources, which others use too, have given it: they share evenly."""
        facts = columns.state.cache_facts
        artifact = model.artifact_id or model.manifest_digest
        peers = [f"peer:{node_id}" for node_id, _ in zip(facts.holders.get(artifact, ()), range(8), strict=False)]
        at_origin, at_peers = _others(columns.state, artifact, source, [name[5:] for name in peers], model.bytes)
        capacity_origin = facts.capacity(source)
        capacity_peers = sum(facts.capacity(name) for name in peers)
        capacity = np.where(by_origin, capacity_origin, 0) + np.where(by_peers, capacity_peers, 0)
        others = np.where(by_origin, at_origin, 0) + np.where(by_peers, at_peers, 0)
        return np.where((capacity > 0) & (others > 0), _ceil_ms(missing + others, capacity), 0)

    def _image(self, columns: Columns, spec: Spec) -> Ints:
        """Milliseconds until what a start reads of its image is there."""
        rows = len(columns.node_ids)
        model = columns.state.models.get(spec.image) if spec.image != HOST_IMAGE else None
        if model is None:
            return np.zeros(rows, np.int64)
        have = columns.artifact(model.artifact_id or model.manifest_digest)
        first = first_bytes(model)
        missing = np.where(have.ready > 0, 0, np.maximum(model.bytes - have.here, 0))
        missing = np.minimum(missing, np.maximum(first - have.here, 0))
        fetch, _, _ = self._fetch(columns, model, have, missing, first=False)
        return np.where(missing > 0, fetch, 0)

    # --- reasons ----------------------------------------------------------------------------------------------------

    def _inputs(self, columns: Columns, spec: Spec, parts: _Parts, row: int) -> list[tuple[str, int]]:
        """What is learnt of this placement once it is ready: (family, x)."""
        driver, gpu = columns.drivers[int(columns.driver[row])], columns.gpus[int(columns.gpu[row])]
        tier = int(parts.weights.tier[row])
        gpu = gpu if spec.num_gpus else ""
        found = [("rest", 0), (f"make/{driver}", 0), (f"start/{driver}", 0)]
        found.append((f"setup/{_LOADED_FROM[tier]}/{gpu}", parts.weights.bytes_total >> _KIB))
        raw = int(parts.weights.raw[row])
        if int(parts.weights.missing[row]) and raw < NEVER_MS:
            found.append((f"weights/{TIERS[tier]}", raw))
        if compile_missing(columns.state, spec):
            found.append((f"compile/{gpu}", 0))
        return found

    def _because(self, columns: Columns, learning: Learning, name: str, family: str, parts: _Parts, row: int) -> str:
        weights = parts.weights
        if name == "weights":
            return self._weights_because(columns, weights, row, learning.known(family) if family else 0)
        if not family:
            return "what a start reads of it first, at measured rates" if name == "image" else "of the setup"
        known = learning.known(family)
        subjects = f"{known} starts" if known != 1 else "1 start"
        text = f"learnt from {subjects}" if known else "assumed, nothing learnt yet"
        if name == "setup":
            return f"{weights.bytes_total / 1e9:.2f} GB to load from {family.split('/')[1]}, {text}"
        return text

    def _weights_because(self, columns: Columns, weights: _Weights, row: int, known: int) -> str:
        missing, tier = int(weights.missing[row]), TIERS[int(weights.tier[row])]
        if not missing:
            return f"all {weights.bytes_total / 1e9:.2f} GB are there, in tier {tier}"
        if int(weights.raw[row]) >= NEVER_MS:
            return "no route to any holder and the origin does not answer"
        ahead = int(columns.ahead_bytes[row])
        text = f"{missing / 1e9:.2f} GB from {tier}"
        if int(weights.unmeasured[row]):
            text += f" at an assumed {ASSUMED_BYTES_S / 1e6:.0f} MB/s, no rate towards this node was ever measured"
        if ahead:
            text += f", beside {ahead / 1e9:.2f} GB under way to the node"
        return f"{text}; learnt from {known} fetches" if known else f"{text}; nothing learnt yet"


class _Families:
    """Learnt lines on columns: each family's line and ratios where its rows are."""

    def __init__(self, columns: Columns, spec: Spec, tier: Ints) -> None:
        self._columns, self._spec, self._tier = columns, spec, tier

    def at(self, name: str, x: Ints | int, subject: str) -> Ints:
        """The learnt time of a part, each row by its own driver, GPU and tier. `subject`: the app or image."""
        columns = self._columns
        if name == "rest":
            return self._of("rest", x, subject)
        if name in ("make", "start"):
            return self._chosen(columns.driver, [f"{name}/{driver}" for driver in columns.drivers], x, subject)
        if name == "weights":
            return self._chosen(self._tier, [f"weights/{tier}" for tier in TIERS], x, subject, only=(PEER, ORIGIN))
        gpus = columns.gpus if self._spec.num_gpus else [""]
        gpu = columns.gpu if self._spec.num_gpus else np.zeros(len(columns.node_ids), np.int64)
        if name == "compile":
            return self._chosen(gpu, [f"compile/{one}" for one in gpus], x, subject)
        names = [f"setup/{tier}/{one}" for one in gpus for tier in _LOADED_FROM]
        return self._chosen(gpu * len(TIERS) + self._tier, names, x, subject)

    def _chosen(
        self, index: Ints, names: list[str], x: Ints | int, subject: str, *, only: tuple[int, ...] | None = None
    ) -> Ints:
        """`names[index]` of each row."""
        found: Ints = np.zeros(len(index), np.int64)
        made: dict[str, Ints] = {}
        for at in np.unique(index).tolist():
            if only is not None and at not in only:
                continue
            name = names[at]
            if name not in made:
                made[name] = self._of(name, x, subject)
            found = np.where(index == at, made[name], found)
        return found

    def _of(self, family: str, x: Ints | int, subject: str) -> Ints:
        columns = self._columns
        learning = columns.state.learning
        line = learning.line(family) if learning.known(family) else default_line(family)
        bounded = np.minimum(x, NEVER_MS // MILLI)
        y: Ints = line.base + bounded * np.int64(line.slope_ppm) // 1_000_000
        if subject:
            y = y * learning.ratio_milli(family, subject) // MILLI
        for ratio in columns.ratios(family):
            y = y * ratio // MILLI
        return np.broadcast_to(y, len(columns.node_ids))


def _artifacts(state: State, spec: Spec) -> list[Model]:
    """Models, LoRAs and entries of the compile cache that a runner needs; those nobody registered are left out."""
    found = [state.models[name] for name in spec.models if name in state.models]
    for key in spec.compile_caches:
        entry = next((one for (_, k), one in state.catalog.cache_entries.items() if k == key), None)
        if entry is not None and entry.model in state.models:
            found.append(state.models[entry.model])
    return found


def compile_missing(state: State, spec: Spec) -> bool:
    """Whether an entry that it names is in no namespace, so that it compiles for itself."""
    have = {key for _, key in state.catalog.cache_entries}
    return any(key not in have for key in spec.compile_caches)


def first_bytes(image: Model) -> int:
    """Bytes of an image that its start reads: as recorded, else a share of it."""
    facts = image.image
    if facts is None or not facts.first_pieces:
        return image.bytes * IMAGE_FIRST_PERC // 100
    return min(image.bytes, len(facts.first_pieces) * piece_bytes(image))


def piece_bytes(image: Model) -> int:
    """Of an image: 256 KiB, larger ones above 16 GiB."""
    size = 256 << 10
    while image.bytes > size << 16:
        size <<= 1
    return size


def _others(state: State, artifact: str, source: str, peers: list[str], size: int) -> tuple[int, int]:
    """Bytes that an origin, and that these peers, send of other artifacts meanwhile; each no more than `size`."""
    facts = state.cache_facts
    at_origin = at_peers = 0
    for other, _ in zip(facts.under_way, range(UNDER_WAY_MAX), strict=False):
        if other == artifact:
            continue
        fetchers = [node_id for node_id, _ in zip(facts.under_way[other], range(UNDER_WAY_MAX), strict=False)]
        left = min(size, max(facts.remaining(other, node_id) for node_id in fetchers))
        holders = facts.holders.get(other, {})
        if any(peer in holders and holders[peer].ready for peer in peers):
            at_peers += left
        elif _source_of(state, other) == source:
            at_origin += left
    return at_origin, at_peers


def _source_of(state: State, artifact: str) -> str:
    names = state.models_by_artifact.get(artifact) or state.models_by_digest.get(artifact)
    if not names:
        return ""
    model = state.models[names[0]]
    return origin_source(model.resolved_uri or model.uri)


def _ceil_ms(size: Ints | int, rate: Ints | int) -> Ints:
    found: Ints = -(-np.asarray(size, np.int64) * _MS // np.maximum(rate, 1))
    return found


__all__ = [
    "ASSUMED_BYTES_S", "NEVER_MS", "Prediction", "Predictor", "Term", "compile_missing", "first_bytes", "predict",
    "predictor", "ready_ms",
]  # fmt: skip
