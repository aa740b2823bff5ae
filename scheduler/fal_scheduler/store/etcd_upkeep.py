"""What keeps etcd's database within its quota: the leader compacts old revisions and watches the size.

etcd keeps every version of every key until it is compacted; at its quota it refuses all writes. The quota counts the
file, which compaction does not shrink but makes reusable: so compact early, and only an operator's defrag shrinks it.

Called by the etcd store while it leads. Must not fail a commit: its own errors are counted and forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from aetcd import rpc

from fal_scheduler.store.etcd_client import EtcdClient, EtcdRefused, EtcdSilent

QUOTA_ALARM_SHARE: Final = 0.7
_COMMITS_MAX: Final = 10_000  # compacted at the latest after so many commits,
_BYTES_MAX: Final = 64 << 20  # or so many bytes written,
_INTERVAL_S: Final = 30.0  # looked at as often
_REVISIONS_KEPT: Final = 100  # for a load that is under way


class EtcdUpkeep:
    """Counts what was written, compacts, reads the size."""

    def __init__(self, client: EtcdClient, *, quota_bytes: int) -> None:
        self._client = client
        self._quota_bytes = quota_bytes
        self._due = asyncio.Event()
        self._commits = self._bytes = 0  # since the last compaction
        self._compactions = self._failures = 0
        self._file_bytes = self._used_bytes = 0

    def committed(self, size: int) -> None:
        """One commit of `size` bytes was done."""
        self._commits += 1
        self._bytes += size
        if self._commits >= _COMMITS_MAX or self._bytes >= _BYTES_MAX:
            self._due.set()

    async def run(self) -> None:
        """Until cancelled: compact when due, read the size at every interval."""
        while True:
            try:
                await self.look()
            except (EtcdRefused, EtcdSilent):
                self._failures += 1
                await asyncio.sleep(1.0)  # due work waits for no event: never spin
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Read the size, compact where due. Raises what the calls raise."""
        status = await self._client.call("maintenance", "Status", rpc.StatusRequest())
        self._file_bytes, self._used_bytes = int(status.dbSize), int(status.dbSizeInUse)
        if self._due.is_set():
            await self._compact(int(status.header.revision))

    def statistics(self) -> Mapping[str, float]:
        """Sizes in bytes, shares from 0 to 1, as of the last look."""
        used = self._file_bytes / self._quota_bytes
        return {
            "file_bytes": float(self._file_bytes),
            "used_bytes": float(self._used_bytes),
            "quota_used": used,
            "quota_alarm": float(used >= QUOTA_ALARM_SHARE),
            "compactions": float(self._compactions),
            "upkeep_failed": float(self._failures),
        }

    async def _compact(self, revision: int) -> None:
        """Forget all versions older than the last few revisions."""
        self._due.clear()
        self._commits = self._bytes = 0
        if revision > _REVISIONS_KEPT:
            await self._client.call("kv", "Compact", rpc.CompactionRequest(revision=revision - _REVISIONS_KEPT))
            self._compactions += 1
