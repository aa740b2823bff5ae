"""Who is whose neighbour: symmetric, connected, stable, small, and told of every change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_scheduler.core.neighbours import NEIGHBOURS_MEANT, Neighbour, SwarmMember, SwarmView

MEMBERS = st.builds(
    SwarmMember,
    node_id=st.integers(0, 60).map("n{}".format),
    region=st.sampled_from(["", "eu", "us"]),
    zone=st.sampled_from(["a", "b"]),
    complete=st.booleans(),
    dialled=st.booleans(),
    reaches_origin=st.booleans(),
)


def view_of(members: Iterable[SwarmMember]) -> SwarmView:
    view = SwarmView("artifact")
    for member in members:
        view.put(member)
    return view


def links_of(view: SwarmView, nodes: Iterable[str]) -> dict[str, tuple[Neighbour, ...]]:
    return {node: view.neighbours_of(node) for node in nodes}


def reached(links: dict[str, tuple[Neighbour, ...]], start: str, usable: Callable[[str, str], bool]) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for other in links[node]:
            if other.node_id not in seen and usable(node, other.node_id):
                seen.add(other.node_id)
                todo.append(other.node_id)
    return seen


@settings(deadline=None, max_examples=50)
@given(st.lists(MEMBERS, max_size=60, unique_by=lambda x: x.node_id), st.data())
def test_links_are_symmetric_connected_and_independent_of_the_order(
    members: list[SwarmMember], data: st.DataObject
) -> None:
    view = view_of(members)
    nodes = [x.node_id for x in members]
    links = links_of(view, nodes)
    for node in nodes:
        assert node not in {x.node_id for x in links[node]}
        for other in links[node]:
            assert other.seed == (other.node_id in view.seeds)
            assert node in {x.node_id for x in links[other.node_id]}
    dialled = {x.node_id: x.dialled for x in members}
    if any(dialled.values()):
        start = next(node for node in nodes if dialled[node])
        assert reached(links, start, lambda a, b: dialled[a] or dialled[b]) == set(nodes)
    assert links_of(view_of(data.draw(st.permutations(members))), nodes) == links


def test_whoever_must_be_told_is_named_as_a_swarm_grows_and_shrinks() -> None:
    changes = [(True, member) for member in big(80, 2)]
    check_told([*changes, *((False, member) for _, member in changes[::-1])])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), MEMBERS), max_size=30))
def test_whoever_must_be_told_is_named(changes: list[tuple[bool, SwarmMember]]) -> None:
    check_told(changes)


def check_told(changes: list[tuple[bool, SwarmMember]]) -> None:
    view = SwarmView("artifact")
    nodes = {x.node_id for _, x in changes}
    for put, member in changes:
        before = links_of(view, nodes)
        told = view.put(member) if put else view.drop(member.node_id)
        after = links_of(view, nodes)
        assert {node for node in nodes if before[node] != after[node]} <= told | {member.node_id}
        assert (member.node_id in view) == put
        assert len(view.seeds) == 0 or view.seeds <= nodes


@settings(deadline=None, max_examples=50)
@given(st.lists(MEMBERS, min_size=2, max_size=40, unique_by=lambda x: x.node_id))
def test_leaving_undoes_joining(members: list[SwarmMember]) -> None:
    nodes = [x.node_id for x in members]
    without, view = view_of(members[1:]), view_of(members)
    assert view.region_members(members[0].region) == without.region_members(members[0].region) + 1
    view.drop(nodes[0])
    assert links_of(view, nodes) == links_of(without, nodes)
    assert view.seeds == without.seeds


def big(count: int, regions: int) -> list[SwarmMember]:
    return [
        SwarmMember(f"node-{n}", region=f"r{n % regions}", zone=f"z{n % 12}", dialled=n % 10 != 0) for n in range(count)
    ]


@pytest.mark.parametrize("regions", [1, 4, 12])
def test_a_large_swarm_has_few_links_and_moves_few(regions: int) -> None:
    members = big(2000, regions)
    view = view_of(members)
    nodes = [x.node_id for x in members]
    links = links_of(view, nodes)
    others = sorted(len(links[node]) for node in nodes if node not in view.seeds)
    assert others[len(others) // 2] <= NEIGHBOURS_MEANT + 4
    assert others[-1] <= 2 * NEIGHBOURS_MEANT + 8
    assert 16 <= len(view.seeds) <= 48
    for seed in view.seeds:
        assert view.seeds <= {x.node_id for x in links[seed]} | {seed}
    told = view.put(SwarmMember("newcomer", region="r0", zone="z1"))
    after = links_of(view, nodes)
    moved = {node for node in nodes if after[node] != links[node]}
    assert moved <= told
    if "newcomer" not in view.seeds:
        assert len(moved) <= 30
    # A cross-region link of every region leads somewhere: its seeds know those of all others.
    for region in range(regions):
        assert any(view.member(seed).region == f"r{region}" for seed in view.seeds)


def test_seeds_reach_the_origin_first() -> None:
    view = view_of(SwarmMember(f"n{n}", reaches_origin=n in (7, 9)) for n in range(40))
    assert {"n7", "n9"} <= view.seeds
    small = view_of(SwarmMember(f"n{n}") for n in range(9))
    assert all(len(small.neighbours_of(f"n{n}")) == 8 for n in range(9))


def test_completing_changes_no_link() -> None:
    members = big(100, 2)
    view = view_of(members)
    before = links_of(view, [x.node_id for x in members])
    told = view.put(SwarmMember(**{**{s: getattr(members[5], s) for s in SwarmMember.__slots__}, "complete": True}))
    assert told == {members[5].node_id, *(x.node_id for x in before[members[5].node_id])}
    assert links_of(view, [x.node_id for x in members]) == before
    assert view.member("node-5").complete
