"""Predicted readiness on random clusters: columns give what one node's prediction gives, also change by change."""

from __future__ import annotations

import pickle
from dataclasses import replace
from random import Random

import pytest

from fal_scheduler.core import ready_at
from fal_scheduler.core.cache_events import CachedFact, CacheTold
from fal_scheduler.core.cache_facts import time_step
from fal_scheduler.core.learning import Learning
from fal_scheduler.core.records import (
    CacheEntry,
    Change,
    ImageFacts,
    Model,
    ModelState,
    Node,
    Pool,
    Spec,
    key_of,
)
from fal_scheduler.core.state import State

GB = 10**9
ARTIFACTS = tuple(f"{at}" * 64 for at in range(6))
HOSTS = ("s3://bucket/m", "https://hub.example/m", "file:///srv/m")


def put(state: State, record: Pool | Node | Model | CacheEntry) -> None:
    """Make a record, or replace it."""
    before = {Pool: state.pools, Node: state.nodes, Model: state.models}.get(type(record), {})
    key = record.name if isinstance(record, Pool) else getattr(record, "id", "")
    state.apply(Change(key_of(record), before.get(key), record))


def random_cluster(rng: Random, nodes: int = 12) -> State:
    """Pools with and without networks, models of all sizes, an image, nothing told."""
    state = State()
    for at, networks in enumerate(((), ("lan",), ("wan",))):
        put(state, Pool(f"p{at}", region=rng.choice(("eu", "us")), networks=networks))
    for at in range(nodes):
        put(state, Node(f"n{at:02d}", f"node{at}", f"p{rng.randrange(3)}"))
    for at, artifact in enumerate(ARTIFACTS):
        size = rng.choice((0, 1 << 20, 300 << 20, 5 * GB, 60 * GB))
        image = ImageFacts("s", "d", "erofs", first_pieces=tuple(range(rng.randrange(99)))) if at == 5 else None
        state_ = rng.choice((ModelState.REGISTERED, ModelState.ATTESTED))
        put(
            state,
            Model(f"default/m{at}", "model", HOSTS[at % 3], state_, bytes=size, artifact_id=artifact, image=image),
        )
    put(state, CacheEntry("cluster", "k0", "default/m4", "d"))
    return state


def random_news(state: State, rng: Random) -> None:
    """A cache tells something, a placement expects something, something is learnt, or time passes."""
    node_id = f"n{rng.randrange(14):02d}"
    match rng.randrange(9):
        case 8:
            state.facts_at_ms = time_step(state.facts_at_ms / 1000 + rng.choice((0.3, 0.5, 3.0, 20.0)))
        case 0:
            state.cache_facts.take(CacheTold(node_id, 0.0, left=True))
        case 1:
            state.cache_facts.expect(node_id, rng.choice(ARTIFACTS), rng.randrange(9 * GB))
        case 2:
            state.cache_facts.settle(node_id, rng.choice(ARTIFACTS))
        case 3 | 4:
            part = rng.choice(
                (
                    "rest",
                    "make/",
                    "start/",
                    "setup/disk/",
                    "setup/arrived/",
                    "weights/peer/",
                    "weights/origin/origin:bucket",
                    "compile/",
                )
            )
            subjects = ("app/default/a", f"pool/p{rng.randrange(3)}", f"node/{node_id}")
            state.learning.learn(part, rng.randrange(10**5), rng.randrange(10**5), subjects, wall_s=rng.randrange(99))
        case _:
            facts = {}
            for artifact in rng.sample(ARTIFACTS, rng.randrange(4)):
                here, ready = rng.choice((0, 100 << 20, 3 * GB)), rng.randrange(3) == 0
                coming = not ready and rng.randrange(2) == 0
                facts[artifact] = CachedFact(
                    here,
                    rng.choice((0, here)),
                    ready,
                    coming,
                    rng.randrange(GB) if coming else 0,
                    rng.choice((0, rng.randrange(GB))) if coming else 0,
                )
            sources = ("origin:bucket", "origin:hub.example", "origin:file", "peer:n01", "peer:n02")
            rates = {source: rng.choice((0, rng.randrange(1, GB))) for source in rng.sample(sources, rng.randrange(4))}
            fed = rng.choice((None, rng.randrange(GB)))
            gone = tuple(rng.sample(ARTIFACTS, 1))
            gone = tuple(one for one in gone if one not in facts)
            whole = rng.randrange(3) == 0
            at_s = state.facts_at_ms / 1000 + rng.random()
            state.cache_facts.take(CacheTold(node_id, at_s, facts, gone, rates, fed, whole))


def specs(rng: Random) -> list[Spec]:
    """Of all shapes that the formula knows."""
    plain = Spec("host", model=f"default/m{rng.randrange(5)}")
    return [
        Spec("host"),
        plain,
        replace(plain, stream_weights=True, num_gpus=1),
        replace(plain, loras=("default/m1", "default/m3"), image="default/m5"),
        replace(plain, compile_caches=("k0",)),
        replace(plain, compile_caches=("k1",), image="default/unknown", model="default/unknown"),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_columns_say_what_one_node_says(seed: int) -> None:
    rng = Random(seed)
    state = random_cluster(rng)
    asked, node_ids = specs(rng), [f"n{at:02d}" for at in range(12)]
    for step in range(60):
        random_news(state, rng)
        if step == 30:
            put(state, replace(state.pools["p1"], networks=("wan",)))
            put(state, Node("n12", "node12", "p0"))
            node_ids = [*reversed(node_ids), "n12"]
        spec = asked[step % len(asked)]
        app = rng.choice(("", "default/a"))
        many = ready_at.ready_ms(state, spec, node_ids, app=app).tolist()
        one = [ready_at.predict(state, node_id, spec, app=app).total_ms for node_id in node_ids]
        assert many == one
        assert all(0 <= ms <= ready_at.NEVER_MS for ms in many)


@pytest.mark.parametrize("seed", range(4))
def test_columns_that_followed_are_those_made_anew(seed: int) -> None:
    """A replay that begins with a snapshot decides as the leader did."""
    rng = Random(f"anew/{seed}")
    state = random_cluster(rng)
    asked, node_ids = specs(rng), [f"n{at:02d}" for at in range(12)]
    for _ in range(20):
        for _ in range(rng.choice((1, 3, 20))):
            random_news(state, rng)
        followed = [ready_at.ready_ms(state, spec, node_ids).tolist() for spec in asked]
        again: State = pickle.loads(pickle.dumps(state))
        assert followed == [ready_at.ready_ms(again, spec, node_ids).tolist() for spec in asked]


def test_a_log_that_was_overrun_makes_the_columns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(5)
    state = random_cluster(rng)
    state.cache_facts.log = type(state.cache_facts.log)(maxlen=4)
    state.learning = Learning()
    state.learning.log = type(state.learning.log)(maxlen=2)
    spec, node_ids = specs(rng)[1], [f"n{at:02d}" for at in range(12)]
    for _ in range(30):
        ready_at.ready_ms(state, spec, node_ids)
        for _ in range(rng.randrange(8)):
            random_news(state, rng)
        again: State = pickle.loads(pickle.dumps(state))
        expected = ready_at.ready_ms(again, spec, node_ids).tolist()
        assert ready_at.ready_ms(state, spec, node_ids).tolist() == expected
