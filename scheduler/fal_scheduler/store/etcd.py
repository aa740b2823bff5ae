"""The store of several schedulers: etcd holds records, term and revision; a key bound to a lease names the leader.

Keys, below the prefix (default `/falctl/`):

    format          "1"; a store of a newer format is refused
    v1/leader       holder's name, bound to its lease; its create_revision is the guard's token
    v1/term         decimal
    v1/revision     decimal, rises by one per commit
    v1/record/KEY   the records
    v1/member/NAME  schedulers that are up, each bound to a lease of its own (etcd_members)

Every commit is one transaction that compares leader, term and revision. Comparing the revision also makes a commit
whose answer was lost harmless: it lands before the next one or never. The leader trusts its lease from when it *sent*
the last renewal that was answered, so it knows of its end before etcd does (etcd_lease).

Called by the engine and the leader module. Must not retry a commit: only the engine knows what it meant.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aetcd import rpc

from fal_contract.errors import Code, FalError
from fal_contract.limits import COMMIT_TIMEOUT_S, STORE_LEASE_TTL_S
from fal_scheduler.store.etcd_client import (
    EtcdClient,
    EtcdRefused,
    EtcdSilent,
    EtcdTls,
    commit_failed,
    unavailable,
)
from fal_scheduler.store.etcd_lease import LeaseKeeper, now_s
from fal_scheduler.store.etcd_members import EtcdMembers
from fal_scheduler.store.etcd_upkeep import EtcdUpkeep
from fal_scheduler.store.interface import (
    CommitCounters,
    Guard,
    Loaded,
    Member,
    Roster,
    Write,
    check_writes,
    leads_already,
    load_first,
    not_leader,
)

FORMAT_VERSION: Final = 1
_PAGE_RECORDS: Final = 1000
_LOAD_ATTEMPTS_MAX: Final = 5
_RETRY_S: Final = 0.5
_LEASE_TTL_MIN_S: Final = 2  # etcd grants no shorter one
_QUOTA_BYTES: Final = 2 << 30  # etcd's own default


@dataclass(slots=True)
class _Leadership:
    """What the leader holds besides its guard."""

    token: bytes
    lease: int
    keeper: LeaseKeeper
    upkeep: asyncio.Task[None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class EtcdStore:
    """Records in an etcd cluster."""

    name = "etcd"

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: EtcdTls | None = None,
        prefix: str = "/falctl",
        lease_ttl_s: float = STORE_LEASE_TTL_S,
        timeout_s: float = COMMIT_TIMEOUT_S,
        quota_bytes: int = _QUOTA_BYTES,
    ) -> None:
        """`endpoints`: host:port of members; `lease_ttl_s`: whole seconds, at least 2; `quota_bytes`: as etcd's own."""
        self._client = EtcdClient(endpoints, tls=tls, timeout_s=timeout_s)
        self._upkeep = EtcdUpkeep(self._client, quota_bytes=quota_bytes)
        self._lease_ttl_s = max(int(lease_ttl_s), _LEASE_TTL_MIN_S)
        root = prefix.rstrip("/").encode()
        self._format_key = root + b"/format"
        self._leader_key = root + b"/v1/leader"
        self._term_key = root + b"/v1/term"
        self._revision_key = root + b"/v1/revision"
        self._record_prefix = root + b"/v1/record/"
        self._members = EtcdMembers(
            self._client, prefix=root + b"/v1/member/", leader_key=self._leader_key, term_key=self._term_key
        )
        self._lead: _Leadership | None = None
        self._opened = False
        self._revision = 0  # as of our election, last commit or load
        self._must_load = False  # the outcome of a commit is not known
        self._renewals = 0
        self._commits = asyncio.Lock()
        self._counters = CommitCounters()

    async def open(self) -> None:
        """Check the format, write it where the store is new."""
        compare = [rpc.Compare(key=self._format_key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL)]
        success = [_put(self._format_key, b"%d" % FORMAT_VERSION)]
        try:
            response = await self._client.txn(compare, success, [_get(self._format_key)])
        except (EtcdRefused, EtcdSilent) as error:
            if not self._opened:  # else others here use the connection: who stands by is asked all the time
                await self.close()
            raise unavailable(error) from error
        self._opened = True
        if response.succeeded:
            return
        text = response.responses[0].response_range.kvs[0].value
        if not text.isdigit():
            raise FalError(
                Code.CORRUPT,
                f"etcd key {self._format_key.decode()} = {text!r} is not a format version",
                remedy="Nothing was changed. Restore etcd from a snapshot, or give another prefix.",
            )
        if int(text) > FORMAT_VERSION:
            raise FalError(
                Code.VERSION_MISMATCH,
                f"the records in etcd have format {int(text)}, this scheduler reads up to {FORMAT_VERSION}",
                remedy="Start the newer scheduler that wrote them, or restore a snapshot made before the upgrade.",
            )

    async def campaign(self, holder: str, *, term_min: int = 0) -> Guard:
        """See Store. Waits on the leader's key; goes on through outages of etcd."""
        if self._lead is not None:
            raise leads_already(holder)
        while True:
            try:
                guard = await self._try_campaign(holder, term_min)
            except EtcdSilent:
                await asyncio.sleep(_RETRY_S)
                continue
            except EtcdRefused as error:
                raise unavailable(error) from error
            if guard is not None:
                return guard

    async def raise_term(self, guard: Guard, term: int) -> Guard:
        """See Store."""
        if term <= guard.term:
            return guard
        self._check_lead(guard)
        try:
            response = await self._client.txn(self._leads(guard), [_put(self._term_key, b"%d" % term)], [])
        except (EtcdRefused, EtcdSilent) as error:
            raise commit_failed(error) from error
        if not response.succeeded:
            raise not_leader(guard, "another term has begun")
        return Guard(term, guard.holder, guard.token)

    async def resign(self, guard: Guard) -> None:
        """See Store. Where etcd does not answer, the lease runs out by itself."""
        lead = self._lead
        if lead is not None and lead.token == guard.token:
            await self._give_up(lead)

    async def lost(self, guard: Guard) -> None:
        """See Store."""
        lead = self._lead
        if lead is not None and lead.token == guard.token:
            await lead.ended.wait()

    async def load(self) -> Loaded:
        """See Store. Pages of one revision; begins anew where that revision was compacted away meanwhile."""
        for _ in range(_LOAD_ATTEMPTS_MAX):
            try:
                loaded = await self._load_pages()
            except EtcdRefused as error:
                if "compacted" in error.detail:
                    continue
                raise unavailable(error) from error
            except EtcdSilent as error:
                raise unavailable(error) from error
            if self._must_load:
                self._revision, self._must_load = loaded.revision, False
            return loaded
        raise FalError(
            Code.UNAVAILABLE,
            f"etcd compacted the records away under {_LOAD_ATTEMPTS_MAX} attempts to load them",
            remedy="Look for another program that compacts this etcd often.",
        )

    async def commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        """See Store."""
        size = check_writes(writes)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            async with self._commits:
                revision = await self._commit(guard, writes)
        except FalError as error:
            self._counters.refused(error)
            raise
        self._counters.committed(len(writes), size, loop.time() - begun_s)
        self._upkeep.committed(size)
        return revision

    async def announce(self, member: Member) -> None:
        """See Store."""
        try:
            await self._members.announce(member)
        except (EtcdRefused, EtcdSilent) as error:
            raise unavailable(error) from error

    async def roster(self) -> Roster:
        """See Store."""
        try:
            return await self._members.roster()
        except (EtcdRefused, EtcdSilent) as error:
            raise unavailable(error) from error

    async def close(self) -> None:
        """See Store."""
        if self._lead is not None:
            await self._give_up(self._lead)
        await self._members.withdraw()
        await self._client.close()

    def statistics(self) -> Mapping[str, float]:
        """See Store; also sizes, `quota_used` (0 to 1) and `quota_alarm` (1 from 70 % on), as of the last upkeep."""
        return {
            **self._counters.as_mapping(),
            **self._upkeep.statistics(),
            "reconnects": float(self._client.reconnects),
            "renewals": float(self._renewals + (self._lead.keeper.renewals if self._lead is not None else 0)),
        }

    # Leading.

    async def _try_campaign(self, holder: str, term_min: int) -> Guard | None:
        """Take the free leadership, or wait until it may be free and return None."""
        leader, revision = await self._client.get(self._leader_key)
        if leader is not None:
            if not await self._client.wait_for_delete(
                self._leader_key, since=revision + 1, timeout_s=self._client.timeout_s
            ):
                await asyncio.sleep(_RETRY_S)
            return None
        stored, _ = await self._client.get(self._term_key)
        term = max(int(stored.value) if stored is not None else 0, term_min - 1) + 1
        begun_s = now_s()
        grant = rpc.LeaseGrantRequest(TTL=self._lease_ttl_s)
        lease = int((await self._client.call("lease", "LeaseGrant", grant)).ID)
        try:
            response = await self._client.txn(
                [
                    rpc.Compare(key=self._leader_key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL),
                    rpc.Compare(
                        key=self._term_key,
                        target=rpc.Compare.MOD,
                        result=rpc.Compare.EQUAL,
                        mod_revision=stored.mod_revision if stored is not None else 0,
                    ),
                ],
                [_put(self._leader_key, holder.encode(), lease=lease), _put(self._term_key, b"%d" % term)],
                [],
            )
            if not response.succeeded:
                await self._revoke(lease)
                return None
            counter, _ = await self._client.get(self._revision_key)
        except BaseException:  # cancelled or no answer: it may have become the leader's key
            await self._revoke(lease)
            raise
        self._revision = int(counter.value) if counter is not None else 0
        return self._begin(Guard(term, holder, b"%d" % response.header.revision), lease, begun_s)

    def _begin(self, guard: Guard, lease: int, begun_s: float) -> Guard:
        keeper = LeaseKeeper(
            self._client.addresses,
            self._client.tls,
            lease=lease,
            ttl_s=self._lease_ttl_s,
            begun_s=begun_s,
            leader_key=self._leader_key,
            token=int(guard.token),
            on_end=lambda: self._end(lead),
        )
        lead = _Leadership(guard.token, lease, keeper, asyncio.create_task(self._upkeep.run()))
        self._lead = lead
        keeper.start()
        return guard

    def _end(self, lead: _Leadership) -> None:
        if not lead.ended.is_set():
            self._renewals += lead.keeper.renewals
        lead.ended.set()
        lead.keeper.stop()
        lead.upkeep.cancel()
        if self._lead is lead:
            self._lead = None

    async def _give_up(self, lead: _Leadership) -> None:
        """End it so that another may lead at once."""
        self._end(lead)
        await asyncio.gather(lead.upkeep, return_exceptions=True)
        await self._revoke(lead.lease)
        await lead.keeper.join()

    async def _revoke(self, lease: int) -> None:
        with contextlib.suppress(EtcdRefused, EtcdSilent):
            await self._client.call(
                "lease", "LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease), timeout_s=self._lease_ttl_s / 3
            )

    def _check_lead(self, guard: Guard) -> _Leadership:
        lead = self._lead
        if lead is None or lead.token != guard.token:
            raise not_leader(guard, "it has resigned or its lease has ended")
        if not lead.keeper.trusted:
            self._end(lead)
            raise not_leader(guard, "its lease was not renewed in time")
        return lead

    # Reading and writing.

    def _leads(self, guard: Guard) -> list[Any]:
        return [
            rpc.Compare(
                key=self._leader_key,
                target=rpc.Compare.CREATE,
                result=rpc.Compare.EQUAL,
                create_revision=int(guard.token),
            ),
            rpc.Compare(
                key=self._term_key, target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=b"%d" % guard.term
            ),
        ]

    async def _commit(self, guard: Guard, writes: Sequence[Write]) -> int:
        lead = self._check_lead(guard)
        if self._must_load:
            raise load_first(self.name)
        success = [self._operation(write) for write in writes]
        success.append(_put(self._revision_key, b"%d" % (self._revision + 1)))
        compare = [*self._leads(guard), self._counts(self._revision)]
        try:
            response = await self._client.txn(compare, success, [_get(self._leader_key), _get(self._term_key)])
        except (EtcdRefused, EtcdSilent) as error:
            failure = commit_failed(error)
            self._must_load |= failure.code is Code.STORE_UNKNOWN
            raise failure from error
        except asyncio.CancelledError:
            self._must_load = True  # it may have been sent
            raise
        if not response.succeeded:
            raise self._refused(guard, lead, response)
        self._revision += 1
        return self._revision

    def _operation(self, write: Write) -> Any:
        key = self._record_prefix + write.key.encode()
        if write.value is None:
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        return _put(key, write.value)

    def _counts(self, revision: int) -> Any:
        """True where the stored revision is this one; the first commit makes the counter."""
        if revision == 0:
            return rpc.Compare(key=self._revision_key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL)
        return rpc.Compare(
            key=self._revision_key, target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=b"%d" % revision
        )

    def _refused(self, guard: Guard, lead: _Leadership, response: Any) -> FalError:
        """Why the comparison of a commit failed: deposed, or somebody else counted the revision up."""
        leader, term = (found.response_range.kvs for found in response.responses)
        if not leader or b"%d" % leader[0].create_revision != guard.token:
            self._end(lead)
            return not_leader(guard, f"the leader is {leader[0].value.decode() if leader else 'nobody'}")
        if not term or term[0].value != b"%d" % guard.term:
            return not_leader(guard, f"the term is {term[0].value.decode() if term else 'gone'}")
        self._must_load = True  # an earlier commit whose answer was lost has landed
        return load_first(self.name)

    async def _load_pages(self) -> Loaded:
        counter, at = await self._client.get(self._revision_key)
        revision = int(counter.value) if counter is not None else 0
        records: dict[str, bytes] = {}
        prefix = self._record_prefix
        start, end = prefix, prefix[:-1] + bytes([prefix[-1] + 1])
        limit = _PAGE_RECORDS
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=at)
            try:
                page = await self._client.call("kv", "Range", request)
            except EtcdRefused as error:
                if limit > 1 and "larger than max" in error.detail:  # gRPC's bound on a message, big values
                    limit = max(limit // 8, 1)
                    continue
                raise
            for kv in page.kvs:
                records[kv.key[len(prefix) :].decode()] = kv.value
            if not page.more:
                return Loaded(revision, records)
            start = page.kvs[-1].key + b"\0"


def _put(key: bytes, value: bytes, *, lease: int = 0) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease))


def _get(key: bytes) -> Any:
    return rpc.RequestOp(request_range=rpc.RangeRequest(key=key))
