"""Rates of origins as a cache measures them: between arrivals, over all reads at once."""

from __future__ import annotations

from fal_fsd.tally import Totals

MB = 1_000_000


def test_an_origins_rate_is_taken_between_arrivals_and_begins_anew_after_a_pause() -> None:
    totals = Totals()
    assert totals.origin_rates() == {}
    for step in range(400):  # four reads at once, 80 MB/s together
        totals.came_from_origin("origin:b", 4 * MB, 100.0 + step * 0.05)
    assert 76 * MB <= totals.origin_rates()["origin:b"] <= 84 * MB
    totals.came_from_origin("origin:b", 4 * MB, 1000.0)  # it did not take 880 s
    assert 76 * MB <= totals.origin_rates()["origin:b"] <= 84 * MB


def test_pieces_that_come_at_the_same_moment_do_not_make_a_rate_of_their_own() -> None:
    totals = Totals()
    for _ in range(10):
        totals.came_from_origin("origin:b", MB, 5.0)
    assert totals.origin_rates() == {}
    totals.came_from_origin("origin:b", MB, 6.0)
    assert totals.origin_rates()["origin:b"] == 10 * MB


def test_an_origin_that_failed_has_no_rate_until_it_gives_again_and_few_are_kept() -> None:
    totals = Totals()
    totals.origin_failed("origin:b")
    assert totals.origin_rates() == {"origin:b": 0}
    totals.came_from_origin("origin:b", MB, 1.0)
    totals.came_from_origin("origin:b", MB, 2.0)
    assert totals.origin_rates() == {"origin:b": MB}
    for number in range(100):
        totals.origin_failed(f"origin:{number}")
    assert len(totals.origin_rates()) == 64
