"""Messages of a node's session: the first one checked, a set cut into what fits. Used by `sessions`."""

from __future__ import annotations

from collections import deque
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.v1 import agent_pb2

# A set larger than this goes as Complete and deltas right behind it; a message holds 4 MiB.
CHUNK_BYTES: Final = 1 << 20


def take_chunk(built: deque[agent_pb2.Assignment]) -> list[agent_pb2.Assignment]:
    """As many as fit into one message, at least one; they leave `built`."""
    chunk: list[agent_pb2.Assignment] = []
    size = 0
    while built:
        size += built[0].ByteSize()
        if chunk and size > CHUNK_BYTES:
            break
        chunk.append(built.popleft())
    return chunk


def hello_in(message: agent_pb2.AgentMessage, peer_name: str) -> agent_pb2.Hello:
    """The Hello that a session begins with. Raises INVALID, PERMISSION_DENIED (of another node)."""
    if message.WhichOneof("kind") != "hello":
        raise invalid("kind", message.WhichOneof("kind"), "came before Hello", remedy="Send Hello first.")
    if message.seq != 1:
        raise invalid("seq", message.seq, "is not the first of a session", remedy="Count from 1 in each session.")
    if message.hello.node_id != peer_name:
        raise FalError(
            Code.PERMISSION_DENIED,
            f"the Hello is node {message.hello.node_id!r}'s, the certificate {peer_name!r}'s",
            remedy="Use the identity that this node was given when it joined.",
            field="node_id",
        )
    return message.hello


__all__ = ["CHUNK_BYTES", "hello_in", "take_chunk"]
