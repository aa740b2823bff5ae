"""The fleet's columns after nodes came, went and changed equal those made anew; nobody reads a row of before."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from core_world import GIB, sim_gpus
from fal_scheduler.core.fleet import Fleet, NodeFacts
from fal_scheduler.core.place import Ask, Placer
from fal_scheduler.core.records import PlacementRules, Resources, Spec
from fal_scheduler.core.told import Gpu

NODES = tuple(f"n-{at}" for at in range(6))
APPS = ("default/a", "default/b", "team/c")
SPECS = (
    Spec("host", num_gpus=1, resources=Resources(1000, GIB)),
    Spec("host", num_gpus=2, placement=PlacementRules(gpu_topology="nvlink")),
    Spec("host", num_gpus=1, gpu_milli=300, placement=PlacementRules(spread="domain", affinity_preferred=APPS[:1])),
    Spec("host", placement=PlacementRules(labels_preferred={"disk": "nvme"}, anti_affinity=APPS[1:2])),
)


def gpus_of(rng: Random, node_id: str) -> tuple[Gpu, ...]:
    """None, one kind or two, in any order; some sick."""
    found: tuple[Gpu, ...] = ()
    for kind in rng.sample(("H100-80GB", "L4-24GB"), rng.randrange(3)):
        found += sim_gpus(f"{node_id}-{kind}", rng.choice((1, 2, 4)), kind, 80, paired=rng.random() < 0.5)
    return tuple(replace(gpu, healthy=rng.random() > 0.2) for gpu in found)


def facts_of(rng: Random, node_id: str) -> NodeFacts:
    """A node as it may be told of."""
    return NodeFacts(
        node_id, rng.random() > 0.2, rng.random() < 0.1, False, True, "oci", rng.choice(("east", "west")),
        rng.choice(({}, {"disk": "nvme"})), 16_000, 64 * GIB, gpus_of(rng, node_id), frozenset(("images",)),
        domain=rng.choice(("z1", "z2")), gpu_hour_price_micros=rng.choice((0, 2_000_000)),
    )  # fmt: skip


Held = tuple[str, str, tuple[str, ...], int, int, int, tuple[str, ...]]


def random_change(rng: Random, fleet: Fleet, held: list[Held], number: int) -> None:
    """A node comes, is replaced, changes in one respect or goes; a container holds something, here or on a node that is
    not known, or lets go of it."""
    node_id = rng.choice(NODES)
    have = fleet.facts.get(node_id)
    what = rng.randrange(9)
    if what < 2:
        fleet.set_node(facts_of(rng, node_id))
    elif what == 2:
        fleet.drop_node(node_id)
    elif what == 3 and have is not None:
        fleet.set_node(
            replace(have, **rng.choice(({"ready": not have.ready}, {"domain": "z3"}, {"labels": {"x": "y"}})))
        )
    elif what == 4 and have is not None:
        fleet.set_node(replace(have, gpus=gpus_of(rng, node_id)))
    elif what == 5 and held:
        gone = held.pop(rng.randrange(len(held)))
        fleet.release(*gone[:5], gone[6])
    elif what > 5:
        ids = [gpu.id for gpu in have.gpus] if have is not None else [f"{node_id}-H100-80GB-0"]
        gpus = tuple(rng.sample(ids, min(len(ids), rng.randrange(3))))
        app = rng.choice(APPS)
        milli = rng.choice((0, 300)) if len(gpus) == 1 else 0
        held.append((node_id, f"{app}-{number}", gpus, rng.randrange(3) * GIB, rng.randrange(2000), milli, (app,)))
        fleet.hold(*held[-1])


def made_anew(fleet: Fleet, held: list[Held]) -> Fleet:
    fresh = Fleet()
    for facts in fleet.facts.values():
        fresh.set_node(facts)
    for one in held:
        fresh.hold(*one)
    return fresh.fresh()


def assert_same(have: Fleet, expected: Fleet) -> None:
    """Every column, list and count."""
    for name, column in vars(expected).items():
        if isinstance(column, np.ndarray):
            ours = getattr(have, name)
            assert (ours.dtype, ours.tolist()) == (column.dtype, column.tolist()), name
    assert have.node_ids == sorted(have.node_ids) == expected.node_ids
    assert list(have.rows_of.items()) == list(expected.rows_of.items())
    assert (have.classes, have.gpus) == (expected.classes, expected.gpus)
    assert [board.number for board in have.boards] == [board.number for board in expected.boards]
    assert have.nodes_of_app == expected.nodes_of_app
    assert have.domains_of_app == expected.domains_of_app


@pytest.mark.parametrize("seed", range(40))
def test_columns_brought_along_equal_columns_made_anew(seed: int) -> None:
    """Looked at after each few changes, with one placer that followed along."""
    rng, fleet, held = Random(seed), Fleet(), list[Held]()
    placer = Placer(fleet)
    for number in range(40):
        random_change(rng, fleet, held, number)
        if rng.random() < 0.3:
            expected = made_anew(fleet, held)
            assert_same(fleet.fresh(), expected)
            spec, ask = rng.choice(SPECS), Ask(APPS[0], "default")
            assert placer.place(spec, ask) == Placer(expected).place(spec, ask)
    fleet.distrust()
    assert_same(fleet.fresh(), made_anew(fleet, held))


@pytest.mark.parametrize("seed", range(10))
def test_a_node_that_comes_or_goes_makes_no_other_nodes_rows(seed: int) -> None:
    """Rows of the others move as they are: what somebody wrote there stays until they are made anew."""
    rng, fleet = Random(seed), Fleet()
    for node_id in NODES[1:]:
        fleet.set_node(facts_of(rng, node_id))
    assert (fleet.fresh().price >= 0).all()
    fleet.price -= 1 << 40
    changed = rng.choice(NODES)
    if rng.random() < 0.5:
        fleet.drop_node(changed)
    else:
        facts = facts_of(rng, changed)
        fleet.set_node(replace(facts, gpus=(*facts.gpus, Gpu(f"{changed}-new", "B200-180GB", 180 * GIB, 9))))
    fleet.fresh()
    marked = {node_id for row, node_id in enumerate(fleet.node_ids) if fleet.price[row] < 0}
    assert marked == fleet.facts.keys() - {changed}
    fleet.distrust()
    assert (fleet.fresh().price >= 0).all()
