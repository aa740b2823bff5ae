"""What every verb shares: global options, and one call or stream to the scheduler.

asyncio, a third of the start of `falctl --help`, is imported where it is used, as gRPC is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fal_contract.errors import Code, FalError
from fal_contract.ids import qualify
from falctl.profile import Profile, load_profile

if TYPE_CHECKING:
    import grpc

    from fal_contract.v1.cluster_pb2_grpc import ClusterAsyncStub

T = TypeVar("T")


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
    """A channel to the first scheduler of the profile that answers."""
    import asyncio

    from fal_contract.clock import SystemClock
    from fal_contract.identity import Identity
    from fal_contract.rpc import channel as open_channel

    profile = current_profile()
    identity = Identity.load(profile.identity)
    identity.check(now_s=SystemClock().wall_s())
    refused: list[str] = []
    for server in profile.servers:
        channel = open_channel(server, identity)
        try:
            await asyncio.wait_for(channel.channel_ready(), timeout=min(5.0, GLOBALS.timeout_s))
        except TimeoutError:
            refused.append(server)
            await channel.close(None)
            continue
        try:
            yield channel
        finally:
            await channel.close(None)
        return
    raise FalError(
        Code.UNAVAILABLE,
        f"No scheduler answers at {', '.join(refused)} (profile {profile.name!r})",
        remedy="Check that it runs (`falctl dev status`), its address and your certificate.",
    )


def call(work: Callable[[ClusterAsyncStub], Awaitable[T]]) -> T:
    """Run one piece of work against the operators' API; gRPC errors come back as FalError."""
    import asyncio

    async def body() -> T:
        from fal_contract.rpc import fal_errors
        from fal_contract.v1.cluster_pb2_grpc import ClusterStub

        async with connected() as channel:
            stub: Any = ClusterStub(channel)
            with fal_errors():
                return await work(stub)

    return asyncio.run(body())


def unary(method: str, request: Any) -> Any:
    """Call one unary RPC of the operators' API by name, with the global timeout."""

    async def work(stub: Any) -> Any:
        return await getattr(stub, method)(request, timeout=GLOBALS.timeout_s)

    return call(work)
