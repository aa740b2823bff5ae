"""TLS contexts for asyncio and aiohttp, mutual on both sides, from an `Identity`.

For the data path (proxy, gateway, tunnels) and fsd; gRPC has its own in `fal_contract.rpc`. TLS verifies the chain
against the cluster's CA and nothing else; host names are not checked, because nodes are reached under addresses
that no certificate can list. So **every** user calls `verify_peer` after the handshake, before the first byte of
payload. When an identity is renewed, `replace_certificate` swaps it inside the contexts that stand.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, PeerIdentity, Role, peer_of_der, require


def server_context(identity: Identity) -> ssl.SSLContext:
    """For a listener: demands a certificate of this cluster from everyone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, identity)
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """For a dialler: presents ours, trusts this cluster's CA only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # verify_peer checks role and name instead
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, identity)
    return context


def anonymous_server_context(identity: Identity) -> ssl.SSLContext:
    """For the join listener only: shows our certificate, asks for none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_own(context, identity)
    return context


def pinned_client_context(ca_pem: bytes) -> ssl.SSLContext:
    """For the joining agent: trusts this one CA, checks the server's name, presents nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem.decode())
    return context


def replace_certificate(context: ssl.SSLContext, identity: Identity) -> None:
    """Show `identity` from the next handshake on; connections that stand are not touched."""
    _load_own(context, identity)


def verify_peer(
    transport: asyncio.BaseTransport,
    *,
    cluster_id: str,
    roles: Collection[Role],
    name: str | None = None,
    now_s: float,
) -> PeerIdentity:
    """The peer of an established TLS connection, if it is of this cluster and in `roles` (and called `name`).

    Raises UNAUTHENTICATED or PERMISSION_DENIED; the caller then closes the connection.
    """
    ssl_object = transport.get_extra_info("ssl_object")
    der = ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None
    if der is None:
        raise FalError(
            Code.UNAUTHENTICATED, "the peer showed no certificate", remedy="Connect with this cluster's TLS identity."
        )
    peer = peer_of_der(der)
    require(peer, cluster_id=cluster_id, roles=roles, name=name, now_s=now_s)
    return peer


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.ca_pem.decode())
    _load_own(context, identity)


def _load_own(context: ssl.SSLContext, identity: Identity) -> None:
    with _as_file(identity.key_pem + b"\n" + identity.cert_pem) as path:
        context.load_cert_chain(path)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """`ssl` reads keys from files only; on Linux this one exists in memory alone."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("identity", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
        return
    with tempfile.NamedTemporaryFile() as scratch:  # mode 0600
        scratch.write(content)
        scratch.flush()
        yield scratch.name
