"""The order of an artifact's pieces is told to every swarm that brings it, and a start is waited for once."""

from __future__ import annotations

from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Ask, Place
from fal_fsd.core.swarm import Swarm
from fal_fsd.order import Order

COUNT = 50
FIRST = [40, 3, 7]


class Bench:
    """A clock, and how often somebody was told to look."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.changed = 0
        self.order = Order(lambda: self.now_s, self.look)

    def look(self) -> None:
        self.changed += 1

    def swarm(self) -> Swarm:
        made = Swarm(Place("a"), [1 << 18] * COUNT, Bitmap(COUNT))
        made.peer_up("b", Bitmap.full(COUNT), self.now_s)
        self.order.tell(made)
        return made

    def asked(self, swarm: Swarm) -> set[int]:
        """All that it asks for now, each coming at once."""
        found: set[int] = set()
        while asks := [action for action in swarm.decide(self.now_s) if isinstance(action, Ask)]:
            for ask in asks:
                found.update(ask.pieces)
                for piece in ask.pieces:
                    swarm.arrived(piece, "b", 0.01, self.now_s)
        return found


def test_each_new_swarm_hears_what_comes_first_and_of_what_is_left_of_a_start() -> None:
    bench = Bench()
    bench.order.prefer(FIRST)
    bench.order.start_begins(60.0)
    assert bench.changed == 2
    assert bench.asked(bench.swarm()) == set(FIRST)
    bench.now_s += 59.0
    again = bench.swarm()
    assert bench.asked(again) == set(FIRST)
    bench.now_s += 1.0
    assert bench.asked(again) == set(range(COUNT)) - set(FIRST)
    assert bench.asked(bench.swarm()) == set(range(COUNT))


def test_only_the_first_start_is_waited_for() -> None:
    bench = Bench()
    bench.order.start_ends()  # nothing had begun
    assert bench.changed == 0
    swarm = bench.swarm()
    bench.order.start_begins(60.0)
    assert bench.asked(swarm) == set()
    bench.order.start_ends()
    bench.order.start_begins(60.0)
    assert bench.asked(swarm) == set(range(COUNT))
    assert bench.asked(bench.swarm()) == set(range(COUNT))


def test_no_order_is_no_word() -> None:
    bench = Bench()
    bench.order.prefer([])
    assert bench.changed == 0
    assert bench.asked(bench.swarm()) == set(range(COUNT))
