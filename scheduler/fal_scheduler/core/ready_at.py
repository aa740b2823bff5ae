"""When a runner of a spec would be ready on a node if it were placed there now: the prediction that placement ranks by.

    up      = image + make                    image: bytes that a start reads first; make: its root and container
    ready   = rest + max(up, weights) + start + setup + compile                    weights first, then the process
            = rest + max(up + start + setup, weights + tail) + compile             where the app streams its weights

`rest`: orders and reports on their way; `start`: the process begins; `setup`: initialise, load, warm up: a line over
the bytes to load, by tier and GPU; `compile`: where an entry of the compile cache is missing. Weights of all artifacts
share the node's line with what is under way there, and an origin's or peer's line with what is under way elsewhere:

    weights = max( (missing + ahead) / supply of this node, (missing + others) / capacity of the sources )

That is by rates that caches tell, until placements have taught how long bytes of that origin, or of peers, take: from
then on it is a learnt line over the same bytes, as rates swing with what a fetch has to ask for and placements do not.
Every part is learnt (`learning`); what is assumed says so. A node that nothing leads to gets NEVER_MS. `ready_ms` is
the same formula on columns (`ready_views`), integers throughout: both give the same numbers, on every machine.
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
from fal_scheduler.core.ready_columns import Columns, Ints
from fal_scheduler.core.ready_needs import SharedLine, artifact_of, compile_missing, first_bytes, needed, shared_line
from fal_scheduler.core.ready_views import (
    DISK,
    LOADED_FROM,
    MEMORY,
    ORIGIN,
    PEER,
    TIERS,
    Held,
    ManyNodes,
    NodesView,
    Number,
    OneNode,
    Truth,
    ahead,
    source_family,
)
from fal_scheduler.core.records import HOST_IMAGE, Model, ModelState, Spec
from fal_scheduler.core.state import State

NEVER_MS: Final = 1 << 40  # 35 years: after everything that can be reached
ASSUMED_BYTES_S: Final = 25_000_000  # where nobody has measured: on the slow side, so that a measured way goes first
ATTEST_MS: Final = 1000
PEERS_AT_ONCE_MAX: Final = 8
TAIL_PERC: Final = 5  # of the setup, after the last byte of streamed weights
PATCHED_ROWS_MAX: Final = 512  # more that changed: everything is computed anew
TOTALS_KEPT_MAX: Final = 64
_KIB: Final = 10
MILLI: Final = 1000
_MS: Final = 1000


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
    """For one node that is in the fleet, with reasons. `app`: what it is placed for, whose own times count.

    `now_s` is not looked at: it is as of the step that the state is in (`State.facts_at_ms`).
    """
    return predictor(state).predict(node_id, spec, app=app)


def ready_ms(state: State, spec: Spec, node_ids: Sequence[str], *, app: str = "") -> Ints:
    """Milliseconds for each of these nodes, int64 of shape (n,); the same list object again costs no look-ups."""
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
    """All artifacts of a spec. `raw`: milliseconds by told rates; `come`: bytes on the node's line until then.

    `arriving`: 1 where their own fetch is measured; `tier`: index into TIERS; `source`: of their origin.
    """

    missing: Number
    raw: Number
    come: Number
    arriving: Number
    tier: Number
    unmeasured: Number
    source: str = ""
    bytes_total: int = 0


@dataclass(slots=True)
class _Parts:
    total: Number
    weights: _Weights
    by_name: dict[str, Number]


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a spec needs, worked out once for all nodes."""

    spec: Spec
    app: str
    artifacts: tuple[tuple[Model, SharedLine], ...]
    image: tuple[Model, SharedLine] | None
    compiles: bool


@dataclass(slots=True)
class _Totals:
    """Totals of all rows, and what they were computed from."""

    needs: _Needs
    stamp: tuple[object, ...]
    facts_seen: int
    at_ms: int
    values: Ints


class Predictor:
    """`predict` and `ready_ms` of one State."""

    def __init__(self, state: State) -> None:
        self._columns = Columns(state)
        self._asked: Sequence[str] = ()
        self._rows: Ints = np.zeros(0, np.int64)
        self._row_of: object = None
        self._totals: dict[tuple[int, str], _Totals] = {}

    def ready_ms(self, spec: Spec, node_ids: Sequence[str], *, app: str = "") -> Ints:
        """See the function."""
        columns = self._columns.fresh()
        totals = self._all(columns, _needs_of(columns.state, spec, app))
        if node_ids is not self._asked or self._row_of is not columns.row_of or len(node_ids) != len(self._rows):
            row_of = columns.row_of
            self._rows = np.fromiter((row_of[node_id] for node_id in node_ids), np.int64, len(node_ids))
            self._asked, self._row_of = node_ids, row_of
        found: Ints = totals[self._rows]
        return found

    def predict(self, node_id: str, spec: Spec, *, app: str = "") -> Prediction:
        """See the function."""
        columns = self._columns.fresh()
        view = OneNode(columns, columns.row_of[node_id])
        needs = _needs_of(columns.state, spec, app)
        parts = _compute(view, needs)
        inputs = _inputs(view, needs, parts.weights)
        families = {family.partition("/")[0]: family for family, _ in inputs}
        terms = [
            Term(name, ms, _because(view, name, families.get(name, ""), parts.weights))
            for name, ms in parts.by_name.items()
            if ms or name in families
        ]
        return Prediction(parts.total, tuple(terms), node_id, TIERS[parts.weights.tier], inputs)

    def _all(self, columns: Columns, needs: _Needs) -> Ints:
        """Totals of all rows: those of the last time, and computed anew where something changed."""
        key = (id(needs.spec), needs.app)
        have = self._totals.pop(key, None)
        artifacts = [artifact_of(model) for model, _ in needs.artifacts]
        if needs.image is not None:
            artifacts.append(artifact_of(needs.image[0]))
        sources = [origin_source(model.resolved_uri or model.uri) for model, _ in needs.artifacts]
        stamp = columns.stamp(artifacts, sources)
        rows = columns.changed_since(have.facts_seen, have.at_ms) if have is not None else None
        if have is None or have.needs != needs or have.stamp != stamp or rows is None or len(rows) > PATCHED_ROWS_MAX:
            values = _compute(ManyNodes(columns), needs).total
            stamp = columns.stamp(artifacts, sources)
            have = _Totals(needs, stamp, columns.facts_seen, columns.at_ms, values)
        elif len(rows):
            have.values[rows] = _compute(ManyNodes(columns, rows), needs).total
        have.facts_seen, have.at_ms = columns.facts_seen, columns.at_ms
        self._totals[key] = have
        if len(self._totals) > TOTALS_KEPT_MAX:
            del self._totals[next(iter(self._totals))]
        return have.values


# --- the formula ----------------------------------------------------------------------------------------------------


def _needs_of(state: State, spec: Spec, app: str) -> _Needs:
    image = state.models.get(spec.image) if spec.image != HOST_IMAGE else None
    return _Needs(
        spec,
        app,
        tuple((model, shared_line(state, model)) for model in needed(state, spec)),
        (image, shared_line(state, image)) if image is not None else None,
        compile_missing(state, spec),
    )


def _compute(view: NodesView, needs: _Needs) -> _Parts:
    spec, gpus = needs.spec, needs.spec.num_gpus > 0
    app, image = f"app/{needs.app}" if needs.app else "", f"image/{spec.image}"
    weights = _weights(view, needs)
    known, learnt = view.by_source("weights", weights.come >> _KIB, weights.tier, weights.source)
    taught = (known > 0) & (_whole(needs, weights) | _fetched(weights))
    fetched = view.pick(taught, learnt, weights.raw)
    rest, make, start = view.everywhere("rest"), view.by_driver("make", 0, image), view.by_driver("start", 0, image)
    setup = view.by_gpu("setup", weights.bytes_total >> _KIB, app, gpus, weights.tier)
    compile_ = view.by_gpu("compile", 0, app, gpus, None) if needs.compiles else view.zero
    first = _image(view, needs)
    by_name = {
        "rest": rest, "image": first, "make": make, "weights": fetched, "start": start, "setup": setup,
        "compile": compile_,
    }  # fmt: skip
    if spec.stream_weights:
        tail = by_name["tail"] = view.pick(weights.missing > 0, setup * TAIL_PERC // 100, view.zero)
        both = view.most(first + make + start + setup, fetched + tail)
    else:
        both = view.most(first + make, fetched) + start + setup
    return _Parts(view.least(rest + both + compile_, NEVER_MS), weights, by_name)


def _whole(needs: _Needs, weights: _Weights) -> Truth:
    """Where all of it is ready: the cache is asked, it pins, and that takes its time too."""
    return (weights.missing == 0) & (weights.raw == 0) & bool(needs.artifacts)


def _fetched(weights: _Weights) -> Truth:
    """Where some of it must come, and a placement of now is what asks for it."""
    return (weights.missing > 0) & (weights.raw < NEVER_MS) & (weights.arriving == 0)


def _weights(view: NodesView, needs: _Needs) -> _Weights:
    """All models, LoRAs and entries: their bytes come over one line, one after the other or beside each other."""
    zero = view.zero
    found = _Weights(zero, zero, zero, zero, zero + MEMORY, zero > 0)
    if not needs.artifacts:
        found.tier = zero + DISK
    for at, (model, line) in enumerate(needs.artifacts):
        have, size = view.held(artifact_of(model)), model.bytes
        found.bytes_total += size if model.kind != "cache" else 0
        missing = view.pick(have.ready > 0, zero, view.most(size - have.here, 0))
        if not found.source:
            found.source = origin_source(model.resolved_uri or model.uri)
        ms, come, tier, unmeasured = _fetch(view, model, line, have, missing, first=at == 0)
        here = view.pick(have.memory >= max(size, 1), zero + MEMORY, zero + DISK)
        attest = 0 if model.state is ModelState.ATTESTED else ATTEST_MS
        done = view.pick(have.ready > 0, zero, zero + attest)
        fetches = missing > 0
        found.raw = view.least(found.raw + view.pick(fetches, ms + attest, done), NEVER_MS)
        found.come = found.come + view.pick(fetches, come, zero)
        found.arriving = view.most(found.arriving, view.pick(fetches & (have.rate > 0), zero + 1, zero))
        found.tier = view.most(found.tier, view.pick(fetches, tier, here))
        found.missing = found.missing + missing
        found.unmeasured = found.unmeasured | (fetches & unmeasured)
    return found


def _fetch(
    view: NodesView, model: Model, line: SharedLine, have: Held, missing: Number, *, first: bool
) -> tuple[Number, Number, Number, Number]:
    """Milliseconds for what is missing; bytes on the line until then; its tier; whether no rate was ever measured.

    The tier is peer where a node that can be reached has some of it.
    """
    zero = view.zero
    origin, peer = view.origin(origin_source(model.resolved_uri or model.uri)), view.most(view.peer, 0)
    peers = view.least(view.most(have.others, 0), PEERS_AT_ONCE_MAX)
    from_origin, from_peers = view.most(origin, 0), peers * peer
    supply = from_origin + from_peers
    unmeasured = (supply == 0) & ((origin < 0) | (peers > 0))
    together = (from_peers > 0) & ((from_origin > 0) | (peers > 1)) & (view.fed > 0)
    bound = view.most(view.fed, view.most(from_origin, peer))
    supply = view.pick(together, view.least(supply, bound), supply)
    supply = view.pick(unmeasured, zero + ASSUMED_BYTES_S, supply)
    beside = ahead(view, model.bytes) if first else zero
    mine = have.known * view.least(view.ahead_bytes, missing)  # its own fetch is part of what is under way
    come = missing + view.most(beside - mine, 0)
    node_ms = _ceil_ms(view, come, supply)
    by_origin, by_peers = from_origin > 0, peers > 0
    capacity = view.pick(by_origin, zero + line.origin_bytes_s, zero)
    capacity = capacity + view.pick(by_peers, zero + line.peers_bytes_s, zero)
    others = view.pick(by_origin, zero + line.origin_bytes, zero)
    others = others + view.pick(by_peers, zero + line.peers_bytes, zero)
    shared_ms = view.pick((capacity > 0) & (others > 0), _ceil_ms(view, missing + others, capacity), zero)
    arriving = have.rate > 0
    ms = view.pick(arriving, _ceil_ms(view, missing, have.rate), view.most(node_ms, shared_ms))
    ms = view.pick((supply == 0) & (have.rate == 0), zero + NEVER_MS, ms)
    shared = view.pick(by_origin & (others > 0), (missing + others) * line.one_of_all_milli // MILLI, zero)
    come = view.most(come, view.pick(peers > 0, zero, shared))
    return view.least(ms, NEVER_MS), come, view.pick(peers > 0, zero + PEER, zero + ORIGIN), unmeasured


def _image(view: NodesView, needs: _Needs) -> Number:
    """Milliseconds until what a start reads of its image is there."""
    if needs.image is None:
        return view.zero
    model, line = needs.image
    have = view.held(artifact_of(model))
    missing = view.pick(have.ready > 0, view.zero, view.most(first_bytes(model) - have.here, 0))
    ms, _, _, _ = _fetch(view, model, line, have, missing, first=False)
    return view.pick(missing > 0, ms, view.zero)


def _ceil_ms(view: NodesView, size: Number, rate: Number) -> Number:
    return -(-size * _MS // view.most(rate, 1))


# --- reasons --------------------------------------------------------------------------------------------------------


def _inputs(view: OneNode, needs: _Needs, weights: _Weights) -> tuple[tuple[str, int], ...]:
    """What is learnt of this placement once it is ready: (family, x)."""
    gpu, driver = view.gpu if needs.spec.num_gpus else "", view.driver
    found = [("rest", 0), (f"make/{driver}", 0), (f"start/{driver}", 0)]
    found.append((f"setup/{LOADED_FROM[weights.tier]}/{gpu}", weights.bytes_total >> _KIB))
    if _whole(needs, weights) or _fetched(weights):
        found.append((source_family("weights", weights.tier, weights.source), weights.come >> _KIB))
    if needs.compiles:
        found.append((f"compile/{gpu}", 0))
    return tuple(found)


def _because(view: OneNode, name: str, family: str, weights: _Weights) -> str:
    known = view.columns.state.learning.known(family) if family else 0
    if name == "weights":
        return _weights_because(view, weights, known)
    if not family:
        return "what a start reads of it first, at measured rates" if name == "image" else "a share of the setup"
    text = f"learnt from {known} {'start' if known == 1 else 'starts'}" if known else "assumed, nothing learnt yet"
    if name == "setup":
        return f"{weights.bytes_total / 1e9:.2f} GB to load from {family.split('/')[1]}, {text}"
    return text


def _weights_because(view: OneNode, weights: _Weights, known: int) -> str:
    if not weights.missing:
        text = f"all {weights.bytes_total / 1e9:.2f} GB are there, in tier {TIERS[weights.tier]}"
        return f"{text}; to ask for them is learnt from {known} starts" if known else text
    if weights.raw >= NEVER_MS:
        return "no route to any holder and the origin does not answer"
    text = f"{weights.missing / 1e9:.2f} GB from {TIERS[weights.tier]}"
    if weights.unmeasured:
        text += f" at an assumed {ASSUMED_BYTES_S / 1e6:.0f} MB/s, no rate towards this node was ever measured"
    if view.ahead_bytes:
        text += f", beside {view.ahead_bytes / 1e9:.2f} GB under way to the node"
    return f"{text}; learnt from {known} fetches" if known else f"{text}; nothing learnt yet"


__all__ = ["ASSUMED_BYTES_S", "NEVER_MS", "Prediction", "Predictor", "Term", "predict", "predictor", "ready_ms"]
