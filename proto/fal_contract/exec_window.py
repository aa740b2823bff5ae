"""Flow control of a command's input and output, end to end between operator and agent. Pure.

Each side may have EXEC_WINDOW_BYTES in at most EXEC_WINDOW_MESSAGES on their way that the other has not yet taken; who
takes says so in `taken_bytes`, a total since the beginning. So a slow terminal holds back the command, and neither
scheduler nor the node's session ever keeps more than a window for it.
"""

from __future__ import annotations

from collections import deque

from fal_contract.errors import invalid
from fal_contract.limits import EXEC_DATA_BYTES_MAX, EXEC_WINDOW_BYTES, EXEC_WINDOW_MESSAGES

_TELL_BYTES = EXEC_WINDOW_BYTES // 4
_TELL_MESSAGES = EXEC_WINDOW_MESSAGES // 8


class SendWindow:
    """What was sent and not yet taken."""

    def __init__(self) -> None:
        self._sent = self._taken = 0
        self._ends: deque[int] = deque()  # of messages not yet taken, counted from the first byte

    @property
    def room_bytes(self) -> int:
        """The most that may be sent now in one message; 0: wait."""
        if len(self._ends) >= EXEC_WINDOW_MESSAGES:
            return 0
        return min(EXEC_DATA_BYTES_MAX, EXEC_WINDOW_BYTES - (self._sent - self._taken))

    def sent(self, count: int) -> None:
        """A message of `count` bytes, at most `room_bytes`, has left."""
        assert 0 < count <= self.room_bytes, (count, self.room_bytes)
        self._sent += count
        self._ends.append(self._sent)

    def taken(self, total: int) -> None:
        """The other side has taken `total` so far; an older word changes nothing. INVALID: more than was sent."""
        if total > self._sent:
            raise invalid("taken_bytes", total, f"is more than the {self._sent} sent", remedy="Count what came.")
        self._taken = max(self._taken, total)
        while self._ends and self._ends[0] <= self._taken:
            self._ends.popleft()


class ReceiveWindow:
    """What arrived and was not yet taken."""

    def __init__(self) -> None:
        self._arrived = self._messages = 0
        self._told = self._told_messages = 0
        self.taken_bytes = self._taken_messages = 0

    def arrived(self, count: int) -> None:
        """A message of `count` bytes came. INVALID when the sender ignores the window."""
        self._arrived += count
        self._messages += 1
        too_large = count > EXEC_DATA_BYTES_MAX or self._arrived - self.taken_bytes > EXEC_WINDOW_BYTES
        if too_large or self._messages - self._taken_messages > EXEC_WINDOW_MESSAGES:
            waiting = self._arrived - self.taken_bytes
            remedy = f"Send at most {EXEC_WINDOW_BYTES} bytes more than were taken, {EXEC_DATA_BYTES_MAX} at once."
            raise invalid("data", f"{waiting} bytes", "is more than the window", remedy=remedy)

    def took(self, count: int) -> bool:
        """A message of `count` bytes was handed on. True when it is time to tell `taken_bytes`."""
        self.taken_bytes += count
        self._taken_messages += 1
        much = self.taken_bytes - self._told >= _TELL_BYTES
        if much or self._taken_messages - self._told_messages >= _TELL_MESSAGES:
            self._told, self._told_messages = self.taken_bytes, self._taken_messages
            return True
        return False
