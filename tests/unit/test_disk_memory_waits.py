"""The memory tier, while it locks: whoever only asks does not wait, because the event loop asks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fal_contract.clock import SystemClock
from fal_fsd.disk.memory import MemoryTier


def test_what_is_locked_is_told_while_something_is_being_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 100)
    tier, locking, go = MemoryTier(1000, clock=SystemClock()), threading.Event(), threading.Event()

    def answers(request: dict[str, Any], size: int) -> dict[str, Any]:
        if request["op"] == "lock":
            locking.set()
            assert go.wait(30)
        return {"bytes": size, "error": ""}

    monkeypatch.setattr(tier, "_ask", answers)
    thread = threading.Thread(target=tier.lock, args=("a", [file]))
    thread.start()
    try:
        assert locking.wait(30)
        told: list[int] = []
        asking = threading.Thread(target=lambda: told.extend([tier.bytes_of("a"), tier.bytes_locked]), daemon=True)
        asking.start()
        asking.join(10)
        assert told == [0, 0]
    finally:
        go.set()
        thread.join()
    assert (tier.bytes_of("a"), tier.bytes_locked) == (100, 100)
