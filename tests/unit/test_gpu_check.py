"""The check of a GPU, on the processor in place of one: what is right passes, one wrong bit fails."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fal_runtime.gpu_check import Wrong, compute, memory

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def test_what_is_right_passes_and_says_how_much() -> None:
    assert memory(torch, "cpu", until_s=math.inf, bytes_max=8 << 20) == "8 MiB written and read"
    assert memory(torch, "cpu", until_s=math.inf, bytes_max=512 << 20) == "256 MiB written and read"
    assert compute(torch, "cpu", until_s=math.inf, size=128, rounds=5) == "5 equal products of 128×128"


def test_time_that_is_over_ends_it() -> None:
    assert compute(torch, "cpu", until_s=0.0, size=64, rounds=1000) == "1 equal products of 64×64"


class Broken:
    """torch, but for one function."""

    def __init__(self, **other: Any) -> None:
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return self._other.get(name) or getattr(torch, name)


def test_a_wrong_byte_is_found() -> None:
    asked: list[bool] = []

    def equal(one: Any, other: Any) -> bool:
        asked.append(True)
        one[0] ^= 1  # the place has not kept what was written
        return bool(torch.equal(one, other))

    with pytest.raises(Wrong, match="1 bytes of"):
        memory(Broken(equal=equal), "cpu", until_s=math.inf, bytes_max=32 << 20)
    assert asked


def test_a_product_that_comes_out_otherwise_is_found() -> None:
    answers = iter([True, True, False])
    with pytest.raises(Wrong, match="otherwise the 3th"):
        compute(Broken(equal=lambda one, other: next(answers)), "cpu", until_s=math.inf, size=64, rounds=10)
    with pytest.raises(Wrong, match="processor"):
        compute(Broken(equal=lambda one, other: False), "cpu", until_s=math.inf, size=64)
