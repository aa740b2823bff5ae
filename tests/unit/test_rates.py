"""Token buckets in virtual time, classes of links, measured rates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_fsd.core.messages import Place
from fal_fsd.core.rates import BandwidthLimits, Limiter, LinkClass, RateMeter, TokenBucket, link_class


def _run(bucket: TokenBucket, takes: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """(when they leave, bytes) of takers that come after a pause each; one does not take before it was served."""
    now_s, left = 0.0, []
    for bytes_, pause_s in takes:
        now_s += pause_s
        now_s += bucket.take(bytes_, now_s)
        left.append((now_s, bytes_))
    return left


@settings(deadline=None)
@given(
    st.integers(1_000, 10_000_000),
    st.lists(st.tuples(st.integers(1, 1 << 18), st.floats(0.0, 2.0)), min_size=1, max_size=40),
)
def test_no_window_holds_more_than_burst_and_rate(rate: int, takes: list[tuple[int, float]]) -> None:
    bucket = TokenBucket(rate)
    left = _run(bucket, takes)
    for first in range(len(left)):
        for last in range(first, len(left)):
            window_s = left[last][0] - left[first][0]
            # A block leaves as a whole once the bucket is at zero, so the first of a window may have been paid before.
            sent = sum(bytes_ for _, bytes_ in left[first + 1 : last + 1])
            assert sent <= bucket.burst_bytes + rate * window_s * (1 + 1e-9) + 1


def test_a_busy_bucket_gives_its_whole_rate() -> None:
    bucket = TokenBucket(1_000_000)
    left = _run(bucket, [(100_000, 0.0)] * 100)
    assert left[-1][0] == pytest.approx((100 * 100_000 - bucket.burst_bytes) / 1_000_000)


def test_takers_that_come_together_are_served_in_order() -> None:
    bucket = TokenBucket(1_000_000, burst_bytes=0)
    assert [bucket.take(500_000, 7.0) for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5])


def test_no_limit_never_waits() -> None:
    bucket = TokenBucket(0)
    assert bucket.take(1 << 40, 0.0) == 0.0
    limiter = Limiter(BandwidthLimits())
    assert not any(limiter.limited(link) for link in LinkClass)


def test_each_class_has_its_own_limit_and_the_node_has_one_over_all() -> None:
    limiter = Limiter(BandwidthLimits(node=1_000_000, other=100_000))
    burst = 64 << 10
    assert limiter.take(LinkClass.POOL, burst, 0.0) == 0.0
    assert limiter.take(LinkClass.POOL, 500_000, 0.0) == pytest.approx(0.5)
    assert limiter.take(LinkClass.OTHER, 100_000 + burst, 100.0) == pytest.approx(1.0)
    assert limiter.take(LinkClass.ORIGIN, 1 << 40, 100.0) == 0.0
    assert limiter.limited(LinkClass.POOL)
    assert not limiter.limited(LinkClass.ORIGIN)
    assert Limiter(BandwidthLimits(origin=5)).limited(LinkClass.ORIGIN)


def test_classes_of_links() -> None:
    me = Place("a", pool="p", region="r")
    assert link_class(me, Place("b", pool="p", region="r")) is LinkClass.POOL
    assert link_class(me, Place("b", pool="q", region="r")) is LinkClass.REGION
    assert link_class(me, Place("b", pool="q", region="s")) is LinkClass.OTHER


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-6, 100.0)), min_size=1))
def test_a_measured_rate_stays_between_the_extremes(samples: list[tuple[int, float]]) -> None:
    meter = RateMeter()
    for bytes_, seconds in samples:
        meter.add(bytes_, seconds)
    rates = [bytes_ / seconds for bytes_, seconds in samples]
    assert min(rates) * (1 - 1e-9) <= meter.rate_bytes_s <= max(rates) * (1 + 1e-9)
    assert meter.bytes_total == sum(bytes_ for bytes_, _ in samples)


def test_a_measured_rate_follows_within_its_time() -> None:
    meter = RateMeter(tau_s=1.0)
    meter.add(1_000, 1.0)
    for _ in range(30):
        meter.add(1_000, 0.1)  # 10 kB/s for 3 s
    assert meter.rate_bytes_s == pytest.approx(10_000, rel=0.06)
