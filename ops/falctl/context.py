"""What every verb shares: global options, and one call or stream to the scheduler.

asyncio, a third of the start of `falctl --help`, is imported where it is used, as gRPC is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fal_contract.errors import Code, FalError
from fal_contract.ids import qualify
from falctl.profile import Profile, load_profile

if TYPE_CHECKING:
    import grpc

    from fal_contract.v1.cluster_pb2_grpc import ClusterAsyncStub

T = TypeVar("T")
_ANSWER_WAIT_S: Final = 5.0  # for a scheduler that does not answer
_ELECTION_WAIT_S: Final = 20.0  # for a leader, where standbys answer
_ELSEWHERE: Final = frozenset({Code.NOT_LEADER, Code.UNAVAILABLE, Code.TIMEOUT})
_DID_NOTHING: Final = frozenset({Code.NOT_LEADER})
_READ_AGAIN: Final = frozenset({Code.NOT_LEADER, Code.UNAVAILABLE})
_READS: Final = ("Get", "List", "Plan", "Explain", "Where", "Top")


@dataclass(slots=True)
class Globals:
    """Options before the verb."""

    profile: str | None = None
    team: str | None = None
    timeout_s: float = 30.0


GLOBALS = Globals()


def current_profile() -> Profile:
    """The profile that the options and the environment choose."""
    return load_profile(GLOBALS.profile)


def team() -> str:
    """The team in force."""
    return GLOBALS.team or current_profile().team


def owned(value: str, *, field: str) -> str:
    """`name` or `team/name` → `team/name`."""
    return qualify(value, team=team(), field=field)


@asynccontextmanager
async def connected() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the scheduler that leads: those of the profile are asked, and where they point to.

    While there is an election, standbys are asked again for 20 s. Raises UNAVAILABLE, or what TLS refuses.
    """
    import asyncio

    from fal_contract.clock import SystemClock
    from fal_contract.identity import Identity
    from fal_contract.leader_search import LeaderSearch
    from fal_contract.rpc import channel as open_channel

    profile, clock = current_profile(), SystemClock()
    identity = Identity.load(profile.identity)
    identity.check(now_s=clock.wall_s())
    search, began_s, tries = LeaderSearch(profile.servers), clock.monotonic_s(), 0
    standby: FalError | None = None
    while True:
        channel = open_channel(search.next().address, identity)
        tries += 1
        try:
            await _must_lead(channel)
        except FalError as error:
            await channel.close(None)
            if error.code not in _ELSEWHERE and search.dialled in profile.servers:
                raise  # of a hint it may be another network's machine of that address
            if search.failed(error):
                continue
            standby = error if error.code is Code.NOT_LEADER else standby
            patience_s = min(_ANSWER_WAIT_S if standby is None else _ELECTION_WAIT_S, GLOBALS.timeout_s)
            if tries >= len(profile.servers) and clock.monotonic_s() - began_s > patience_s:
                raise _nobody(profile, standby) from None
            await asyncio.sleep(_pause_s())
            continue
        break
    try:
        yield channel
    finally:
        await channel.close(None)


async def _must_lead(channel: grpc.aio.Channel) -> None:
    """Raises NOT_LEADER with where the leader is, as far as the scheduler there knows; UNAVAILABLE, TIMEOUT …"""
    from fal_contract.rpc import fal_errors
    from fal_contract.v1 import schedulers_pb2
    from fal_contract.v1.schedulers_pb2_grpc import SchedulersStub

    try:
        with fal_errors():
            stub: Any = SchedulersStub(channel)
            timeout_s = min(2 * _ANSWER_WAIT_S, GLOBALS.timeout_s)
            view = await stub.GetLeader(schedulers_pb2.GetLeaderRequest(wait_s=_ANSWER_WAIT_S / 2), timeout=timeout_s)
    except FalError as error:
        if error.code is Code.VERSION_MISMATCH:
            return  # of a release before this call: it says NOT_LEADER itself
        raise
    leader = next((one for one in view.schedulers if one.leads), None)
    if leader is None or not leader.answers:
        addresses = tuple(leader.addresses) if leader is not None else ()
        raise FalError(Code.NOT_LEADER, "it is a standby", remedy="Ask the leader.", leader=addresses)


def _nobody(profile: Profile, standby: FalError | None) -> FalError:
    servers = ", ".join(profile.servers)
    if standby is not None and standby.leader:
        return FalError(
            Code.UNAVAILABLE,
            f"The leader at {', '.join(standby.leader)} cannot be reached from here (profile {profile.name!r})",
            remedy="Look at `falctl operator leader`, the path to it, and the schedulers' `advertise`.",
        )
    if standby is not None:
        return FalError(
            Code.UNAVAILABLE,
            f"No scheduler leads; standbys answer at {servers} (profile {profile.name!r})",
            remedy="Check the store (`falctl operator leader` names the trouble).",
        )
    return FalError(
        Code.UNAVAILABLE,
        f"No scheduler answers at {servers} (profile {profile.name!r})",
        remedy="Check that it runs (`falctl dev status`), its address and your certificate.",
    )


def _pause_s() -> float:
    from random import SystemRandom

    return SystemRandom().uniform(0.05, 0.4)


def call(work: Callable[[ClusterAsyncStub], Awaitable[T]], *, again: Collection[Code] = ()) -> T:
    """Run one piece of work against the operators' API; gRPC errors come back as FalError.

    `again`: errors after which all of it may be done once more, within the global timeout.
    """
    import asyncio

    async def body() -> T:
        from fal_contract.clock import SystemClock
        from fal_contract.rpc import fal_errors
        from fal_contract.v1.cluster_pb2_grpc import ClusterStub

        clock = SystemClock()
        until_s = clock.monotonic_s() + GLOBALS.timeout_s
        while True:
            async with connected() as channel:
                stub: Any = ClusterStub(channel)
                try:
                    with fal_errors():
                        return await work(stub)
                except FalError as error:
                    if error.code not in again or clock.monotonic_s() > until_s:
                        raise
            await asyncio.sleep(_pause_s())

    return asyncio.run(body())


async def pages(stub: Any, method: str, request: Any, name: str) -> list[Any]:
    """All of a list, page by page; `name` is the reply's field. A release that knows no pages gives all at once.

    What is made or goes while the pages are read may be there or not; nothing comes twice.
    """
    from fal_contract.limits import LISTED_PAGE

    request.limit = LISTED_PAGE
    views: list[Any] = []
    while True:
        reply = await getattr(stub, method)(request, timeout=GLOBALS.timeout_s)
        views += getattr(reply, name)
        if not reply.next:
            return views
        request.after = reply.next


def listed(method: str, request: Any, name: str) -> list[Any]:
    """`pages` over a connection of its own; another leader begins anew."""

    async def work(stub: Any) -> list[Any]:
        request.ClearField("after")
        return await pages(stub, method, request, name)

    return call(work, again=_READ_AGAIN)


def unary(method: str, request: Any) -> Any:
    """Call one unary RPC of the operators' API by name, with the global timeout.

    NOT_LEADER says that nothing was done, so any call is made again; one whose answer was lost only where it reads.
    """

    async def work(stub: Any) -> Any:
        return await getattr(stub, method)(request, timeout=GLOBALS.timeout_s)

    return call(work, again=_READ_AGAIN if method.startswith(_READS) else _DID_NOTHING)
