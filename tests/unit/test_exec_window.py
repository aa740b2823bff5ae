"""Flow control of exec, as arithmetic: both windows against each other, under any order of sending and taking."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import FalError
from fal_contract.exec_window import ReceiveWindow, SendWindow
from fal_contract.limits import EXEC_DATA_BYTES_MAX, EXEC_WINDOW_BYTES, EXEC_WINDOW_MESSAGES

# True: send so many bytes (fewer when there is less room), False: take one message.
MOVES = st.lists(st.tuples(st.booleans(), st.integers(1, EXEC_DATA_BYTES_MAX)), max_size=400)


@given(MOVES)
def test_who_keeps_to_the_window_is_never_refused_and_never_stuck(moves: list[tuple[bool, int]]) -> None:
    sender, receiver = SendWindow(), ReceiveWindow()
    waiting: deque[int] = deque()
    sent = taken = 0
    for sends, count in moves:
        if sends:
            if (count := min(count, sender.room_bytes)) == 0:
                continue
            sender.sent(count)
            receiver.arrived(count)
            waiting.append(count)
            sent += count
        elif waiting:
            count = waiting.popleft()
            taken += count
            if receiver.took(count):
                sender.taken(receiver.taken_bytes)
        assert receiver.taken_bytes == taken
        assert sent - taken <= EXEC_WINDOW_BYTES
        assert len(waiting) <= EXEC_WINDOW_MESSAGES
    # Everything taken: whatever was told on the way, there is room to go on.
    while waiting:
        if receiver.took(waiting.popleft()):
            sender.taken(receiver.taken_bytes)
    assert sender.room_bytes > 0


def test_single_bytes_are_held_back_by_their_number() -> None:
    sender = SendWindow()
    for _ in range(EXEC_WINDOW_MESSAGES):
        sender.sent(1)
    assert sender.room_bytes == 0
    sender.taken(1)
    assert sender.room_bytes == EXEC_DATA_BYTES_MAX
    sender.taken(0)  # an older word
    assert sender.room_bytes == EXEC_DATA_BYTES_MAX


def test_the_last_message_fits_exactly() -> None:
    sender, receiver = SendWindow(), ReceiveWindow()
    for _ in range(EXEC_WINDOW_BYTES // EXEC_DATA_BYTES_MAX):
        sender.sent(EXEC_DATA_BYTES_MAX)
        receiver.arrived(EXEC_DATA_BYTES_MAX)
    assert sender.room_bytes == 0
    with pytest.raises(FalError, match="more than the window"):
        receiver.arrived(1)


def test_a_sender_that_ignores_the_window_is_told() -> None:
    with pytest.raises(FalError, match="more than the window"):
        ReceiveWindow().arrived(EXEC_DATA_BYTES_MAX + 1)
    many = ReceiveWindow()
    for _ in range(EXEC_WINDOW_MESSAGES):
        many.arrived(1)
    with pytest.raises(FalError, match="more than the window"):
        many.arrived(1)
    sender = SendWindow()
    sender.sent(5)
    with pytest.raises(FalError, match="more than the 5 sent"):
        sender.taken(6)
