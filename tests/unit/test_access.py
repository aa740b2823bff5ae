"""Which pieces come first: what a start read is noted in order, and asked for in about that order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Ask, Place
from fal_fsd.core.policy import FIRST_WINDOW, Pieces
from fal_fsd.core.swarm import Swarm
from fal_fsd.mount.access import Access

COUNT = 200


def test_pieces_are_noted_once_in_order_of_first_use() -> None:
    access = Access(pieces_max=4)
    access.note([5, 6])
    access.note([6, 2])
    access.note([9, 1])
    access.note([0])
    assert access.pieces() == [5, 6, 2, 9]


@given(st.permutations(range(40)), st.integers(0, (1 << COUNT) - 1))
def test_preferred_pieces_are_a_part_and_the_next_ones_first(first: list[int], bits: int) -> None:
    pieces = Pieces([1] * COUNT, (1 << COUNT) - 1)
    pieces.prefer([-1, *first, *first, COUNT])
    assert pieces.first == tuple(first)
    chosen = pieces.preferred(bits)
    asked = [piece for piece in first if bits >> piece & 1]
    if asked:
        assert chosen == sum(1 << piece for piece in asked[:FIRST_WINDOW])
    else:
        assert chosen == bits


def test_what_is_here_is_passed_over_and_what_is_lost_counts_again() -> None:
    pieces = Pieces([1] * COUNT, (1 << COUNT) - 1)
    pieces.prefer(list(range(100)))
    pieces.missing &= ~((1 << 50) - 1)
    assert pieces.preferred(pieces.missing) == ((1 << FIRST_WINDOW) - 1) << 50
    pieces.lost(3)
    assert pieces.preferred(pieces.missing) & 0xFF == 1 << 3


def asked_in_order(first: list[int], wanted: list[int]) -> list[int]:
    """The pieces that a node asks of its one peer, each arriving before the next is asked."""
    swarm = Swarm(Place("a", "p", "r"), [1 << 18] * COUNT, Bitmap(COUNT))
    swarm.prefer(first)
    swarm.peer_up("b", Bitmap.full(COUNT), 0.0)
    swarm.wanted(wanted, True)
    order: list[int] = []
    now_s = 0.0
    while not swarm.complete:
        now_s += 0.01
        for action in swarm.decide(now_s):
            if isinstance(action, Ask):
                order += action.pieces
                for piece in action.pieces:
                    swarm.arrived(piece, "b", 0.01, now_s)
    return order


def test_a_recorded_start_is_fetched_before_the_rest_and_readers_before_it() -> None:
    first = list(range(150, 30, -1))
    order = asked_in_order(first, wanted=[199])
    assert order[0] == 199
    assert sorted(order) == list(range(COUNT))
    assert set(order[1 : 1 + len(first)]) == set(first)
    # In about the order: none comes long before its turn.
    places = {piece: place for place, piece in enumerate(order[1:])}
    assert all(places[piece] >= turn - 2 * FIRST_WINDOW - 32 for turn, piece in enumerate(first))
    assert asked_in_order([], wanted=[]) != order
