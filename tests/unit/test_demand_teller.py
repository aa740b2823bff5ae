"""What gateways ask for, as the engine is told it: a request is told once, at once, and not four times a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fal_contract.v1 import serving_pb2
from fal_scheduler.core.demand_events import AppDemand, DemandTold
from fal_scheduler.core.slots import SlotBook, SlotRunner, Want
from fal_scheduler.demand_teller import ARRIVALS_WINDOW_S, WINDOW_S, DemandTeller
from virtual_time import LoopClock, run_virtually

APP = "t/a"


class Rig:
    """A book, as the Dispatcher keeps it, and what the engine was told."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.book = SlotBook(1)
        self.told: list[DemandTold] = []
        self.teller = DemandTeller(self.book, self.told.append, self.clock)

    def runner(self, id_: str, slots: int = 1) -> None:
        self.book.put_runner(SlotRunner(id_, APP, "n1", slots))
        self.grant()

    def want(self, queued: int, *, gateway: str = "g1", app: str = APP, lora: str = "", age_s: float = 0.0) -> None:
        wants = (
            [serving_pb2.Want(app=app, slots=queued, queued=queued, lora=lora, oldest_age_s=age_s)] if queued else []
        )
        self.wants(wants, gateway)

    def wants(self, wants: list[serving_pb2.Want], gateway: str = "g1") -> None:
        self.book.want(gateway, [Want(x.app, x.slots, x.model, x.priority) for x in wants])
        self.grant()
        self.teller.wants(gateway, wants)

    def grant(self) -> None:
        for lease in self.book.grant(self.clock.monotonic_s()):
            self.teller.slots_changed(lease.gateway, [APP])

    def give_back(self, gateway: str = "g1") -> None:
        for lease in self.book.leases():
            if lease.gateway == gateway:
                self.book.give_back(gateway, lease.id, lease.slots)
        self.teller.slots_changed(gateway)

    async def heard(self, within_s: float = 2.0) -> list[tuple[tuple[int, int], ...]]:
        """(slots, queued) of each demand in each word until then, and nothing of them is told again."""
        await asyncio.sleep(within_s)
        found = [tuple((one.in_flight, one.queued) for one in event.demands) for event in self.told]
        self.told.clear()
        return found


def teller_test(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        await test(Rig())

    run_virtually(body())


def test_a_request_without_a_runner_is_told_at_once_and_once() -> None:
    async def test(rig: Rig) -> None:
        rig.want(1, age_s=0.5)
        assert await rig.heard(0.001) == [((0, 1),)]
        for _ in range(50):
            rig.want(1, age_s=0.5)  # the list comes again whenever any of it changes
            await asyncio.sleep(0.002)
        assert await rig.heard() in ([], [((0, 1),)]), "at most its age is news"

    teller_test(test)


def test_what_gets_a_slot_at_once_is_no_queue() -> None:
    async def test(rig: Rig) -> None:
        rig.runner("r1")
        rig.want(1)
        rig.want(0)
        assert await rig.heard() == [((1, 0),)]

    teller_test(test)


def test_the_queue_ends_with_the_grant_not_with_the_gateways_next_word() -> None:
    async def test(rig: Rig) -> None:
        rig.want(3)
        assert await rig.heard() == [((0, 3),)]
        rig.runner("r1", slots=2)
        assert await rig.heard(0.001) == [((2, 1),)]
        rig.want(1, age_s=2.0)
        assert await rig.heard() == [], "that is known"
        rig.give_back()
        rig.want(0)
        assert await rig.heard() == [((0, 0),)]
        rig.want(0)
        assert await rig.heard() == []

    teller_test(test)


def test_changes_within_the_window_go_together() -> None:
    async def test(rig: Rig) -> None:
        rig.want(1)
        await asyncio.sleep(0.001)
        for queued in range(2, 40):
            rig.want(queued)
            await asyncio.sleep(WINDOW_S / 20)
        assert len(rig.told) <= 4
        assert (await rig.heard())[-1] == ((0, 39),)

    teller_test(test)


def test_each_lora_by_itself_and_slots_of_the_app_once() -> None:
    async def test(rig: Rig) -> None:
        rig.runner("r1")
        wants = [serving_pb2.Want(app=APP, slots=2, queued=2, lora=lora) for lora in ("", "t/l")]
        rig.wants(wants)
        assert await rig.heard() == [((1, 1), (0, 2))]

    teller_test(test)


def test_a_gateway_that_goes_asks_for_nothing_more() -> None:
    async def test(rig: Rig) -> None:
        rig.want(2)
        rig.want(1, gateway="g2")
        await rig.heard()
        rig.want(5)
        rig.teller.leave("g1")
        assert [(one.gateway_id, one.demands) for one in rig.told] == [("g1", ())]
        rig.teller.leave("g1")
        rig.teller.leave("never here")
        assert await rig.heard() == [()], "and nothing after that"
        rig.want(3, gateway="g2")
        rig.teller.close()
        assert await rig.heard() == []

    teller_test(test)


def test_arrivals_are_counted_once_waiting_or_not() -> None:
    async def test(rig: Rig) -> None:
        rig.want(3)  # three wait
        await asyncio.sleep(1.0)
        rig.runner("r1", slots=3)
        rig.want(0)
        for _ in range(3):  # they end, one by one
            await asyncio.sleep(1.0)
            rig.teller.ended("g1", APP, 1)
        for _ in range(4):  # and four that never waited
            rig.teller.ended("g1", APP, 1)
        await asyncio.sleep(2.0)
        assert sum(one.arrived for event in rig.told for one in event.demands) == 7

    teller_test(test)


def test_what_gave_up_waiting_does_not_hide_later_arrivals() -> None:
    async def test(rig: Rig) -> None:
        rig.want(5)
        await asyncio.sleep(1.0)
        rig.want(0)
        await asyncio.sleep(1.0)
        rig.want(1)
        await asyncio.sleep(1.0)
        assert [sum(one.arrived for one in event.demands) for event in rig.told] == [5, 0, 1]

    teller_test(test)


def test_a_busy_app_is_told_of_once_a_second() -> None:
    async def test(rig: Rig) -> None:
        rig.runner("r1", slots=4)
        rig.want(4)
        rig.want(0)
        await rig.heard()
        for _ in range(100):
            rig.teller.ended("g1", APP, 1)
            await asyncio.sleep(0.1)
        assert 8 <= len(rig.told) <= 10 / ARRIVALS_WINDOW_S + 1
        assert rig.told[-1].demands[0] == AppDemand(APP, in_flight=4, arrived=rig.told[-1].demands[0].arrived)

    teller_test(test)
