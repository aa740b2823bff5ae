"""What was predicted of each placement, and what came of it: kept until the runner is ready, compared then, learnt.

Pure. `placed` is called when a runner gets a node, `ready` when it serves, `forget` when it leaves its node. What was
predicted is kept by this leader only: of a runner that an earlier one placed nothing is compared. After a runner is
ready its prediction stays, with what really happened, for `falctl explain`, the last OUTCOMES_MAX of them.

Which time teaches which part (phases of agent.proto): "make" the root and container, "weights" what was missing,
"create" and "start" together the start, "setup" initialisation, load and warm-up; what is left of the whole is "rest".
Of a runner that streams its weights, or compiles, "setup" holds other things too and teaches nothing of loading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from fal_scheduler.core.ready_at import NEVER_MS, Prediction, predict
from fal_scheduler.core.ready_needs import artifact_of, needed
from fal_scheduler.core.records import Runner, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.told import RunnerStatus

OUTCOMES_MAX: Final = 1024
EXPECTED_MAX: Final = 100_000  # placements that are not ready yet; the oldest are let go
SWEEP_EVERY_S: Final = 60.0
MILLI: Final = 1000
PPM: Final = 1_000_000
_SUBJECT_OF: Final = {"make": "image", "start": "image", "setup": "app", "compile": "app"}


@dataclass(frozen=True, slots=True)
class Expectation:
    """One placement. `actual`: milliseconds by part and `ready_ms` in all, once it is ready; -1 until then.

    `placed_at_s`: monotonic. `artifacts`: what it waits for on its node.
    """

    prediction: Prediction
    app: str
    image: str
    placed_at_s: float
    streams: bool = False
    artifacts: tuple[str, ...] = ()
    actual: tuple[tuple[str, int], ...] = ()
    ready_ms: int = -1

    @property
    def error_ppm(self) -> int:
        """|predicted - actual| / actual in millionths; -1 until it is ready, or where nothing was predicted."""
        if self.ready_ms < 0 or self.prediction.total_ms >= NEVER_MS:
            return -1
        return abs(self.prediction.total_ms - self.ready_ms) * PPM // max(self.ready_ms, 1)


def placed(state: State, runner: Runner, *, now_s: float) -> None:
    """A runner was given a node: predict, and count what it needs as under way."""
    revision = state.revisions.get((runner.app, runner.revision))
    if revision is None or runner.node not in state.fleet.facts:
        return
    spec = revision.spec
    prediction = predict(state, runner.node, spec, now_s=now_s, app=runner.app)
    artifacts = _missing(state, runner.node, spec)
    made = Expectation(prediction, runner.app, spec.image, now_s, spec.stream_weights, artifacts)
    forget(state, runner.id)
    state.predictions[runner.id] = made
    state.outcomes.pop(runner.id, None)
    for model in needed(state, spec):
        if artifact_of(model) in artifacts:
            state.cache_facts.expect(runner.node, artifact_of(model), model.bytes)
    if len(state.predictions) > EXPECTED_MAX:
        forget(state, next(iter(state.predictions)))


def _missing(state: State, node_id: str, spec: Spec) -> tuple[str, ...]:
    facts = state.cache_facts
    ids = [artifact_of(model) for model in needed(state, spec)]
    return tuple(id_ for id_ in ids if id_ and node_id not in facts.holders.get(id_, {}))


def forget(state: State, runner_id: str) -> Expectation | None:
    """It is ready, left its node, or is gone: nothing is under way for it any more, unless another waits for it too."""
    gone = state.predictions.pop(runner_id, None)
    if gone is not None:
        node_id = gone.prediction.node_id
        mates = (state.predictions.get(mate) for mate in state.runners_by_node.get(node_id, ()))
        waited = {id_: None for mate in mates if mate is not None for id_ in mate.artifacts}
        for artifact in gone.artifacts:
            if artifact not in waited:
                state.cache_facts.settle(node_id, artifact)
    return gone


def sweep(state: State, *, now_s: float) -> None:
    """Let go, from time to time, of placements that were taken back with their commit."""
    if now_s - state.learning.swept_at_s < SWEEP_EVERY_S:
        return
    state.learning.swept_at_s = now_s
    for runner_id, made in list(state.predictions.items()):
        runner = state.runners.get(runner_id)
        if runner is None or runner.node != made.prediction.node_id:
            forget(state, runner_id)


def ready(state: State, runner: Runner, status: RunnerStatus, *, arrived_s: float, wall_s: float) -> dict[str, str]:
    """It serves: compare, learn, and say it in words for the event. Empty where nothing was predicted."""
    made = forget(state, runner.id)
    if made is None or made.prediction.node_id != runner.node:
        return {}
    total_ms = max(0, round((arrived_s - made.placed_at_s) * MILLI))
    actual = _actual(status, total_ms)
    outcome = replace(made, actual=tuple(actual.items()), ready_ms=total_ms)
    state.outcomes[runner.id] = outcome
    if len(state.outcomes) > OUTCOMES_MAX:
        del state.outcomes[next(iter(state.outcomes))]
    _learn(state, made, actual, runner.node, int(wall_s))
    prediction = made.prediction
    words = {"predicted_ms": str(prediction.total_ms), "actual_ms": str(total_ms), "tier": prediction.tier}
    for term in prediction.terms:
        if term.ms or term.name in actual:
            words[f"{term.name}_ms"] = f"{term.ms}/{actual[term.name]}" if term.name in actual else str(term.ms)
    return words


def _actual(status: RunnerStatus, total_ms: int) -> dict[str, int]:
    """What each part took; parts that an agent does not tell are left out."""
    told = {name: round(seconds * MILLI) for name, seconds in status.phases}
    found: dict[str, int] = {name: told[name] for name in ("make", "weights", "setup") if name in told}
    if "start" in told:
        found["start"] = told.get("create", 0) + told["start"]
    named = [told[name] for name in ("stage", "create", "start", "setup") if name in told]
    if len(named) == 4:
        found["rest"] = max(0, total_ms - sum(named))
    return found


def _learn(state: State, made: Expectation, actual: dict[str, int], node_id: str, wall_s: int) -> None:
    pool = state.fleet.facts[node_id].pool if node_id in state.fleet.facts else ""
    parts = {family.partition("/")[0]: (family, x) for family, x in made.prediction.inputs}
    compiled = "compile" in parts
    for part, y in actual.items():
        if part not in parts or (part == "setup" and (compiled or (made.streams and "weights" in parts))):
            continue
        family, x = parts[part]
        kind = _SUBJECT_OF.get(part, "")
        own = [f"{kind}/{made.app if kind == 'app' else made.image}"] if kind else []
        state.learning.learn(family, x, y, [*own, f"pool/{pool}", f"node/{node_id}"], wall_s=wall_s)
    if compiled and "setup" in actual:
        family, x = parts["compile"]
        y = max(0, actual["setup"] - made.prediction.ms("setup"))
        state.learning.learn(family, x, y, [f"app/{made.app}", f"pool/{pool}", f"node/{node_id}"], wall_s=wall_s)


__all__ = ["Expectation", "forget", "placed", "ready", "sweep"]
