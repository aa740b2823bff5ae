"""How clients find the leader: hints once, standbys asked to wait, no loops."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract import rpc
from fal_contract.errors import Code, FalError
from fal_contract.leader_search import WAIT_KEY, Dial, LeaderSearch
from fal_contract.v1 import errors_pb2
from fal_scheduler.leadership import CurrentLeadership

GONE = FalError(Code.UNAVAILABLE, "connection refused", remedy="Wait.")


def standby(*leader: str) -> FalError:
    return FalError(Code.NOT_LEADER, "a standby", remedy="Ask the leader.", leader=leader)


def test_without_hints_the_list_goes_round() -> None:
    search = LeaderSearch(["a:1", "b:1"])
    dialled = []
    for _ in range(5):
        dialled.append(search.next().address)
        assert search.failed(GONE) == (dialled[-1] == "a:1")  # a pause after each round
    assert dialled == ["a:1", "b:1", "a:1", "b:1", "a:1"]


def test_a_hint_is_dialled_at_once_and_may_be_unknown_to_the_configuration() -> None:
    search = LeaderSearch(["a:1"])
    search.next()
    assert search.failed(standby("10.0.0.9:7420"))
    assert search.next() == Dial("10.0.0.9:7420", wait="-")
    search.connected()
    assert search.dialled == "10.0.0.9:7420"


def test_two_that_name_each_other_make_no_loop() -> None:
    search = LeaderSearch(["a:1", "b:1"])
    at_once = 0
    for _ in range(100):
        here = search.next().address
        at_once += search.failed(standby("b:1" if here == "a:1" else "a:1"))
    assert at_once <= 75  # a round follows each hint once, and pauses


def test_when_the_leader_does_not_answer_standbys_are_asked_to_wait() -> None:
    search = LeaderSearch(["a:1", "b:1", "c:1"])
    assert search.next() == Dial("a:1")
    search.connected()
    assert search.failed(GONE)  # its stream broke: once more there, at once
    assert search.next() == Dial("a:1", wait="-")
    assert search.failed(GONE)
    assert search.next() == Dial("a:1", wait="a:1")  # its turn in the list
    assert search.failed(GONE)
    waiting = search.next()
    assert waiting == Dial("b:1", wait="a:1")
    assert waiting.metadata == ((WAIT_KEY, "a:1"),)
    assert search.failed(standby("a:1"))  # the dead one is still named: it was tried, the list goes on
    assert search.next() == Dial("c:1", wait="a:1")
    assert search.failed(standby("b:1"))  # another leads by now
    assert search.next() == Dial("b:1", wait="-")
    search.connected()
    assert search.failed(GONE)


def test_no_address_is_refused() -> None:
    with pytest.raises(FalError) as caught:
        LeaderSearch([])
    assert caught.value.code is Code.INVALID


ERRORS = st.one_of(st.just(GONE), st.lists(st.sampled_from(["a:1", "b:1", "c:1", "d:1"])).map(lambda x: standby(*x)))


@given(st.lists(st.tuples(st.booleans(), ERRORS), max_size=60))
def test_whatever_happens_there_are_pauses_and_every_address_gets_its_turn(told: list[tuple[bool, FalError]]) -> None:
    search = LeaderSearch(["a:1", "b:1", "c:1"])
    in_a_row = 0
    for connects, error in told:
        search.next()
        if connects:
            search.connected()
            in_a_row = 0
        in_a_row = in_a_row + 1 if search.failed(error) else 0
        assert in_a_row <= 8
    dialled = set()
    for _ in range(20):
        dialled.add(search.next().address)
        search.failed(GONE)
    assert {"a:1", "b:1", "c:1"} <= dialled


def test_the_hint_travels_with_the_error_and_is_bounded() -> None:
    (pair,) = rpc.error_metadata(standby(*(f"10.0.0.{n}:7420" for n in range(20)), "x" * 500))
    assert pair[0] == rpc.ERROR_KEY
    detail = errors_pb2.ErrorDetail.FromString(pair[1])
    assert list(detail.leader) == [f"10.0.0.{n}:7420" for n in range(8)]


def test_a_standby_holds_only_who_failed_at_the_leader_that_it_knows() -> None:
    async def body() -> None:
        current = CurrentLeadership()
        current.see(("dead:1",))
        for failed, seconds_s in (("other:1", 30.0), ("dead:1", 0.01), ("-", 30.0)):
            with pytest.raises(FalError) as caught:  # only the second waits for its time
                await asyncio.wait_for(current.soon(seconds_s, failed=failed), 10)
            assert caught.value.leader == ("dead:1",)
        waiting = asyncio.create_task(current.soon(30.0, failed="dead:1"))
        await asyncio.sleep(0)
        current.see(())
        await asyncio.sleep(0)
        assert not waiting.done()
        current.see(("next:1",))
        with pytest.raises(FalError) as caught:
            await asyncio.wait_for(waiting, 10)
        assert caught.value.leader == ("next:1",)

    asyncio.run(body())
