"""Which nodes take an upload: pure, so by properties."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fal_scheduler.core.push_targets import PushNode, push_targets

SIZE = 1000
ROOMY = PushNode("n-1", "east", dialled=True, open=True, bytes_max=10 * SIZE, bytes_used=0)
nodes = st.lists(
    st.builds(
        PushNode,
        node_id=st.sampled_from([f"n-{n}" for n in range(9)]),
        pool=st.sampled_from(["east", "west"]),
        dialled=st.booleans(),
        open=st.booleans(),
        bytes_max=st.sampled_from([0, SIZE - 1, SIZE, 20 * SIZE]),
        bytes_used=st.integers(0, 20 * SIZE),
        bytes_held=st.integers(0, SIZE),
        complete=st.booleans(),
    ),
    unique_by=lambda node: node.node_id,
)


@given(nodes, st.sampled_from(["", "east"]), st.frozensets(st.sampled_from(["n-1", "n-2"])), st.integers(1, 3))
def test_only_nodes_that_can_take_it_are_named(
    found: list[PushNode], pool: str, avoid: frozenset[str], count: int
) -> None:
    made = push_targets(found, SIZE, pool=pool, avoid=avoid, count=count)
    able = {
        node.node_id
        for node in found
        if node.open and node.dialled and (not node.bytes_max or node.bytes_max >= SIZE) and pool in ("", node.pool)
    }
    assert len(made.nodes) == min(count, len(able))
    assert set(made.nodes) <= able
    assert bool(made.why) == (not able)
    if able - avoid:
        assert made.nodes[0] not in avoid
    assert made == push_targets(reversed(found), SIZE, pool=pool, avoid=avoid, count=count)


def test_who_has_most_of_it_goes_on_and_full_caches_come_last() -> None:
    full = replace(ROOMY, node_id="n-0", bytes_used=10 * SIZE)
    begun = replace(full, node_id="n-5", bytes_held=SIZE // 2)
    roomiest = replace(ROOMY, node_id="n-9", bytes_max=1000 * SIZE)
    made = push_targets([full, roomiest, ROOMY, begun], SIZE, count=4)
    assert made.nodes == ("n-5", "n-9", "n-1", "n-0")


def test_why_no_node_takes_it() -> None:
    def why(node: PushNode, **more: str) -> tuple[str, bool]:
        made = push_targets([node], SIZE, count=2, **more)  # type: ignore[arg-type]
        return made.why, made.full

    assert why(replace(ROOMY, open=False)) == ("no node is connected and takes new work", False)
    assert why(ROOMY, pool="west") == ("no node of pool west is connected and takes new work", False)
    assert why(replace(ROOMY, dialled=False))[0].startswith("none of the 1 connected nodes has an address")
    assert why(replace(ROOMY, bytes_max=5)) == ("it has 1000 bytes, the largest cache holds 5", True)
