"""Who may connect to the bulk port, and how: pure decisions on what a caller shows.

Set on the event loop, asked by the threads of connections: each field is replaced as a whole.

A node shows tickets, of which one has to be good (fal_contract.ticket); over TLS also its certificate, whose node id
they must be made for. An operator who pushes a model shows an operator's certificate and tickets for
`operator/NAME+SUFFIX`, a name for each upload; it may give pieces, never get any. Clear text is taken from members of
whom the scheduler says so, from unknown callers where the whole network is trusted, and where there is no identity at
all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from fal_contract.errors import FalError
from fal_contract.identity import WRITERS, PeerIdentity, Role, require
from fal_contract.ticket import check_ticket
from fal_fsd.peers.frames import Hello, HelloOk
from fal_fsd.peers.wire import VERSION

TlsMode = Literal["auto", "always", "never"]
_CALLERS: Final = WRITERS | {Role.NODE}


class Refusal(Exception):
    """Not let in; the text is told to the other side."""


class Gate:
    """See the module's docstring."""

    def __init__(self, node_id: str, cluster_id: str, *, tls: TlsMode, identified: bool) -> None:
        self.node_id = node_id
        self.cluster_id = cluster_id
        self.tls: TlsMode = tls if identified else "never"
        self.keys: Sequence[bytes] = ()
        self.trusted_network = not identified
        self.members_tls: Mapping[str, bool] = {}
        self.banned: Mapping[str, str] = {}

    def dials_tls(self, member_tls: bool) -> bool:
        """Whether a member is dialled with TLS."""
        return self.tls == "always" or (self.tls == "auto" and member_tls)

    def admit(self, hello: Hello, peer: PeerIdentity | None, *, now_s: float) -> dict[str, float]:
        """Artifact ids for which the caller's tickets are good, and until when. Raises Refusal."""
        if not hello.version_min <= VERSION <= hello.version_max:
            raise Refusal(f"it speaks versions {hello.version_min} to {hello.version_max}, this node {VERSION}")
        if hello.cluster_id != self.cluster_id:
            raise Refusal(f"it belongs to cluster {hello.cluster_id or 'none'}")
        if hello.node_id == self.node_id:
            raise Refusal("it is this node itself")
        if hello.node_id in self.banned:
            raise Refusal(f"it was dropped: {self.banned[hello.node_id]}")
        if peer is None:
            self._check_plain(hello.node_id)
        else:
            self.check_peer(peer, hello.node_id, now_s=now_s)
        good: dict[str, float] = {}
        why = "it shows no ticket"
        for artifact_id, ticket in hello.tickets:
            if not (why := self.fault(ticket, hello.node_id, artifact_id, now_s=now_s)):
                good[artifact_id] = expiry_s(ticket)
        if not good:
            raise Refusal(f"its ticket is refused: {why}" if hello.tickets else why)
        return good

    def fault(self, ticket: bytes, caller: str, artifact_id: str, *, now_s: float) -> str:
        """Empty when the ticket is good here."""
        return check_ticket(self.keys, ticket, caller=caller, artifact_id=artifact_id, now_s=now_s)

    def check_peer(self, peer: PeerIdentity, node_id: str, *, now_s: float) -> None:
        """The certificate must be the node's (or operator's) who speaks. Raises Refusal."""
        try:
            require(peer, cluster_id=self.cluster_id, roles=_CALLERS, now_s=now_s)
        except FalError as error:
            raise Refusal(error.what) from None
        if peer.role is Role.NODE:
            shown, said = peer.name, node_id
        else:
            shown, said = peer.subject, node_id.partition("+")[0]
        if shown != said:
            raise Refusal(f"its certificate is that of {shown}, not of {node_id}")

    def check_answer(self, answer: HelloOk, peer: PeerIdentity | None, node_id: str, *, now_s: float) -> None:
        """The dialled node must be the one that was meant. Raises Refusal."""
        if answer.version != VERSION:
            raise Refusal(f"it answers in version {answer.version}")
        if answer.node_id != node_id:
            raise Refusal(f"at this address is {answer.node_id}, not {node_id}")
        if peer is not None:
            self.check_peer(peer, node_id, now_s=now_s)
            if peer.role is not Role.NODE:
                raise Refusal(f"{peer.subject} is no node")

    def _check_plain(self, caller: str) -> None:
        if self.tls == "never":
            return
        needs_tls = self.members_tls.get(caller, not self.trusted_network)
        if self.tls == "always" or needs_tls:
            raise Refusal("clear text is not allowed here, it has to use TLS")


def expiry_s(ticket: bytes) -> float:
    """Until when a ticket is good, Unix seconds."""
    return float(int.from_bytes(ticket[:8], "big"))


__all__ = ["Gate", "Refusal", "TlsMode", "expiry_s"]
