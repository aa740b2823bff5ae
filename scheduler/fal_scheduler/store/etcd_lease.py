"""Keeps the leader's lease alive, on a thread and a connection of its own: a busy event loop deposes nobody.

Invariants: the lease is trusted for one ttl from when the last renewal that was answered was *sent*, so that we know of
its end before etcd does; a process whose event loop shows no life for LOOP_STALL_MAX_S renews no longer, because a
leader that decides nothing must be replaced. A stopped process (SIGSTOP, a frozen machine) renews nothing either.

Called by the etcd store, which is told of the end on its loop. Must not decide who leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
from aetcd import rpc

from fal_contract.clock import SystemClock
from fal_scheduler.store.etcd_client import CHANNEL_OPTIONS, EtcdTls, credentials_of

LOOP_STALL_MAX_S: Final = 30.0
_PER_TTL: Final = 5  # renewals
_BEAT_S: Final = 0.5
_JOIN_S: Final = 10.0
_CLOCK: Final = SystemClock()


def now_s() -> float:
    """What the keeper's times are of: monotonic seconds. A loop's own clock stands still while it is busy."""
    return _CLOCK.monotonic_s()


class LeaseKeeper:
    """Renews `lease` and looks whether `leader_key` is still of revision `token`; `on_end` is called on the loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        tls: EtcdTls | None,
        *,
        lease: int,
        ttl_s: float,
        begun_s: float,
        leader_key: bytes,
        token: int,
        on_end: Callable[[], None],
    ) -> None:
        """`begun_s`: by `now_s()`, before the lease was asked for."""
        self._addresses = tuple(addresses)
        self._tls = tls
        self._lease = lease
        self._ttl_s = ttl_s
        self._leader_key = leader_key
        self._token = token
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._trusted_until_s = begun_s + ttl_s
        self._loop_seen_s = now_s()
        self._channel: Any = None
        self._at = 0
        self._beat: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._run, name="etcd-lease", daemon=True)
        self.renewals = 0

    def start(self) -> None:
        """On the loop."""
        self._pulse()
        self._thread.start()

    @property
    def trusted(self) -> bool:
        """Whether the lease cannot have ended yet."""
        return now_s() < self._trusted_until_s

    def stop(self) -> None:
        """Renew no longer; returns at once."""
        self._stop.set()
        if self._beat is not None:
            self._beat.cancel()

    async def join(self) -> None:
        """After `stop`: until the thread has ended, which a call to etcd may delay by a part of a ttl."""
        await asyncio.to_thread(self._thread.join, _JOIN_S)

    def _pulse(self) -> None:
        """The loop lives."""
        self._loop_seen_s = now_s()
        self._beat = self._loop.call_later(_BEAT_S, self._pulse)

    # On the thread.

    def _run(self) -> None:
        try:
            self._keep()
        finally:
            self._close()
            if not self._stop.is_set():
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                    self._loop.call_soon_threadsafe(self._on_end)

    def _keep(self) -> None:
        pause_s = self._ttl_s / _PER_TTL
        while (left_s := self._trusted_until_s - now_s()) > 0.0:
            if self._stop.wait(min(pause_s, left_s)):
                return
            sent_s = now_s()
            if sent_s >= self._trusted_until_s or sent_s - self._loop_seen_s > LOOP_STALL_MAX_S:
                return
            try:
                if not self._renew(min(self._ttl_s / 3, self._trusted_until_s - sent_s)):
                    return
            except (grpc.RpcError, grpc.FutureTimeoutError, StopIteration):
                self._close()
                self._at += 1  # the next member
                pause_s = self._ttl_s / (4 * _PER_TTL)
                continue
            self._trusted_until_s = sent_s + self._ttl_s
            self.renewals += 1
            pause_s = self._ttl_s / _PER_TTL

    def _renew(self, timeout_s: float) -> bool:
        """One renewal; False where the lease or the leadership is gone. Raises grpc.RpcError."""
        channel = self._connected()
        answers: Iterator[Any] = rpc.LeaseStub(channel).LeaseKeepAlive(
            iter([rpc.LeaseKeepAliveRequest(ID=self._lease)]), timeout=timeout_s
        )
        if int(next(answers).TTL) <= 0:
            return False
        found = rpc.KVStub(channel).Range(rpc.RangeRequest(key=self._leader_key), timeout=timeout_s)
        return bool(found.kvs) and int(found.kvs[0].create_revision) == self._token

    def _connected(self) -> Any:
        if self._channel is None:
            address = self._addresses[self._at % len(self._addresses)]
            if self._tls is None:
                self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                self._channel = grpc.secure_channel(address, credentials_of(self._tls), options=CHANNEL_OPTIONS)
        return self._channel

    def _close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


__all__ = ["LOOP_STALL_MAX_S", "LeaseKeeper", "now_s"]
