"""The slot book's choices: resident model first, idle runners first, revocation, terms."""

from __future__ import annotations

from fal_scheduler.core.slots import LEASE_GRACE_S, Held, SlotBook, SlotRunner, Want


def book_of(*runners: SlotRunner, term: int = 3) -> SlotBook:
    book = SlotBook(term=term)
    for runner in runners:
        book.put_runner(runner)
    return book


def test_resident_model_wins_over_an_idler_runner() -> None:
    book = book_of(SlotRunner("t/warm", "t/a", "n1", 2, ("t/m",)), SlotRunner("t/cold", "t/a", "n1", 2))
    book.want("g", [Want("t/a", 3, "t/m")])
    assert {x.runner_id: x.slots for x in book.grant(0.0)} == {"t/warm": 2, "t/cold": 1}


def test_idle_runners_come_first() -> None:
    book = book_of(*(SlotRunner(f"t/r{n}", "t/a", "n1", 4) for n in range(4)))
    book.want("g", [Want("t/a", 4)])
    assert [(x.runner_id, x.slots) for x in book.grant(0.0)] == [(f"t/r{n}", 1) for n in range(4)]


def test_priority_comes_before_fairness() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 2))
    book.want("low", [Want("t/a", 2)])
    book.want("high", [Want("t/a", 2, priority=5)])
    assert [(x.gateway, x.slots) for x in book.grant(0.0)] == [("high", 2)]
    assert book.unmet("low") == [Want("t/a", 2)]


def test_a_freed_slot_goes_to_the_want_that_waits() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 1))
    book.want("g1", [Want("t/a", 1)])
    (lease,) = book.grant(0.0)
    book.want("g2", [Want("t/a", 1)])
    assert book.grant(0.0) == []
    book.give_back("g1", lease.id, 1)
    (second,) = book.grant(0.0)
    assert (second.gateway, second.runner_id) == ("g2", "t/r")
    assert second.id != lease.id


def test_drain_revokes_every_lease_and_grants_no_more() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 2))
    book.want("g1", [Want("t/a", 1)])
    book.want("g2", [Want("t/a", 1)])
    granted = book.grant(0.0)
    assert book.remove_runner("t/r") == granted
    book.want("g1", [Want("t/a", 1)])
    assert book.grant(0.0) == []
    assert book.runners("t/a") == 0
    assert book.renew("g1", granted[0].id, 1.0) is None


def test_a_dead_gateways_slots_come_back_by_expiry_only() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 1))
    book.want("dead", [Want("t/a", 1)])
    book.grant(0.0)
    book.close("dead")
    book.want("alive", [Want("t/a", 1)])
    assert book.grant(book.ttl_s) == []
    assert book.expire(book.ttl_s) == []  # the gateway may have got it later than it was granted
    assert [x.gateway for x in book.expire(book.ttl_s + LEASE_GRACE_S)] == ["dead"]
    assert [x.gateway for x in book.grant(40.0)] == ["alive"]


def test_a_new_leader_takes_over_what_gateways_hold_as_far_as_it_fits() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 3), term=4)
    kept, gone = book.take_over("g1", [Held("3-1", "t/r", 2), Held("3-2", "t/gone", 1)], 0.0)
    assert [(x.id, x.slots, x.term) for x in kept] == [("3-1", 2, 4)]
    assert gone == ["3-2"]
    kept, gone = book.take_over("g2", [Held("3-3", "t/r", 2)], 0.0)
    assert [(x.id, x.slots) for x in kept] == [("3-3", 1)]
    assert book.leased("t/r") == 3


def test_a_gateway_cannot_touch_anothers_lease() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 1))
    book.want("g1", [Want("t/a", 1)])
    (lease,) = book.grant(0.0)
    book.give_back("g2", lease.id, 1)
    assert book.renew("g2", lease.id, 0.0) is None
    assert book.take_over("g2", [Held(lease.id, "t/r", 1)], 0.0) == ([], [lease.id])
    assert book.leases() == (lease,)


def test_a_runner_that_serves_another_app_takes_the_slots_of_the_first_along() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 1))
    book.want("g", [Want("t/a", 1), Want("t/b", 1)])
    [lease] = book.grant(0.0)
    assert book.put_runner(SlotRunner("t/r", "t/b", "n1", 1)) == [lease]
    assert (book.runners("t/a"), book.runners("t/b")) == (0, 1)
    assert [(one.app, one.slots) for one in book.grant(0.0)] == [("t/b", 1)]


def test_wants_for_one_app_and_model_add_up() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 8))
    book.want("g", [Want("t/a", 2, priority=1), Want("t/a", 3, priority=4), Want("t/a", 0)])
    assert book.unmet("g") == [Want("t/a", 5, priority=4)]
    assert [x.slots for x in book.grant(0.0)] == [5]


def test_apps_that_share_a_runner_take_turns_by_team_and_app() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 24, (), ("t/b", "u/c")))
    book.want("g", [Want(app, 24) for app in ("t/a", "t/b", "u/c")])
    # Two teams, so one half each; in t two apps, so a half of that each.
    assert {x.app: x.slots for x in book.grant(0.0)} == {"t/a": 6, "t/b": 6, "u/c": 12}
    assert book.leased("t/r") == 24
    assert book.runners("u/c") == 1


def test_an_app_that_leaves_a_runner_loses_its_slots_there() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 4, (), ("t/b",)))
    book.want("g", [Want("t/a", 1), Want("t/b", 1)])
    leases = {x.app: x for x in book.grant(0.0)}
    assert book.put_runner(SlotRunner("t/r", "t/a", "n1", 4)) == [leases["t/b"]]
    assert book.leases() == (leases["t/a"],)
    assert (book.runners("t/a"), book.runners("t/b")) == (1, 0)
    book.want("g", [Want("t/b", 1)])
    assert book.grant(0.0) == []
    assert [x.app for x in book.remove_runner("t/r")] == ["t/a"]


def test_who_waits_too_long_comes_before_priority_and_before_a_resident_model() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 1, ("t/warm",)))
    book.want("old", [Want("t/a", 1, "t/cold", since_s=0.0, queued=3)])
    book.want("new", [Want("t/a", 1, "t/warm", since_s=100.0)])
    (lease,) = book.grant(100.0)
    assert lease.gateway == "new"  # nobody is overdue: what is loaded goes first
    book.give_back("new", lease.id, 1)
    book.want("new", [Want("t/a", 1, "t/warm", since_s=1_000.0)])
    assert [x.gateway for x in book.grant(1_000.0)] == ["old"]


def test_wants_for_other_loras_are_kept_apart() -> None:
    book = book_of(SlotRunner("t/r", "t/a", "n1", 3))
    book.want("g", [Want("t/a", 2, "t/m", lora="t/x"), Want("t/a", 2, "t/m", lora="t/y")])
    assert sum(x.slots for x in book.grant(0.0)) == 3
    assert [(x.lora, x.slots) for x in book.unmet("g")] in ([("t/x", 1)], [("t/y", 1)])
