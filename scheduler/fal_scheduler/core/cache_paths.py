"""Where one node's cache dials another's, and whether the connection must be TLS. Pure.

A node has one address a network. Pools that both declare their networks share those that both name; where one of them
declares none, every address is worth a try: what does not answer is told back as unreachable.
"""

from __future__ import annotations

from collections.abc import Iterable

from fal_scheduler.core.records import Pool
from fal_scheduler.core.told import Endpoint


def shared_endpoints(caller: Pool | None, server: Pool | None, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Those of the server's endpoints that the caller may dial, in their order; none: it must wait to be dialled."""
    told = tuple(endpoints)
    if caller is None or server is None or caller.name == server.name or not caller.networks or not server.networks:
        return told
    both = frozenset(caller.networks) & frozenset(server.networks)
    return tuple(endpoint for endpoint in told if not endpoint.network or endpoint.network in both)


def needs_tls(caller: Pool | None, server: Pool | None) -> bool:
    """Clear text only inside one pool whose network its operator trusts."""
    return caller is None or server is None or caller.name != server.name or not caller.trusted_network


__all__ = ["needs_tls", "shared_endpoints"]
