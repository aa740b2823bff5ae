"""Which scheduler to dial next. Pure: agents, caches, gateways and falctl look for the leader by the same rules.

Known are the addresses of the configuration; learnt are hints: a standby's NOT_LEADER names the leader's addresses. A
hint is dialled at once, but once only until a dial succeeds or the whole list was gone through: two schedulers that
name each other make no loop. When the leader itself does not answer, standbys are asked to hold the call until another
leads (`Dial.wait`), so that a takeover is noticed when it happens and nobody polls meanwhile.

    search = LeaderSearch(addresses)
    dial = search.next()            # connect to dial.address
    search.connected()              # it answered as a leader does
    if search.failed(error): …      # dial again at once; False: after a pause
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from fal_contract.errors import Code, FalError
from fal_contract.limits import ELECTION_RETRY_CAP_S, RECONNECT_BASE_S, RECONNECT_CAP_S

WAIT_KEY: Final = "fal-wait"  # metadata of a call that a standby may hold
HINTS_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Dial:
    """Where to. `wait`: a standby there holds the call while it knows no leader but the one at this address.

    "-": while it knows none; empty: it answers at once.
    """

    address: str
    wait: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the call carries."""
        return ((WAIT_KEY, self.wait),) if self.wait else ()


class LeaderSearch:
    """The search of one client; `addresses`: host:port, at least one."""

    def __init__(self, addresses: Sequence[str]) -> None:
        if not addresses:
            raise FalError(Code.INVALID, "there is no scheduler address", remedy="Give at least one host:port.")
        self._addresses = tuple(addresses)
        self._position = 0
        self._hints: deque[str] = deque()
        self._tried: dict[str, None] = {}  # hints dialled since the last success
        self._failed = ""  # who was said to lead and does not answer; "-": nobody is said to
        self._connected = False
        self._dialled = Dial(self._addresses[0])

    @property
    def dialled(self) -> str:
        """The address dialled last."""
        return self._dialled.address

    def next(self) -> Dial:
        """Where to dial now."""
        if self._hints:
            self._dialled = Dial(self._hints.popleft(), "-")  # it may be loading the records still
        else:
            if self._position == len(self._addresses):
                self._position = 0
                self._tried.clear()
            self._dialled = Dial(self._addresses[self._position], self._failed)
            self._position += 1
        return self._dialled

    def connected(self) -> None:
        """The address dialled last answered as the leader."""
        self._connected, self._failed = True, ""
        self._position = 0
        self._hints.clear()
        self._tried.clear()

    def failed(self, error: FalError) -> bool:
        """The dial, or the stream that stood, failed. True: there is somewhere to dial at once."""
        here, was_connected = self._dialled.address, self._connected
        self._connected = False
        if error.code is Code.NOT_LEADER:
            if not error.leader:
                self._failed = self._failed or "-"
                return self._more
            new = [one for one in dict.fromkeys(error.leader) if one not in self._tried and one != here]
            self._hints = deque(new[:HINTS_MAX])
            self._tried.update(dict.fromkeys(self._hints))
            self._failed = self._failed or "-"
            return bool(new) or self._more
        if was_connected or here in self._tried or not self._failed:
            self._failed = here
        if was_connected and here not in self._tried:  # a restart, or a link that flapped: it may lead still
            self._tried[here] = None
            self._hints.appendleft(here)
            return True
        return bool(self._hints) or self._more

    @property
    def _more(self) -> bool:
        """Whether this round of the list goes on; pauses are between rounds."""
        return self._position < len(self._addresses)


@runtime_checkable
class Seeker(Protocol):
    """Who chooses where to dial, told how it went: a dialer that holds a LeaderSearch."""

    def connected(self) -> None: ...

    def failed(self, error: FalError) -> bool:
        """True: there is somewhere to dial at once."""
        ...


class NoSeeker:
    """There is one place to dial, as in simulations."""

    def connected(self) -> None:
        """Nothing to learn."""

    def failed(self, error: FalError) -> bool:
        """Nowhere else to go."""
        return False


def seeker_of(dial: object) -> Seeker:
    """A dialer's own, if it is one."""
    return dial if isinstance(dial, Seeker) else NoSeeker()


def pause_max_s(seeker: Seeker, error: Exception | None, attempt: int, *, cap_s: float = RECONNECT_CAP_S) -> float:
    """The longest pause before the next dial, of which a random part is waited; `attempt`: failures in a row.

    While nobody leads, standbys hold who asks: there is no herd to be kept off by long pauses.
    """
    if isinstance(error, FalError):
        if seeker.failed(error):
            return RECONNECT_BASE_S
        if error.code is Code.NOT_LEADER:
            cap_s = ELECTION_RETRY_CAP_S
    return min(cap_s, RECONNECT_BASE_S * 2.0 ** min(attempt, 16))


__all__ = ["WAIT_KEY", "Dial", "LeaderSearch", "NoSeeker", "Seeker", "pause_max_s", "seeker_of"]
