"""The slot book under any order of events: capacity is never exceeded within a term, nothing leaks, grants are fair."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fal_contract.limits import LEASE_TTL_S
from fal_scheduler.core.slots import LEASE_GRACE_S, Held, SlotBook, SlotRunner, Want

RUNNERS = st.integers(0, 5)
GATEWAYS = st.sampled_from(["g0", "g1", "g2"])
APPS = ["t/a", "t/b"]


class Slots(RuleBasedStateMachine):
    """A model that keeps every lease as its gateway believes it, and checks the book against it."""

    @initialize()
    def start(self) -> None:
        self.now_s = 0.0
        self.book = SlotBook(term=7)
        self.capacity: dict[str, int] = {}
        self.believed: dict[str, tuple[str, str, int, float]] = {}  # lease -> gateway, runner, slots, until

    @rule(n=RUNNERS, capacity=st.integers(1, 4))
    def put(self, n: int, capacity: int) -> None:
        runner = SlotRunner(f"t/r{n}", APPS[n % 2], "n1", capacity, ("t/m",) if n % 3 else ())
        for lease in self.book.put_runner(runner):
            del self.believed[lease.id]
        self.capacity[runner.id] = capacity

    @rule(n=RUNNERS)
    def remove(self, n: int) -> None:
        for lease in self.book.remove_runner(f"t/r{n}"):
            del self.believed[lease.id]
        self.capacity.pop(f"t/r{n}", None)

    @rule(gateway=GATEWAYS, app=st.sampled_from(APPS), slots=st.integers(0, 6), model=st.sampled_from(["", "t/m"]))
    def want_and_grant(self, gateway: str, app: str, slots: int, model: str) -> None:
        self.book.want(gateway, [Want(app, slots, model)])
        for lease in self.book.grant(self.now_s):
            assert lease.id not in self.believed
            assert lease.term == 7
            self.believed[lease.id] = (lease.gateway, lease.runner_id, lease.slots, self.now_s + LEASE_TTL_S)
        left = sum(want.slots for want in self.book.unmet(gateway))
        assert left <= slots
        if left:  # nothing is kept back: an unmet want means that the app has no free slot at all
            of_app = [r for r in self.capacity if APPS[int(r[-1]) % 2] == app]
            assert all(self.book.leased(r) == self.capacity[r] for r in of_app)

    @rule(gateway=GATEWAYS, slots=st.integers(0, 3), data=st.data())
    def give_back(self, gateway: str, slots: int, data: st.DataObject) -> None:
        if not self.believed:
            return
        lease_id = data.draw(st.sampled_from(sorted(self.believed)))
        self.book.give_back(gateway, lease_id, slots)
        owner, runner, has, until = self.believed[lease_id]
        if owner != gateway:
            return
        if slots >= has:
            del self.believed[lease_id]
        else:
            self.believed[lease_id] = (owner, runner, has - slots, until)

    @rule(seconds=st.sampled_from([1.0, 10.0, LEASE_TTL_S, LEASE_TTL_S + LEASE_GRACE_S + 0.1]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        gone = {lease.id for lease in self.book.expire(self.now_s)}
        for lease_id in gone:  # the gateway stopped using it before the book let go
            assert self.believed[lease_id][3] < self.now_s
        self.believed = {k: v for k, v in self.believed.items() if k not in gone}

    @rule(gateway=GATEWAYS, data=st.data())
    def renew(self, gateway: str, data: st.DataObject) -> None:
        if not self.believed:
            return
        lease_id = data.draw(st.sampled_from(sorted(self.believed)))
        renewed = self.book.renew(gateway, lease_id, self.now_s)
        owner, runner, has, _ = self.believed[lease_id]
        assert (renewed is None) == (owner != gateway)
        if renewed:
            self.believed[lease_id] = (owner, runner, has, self.now_s + LEASE_TTL_S)

    @rule(gateway=GATEWAYS, strange=st.booleans())
    def reconnect(self, gateway: str, strange: bool) -> None:
        self.book.close(gateway)
        mine = {k: v for k, v in self.believed.items() if v[0] == gateway}
        held = [Held(k, v[1], v[2]) for k, v in mine.items()]
        if strange:
            held.append(Held("6-00000001", "t/r1", 2))
        kept, gone = self.book.take_over(gateway, held, self.now_s)
        assert {x.id for x in kept} | set(gone) == {x.lease_id for x in held}
        assert set(mine) <= {x.id for x in kept}
        for lease in kept:
            self.believed[lease.id] = (gateway, lease.runner_id, lease.slots, self.now_s + LEASE_TTL_S)

    @invariant()
    def never_more_than_capacity(self) -> None:
        out: dict[str, int] = {}
        for _, runner, slots, _ in self.believed.values():
            out[runner] = out.get(runner, 0) + slots
        for runner, slots in out.items():
            assert slots <= self.capacity[runner]
            assert slots == self.book.leased(runner)

    @invariant()
    def book_and_gateways_agree(self) -> None:
        assert {x.id: (x.gateway, x.runner_id, x.slots) for x in self.book.leases()} == {
            k: v[:3] for k, v in self.believed.items()
        }


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSlots = Slots.TestCase


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_gateways_share_a_scarce_app_evenly(wanted: list[int], capacity: int) -> None:
    """Max-min fair: nobody gets more than another who still wants."""
    book = SlotBook(term=1)
    book.put_runner(SlotRunner("t/r", "t/a", "n1", capacity))
    for n, slots in enumerate(wanted):
        book.want(f"g{n}", [Want("t/a", slots)])
    got = dict.fromkeys(range(len(wanted)), 0)
    for lease in book.grant(0.0):
        got[int(lease.gateway[1:])] += lease.slots
    assert sum(got.values()) == min(capacity, sum(wanted))
    for n, slots in enumerate(wanted):
        if got[n] < slots:
            assert all(got[n] >= other - 1 for other in got.values())
