"""The bounded ends of a stream: a first message within a time, a send that ends. For sessions and dispatch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

from fal_contract.errors import Code, FalError

HELLO_TIMEOUT_S: Final = 10.0
SEND_TIMEOUT_S: Final = 30.0

T = TypeVar("T")


async def first_message(incoming: AsyncIterator[T]) -> T:
    """The first message. Raises TIMEOUT when none comes within 10 s or the stream ends before."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            async for message in incoming:
                return message
    except TimeoutError:
        pass
    raise FalError(Code.TIMEOUT, "no Hello came", remedy=f"Send Hello first, within {HELLO_TIMEOUT_S:g} s.")


async def send_bounded(send: Callable[[T], Awaitable[None]], message: T, to: str) -> None:
    """Send; flow control may hold it back for 30 s. Then UNAVAILABLE: the peer starts over."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send(message)
    except TimeoutError:
        raise too_slow(to) from None


def too_slow(peer: str) -> FalError:
    """Why a stream is closed whose peer does not take its messages."""
    return FalError(
        Code.UNAVAILABLE,
        f"{peer} takes its messages too slowly",
        remedy="It starts over by itself; look at its machine's load and network.",
    )


async def until_first(closed: asyncio.Future[FalError], *tasks: asyncio.Task[None]) -> None:
    """Run a stream's tasks until one ends or `closed` has a reason; raises what ended it. All tasks are over then."""
    try:
        waited: list[asyncio.Future[Any]] = [closed, *tasks]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if closed.done():
            raise closed.result()
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["HELLO_TIMEOUT_S", "SEND_TIMEOUT_S", "first_message", "send_bounded", "too_slow", "until_first"]
