"""Which schedulers of one etcd store are up: a key each, below the store's prefix, bound to a lease of its own.

Called by the etcd store. A word to etcd every few seconds, never a commit: renewing a lease is not written to its log.
"""

from __future__ import annotations

import contextlib
import json
from typing import Final

from aetcd import rpc

from fal_contract.limits import MEMBER_TTL_S
from fal_scheduler.store.etcd_client import EtcdClient, EtcdRefused, EtcdSilent
from fal_scheduler.store.interface import Member, Roster

_TIMEOUT_S: Final = 3.0
_MEMBERS_MAX: Final = 64


class EtcdMembers:
    """Keys `PREFIXNAME`; `leader_key` and `term_key` are the store's."""

    def __init__(self, client: EtcdClient, *, prefix: bytes, leader_key: bytes, term_key: bytes) -> None:
        self._client = client
        self._prefix = prefix
        self._leader_key = leader_key
        self._term_key = term_key
        self._lease = 0
        self._own: Member | None = None

    async def announce(self, member: Member) -> None:
        """Be known as this for MEMBER_TTL_S more. Raises EtcdRefused or EtcdSilent."""
        if member == self._own and await self._client.keep_alive(self._lease, timeout_s=_TIMEOUT_S):
            return
        await self.withdraw()
        grant = rpc.LeaseGrantRequest(TTL=int(MEMBER_TTL_S))
        self._lease = int((await self._client.call("lease", "LeaseGrant", grant, timeout_s=_TIMEOUT_S)).ID)
        fields = [member.name, list(member.addresses), member.started_at_s, member.software]
        put = rpc.PutRequest(
            key=self._prefix + member.name.encode(), value=json.dumps(fields).encode(), lease=self._lease
        )
        await self._client.call("kv", "Put", put, timeout_s=_TIMEOUT_S)
        self._own = member

    async def withdraw(self) -> None:
        """Be known no longer; where etcd does not answer, the lease runs out by itself."""
        lease, self._lease, self._own = self._lease, 0, None
        if lease:
            with contextlib.suppress(EtcdRefused, EtcdSilent):
                await self._client.call("lease", "LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease), timeout_s=_TIMEOUT_S)

    async def roster(self) -> Roster:
        """One consistent read. Raises EtcdRefused or EtcdSilent."""
        end = self._prefix[:-1] + bytes([self._prefix[-1] + 1])
        asked = rpc.TxnRequest(
            success=[
                rpc.RequestOp(request_range=rpc.RangeRequest(key=self._leader_key)),
                rpc.RequestOp(request_range=rpc.RangeRequest(key=self._term_key)),
                rpc.RequestOp(request_range=rpc.RangeRequest(key=self._prefix, range_end=end, limit=_MEMBERS_MAX)),
            ]
        )
        answer = await self._client.call("kv", "Txn", asked, timeout_s=_TIMEOUT_S)
        leader, term, members = (part.response_range.kvs for part in answer.responses)
        return Roster(
            leader[0].value.decode(errors="replace") if leader else "",
            int(term[0].value) if term and term[0].value.isdigit() else 0,
            tuple(one for kv in members if (one := _member(kv.value)) is not None),
        )


def _member(value: bytes) -> Member | None:
    try:
        name, addresses, started_at_s, software = json.loads(value)
        return Member(str(name), tuple(map(str, addresses)), float(started_at_s), str(software))
    except (TypeError, ValueError):
        return None  # of a release that writes it otherwise


__all__ = ["EtcdMembers"]
