"""etcd's RPCs with our errors, deadlines, several endpoints and TLS. Called by the etcd store only.

From `aetcd` only the generated stubs (`aetcd.rpc`) are used. Its `Client` (1.0.0) is not, for what its source shows:
one endpoint and no TLS (`rpc.insecure_channel`); ranges without limit or revision, so no consistent paging; no response
header from transactions; `watch_id` and `fragment` ignored; a watch refused for compaction waits for ever where no
timeout was given; after a watch stream that ended cleanly no other is started (`_handle_request` returns, `setup` still
sees a handler); every refused attempt at a lock leaves its lease behind; RESOURCE_EXHAUSTED and CANCELLED become one
class of error, so that "did not happen" and "may have happened" cannot be told apart.

One channel per endpoint; a failed or late answer moves on to the next endpoint for the calls that follow. Nothing is
sent twice here: the caller knows what may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from aetcd import rpc

from fal_contract.errors import Code, FalError, invalid

_RECEIVE_BYTES_MAX: Final = 64 << 20
_CONNECT_TIMEOUT_S: Final = 2.0
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _RECEIVE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # the default of two minutes outlives any lease
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses pings more often than every 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
)
_REMEDY: Final = "Check that etcd runs and has a leader (`etcdctl endpoint status`), and the endpoints and TLS files."
_DID_NOT_HAPPEN: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM files: the CA that signed the servers, and our certificate and key where the servers ask for one."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None


class EtcdRefused(Exception):
    """etcd answered that it did not do it. `status` is gRPC's, `detail` etcd's own words."""

    def __init__(self, status: grpc.StatusCode, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class EtcdSilent(Exception):
    """No or no clear answer: a request that was sent may have been done. `sent` is False where it surely was not."""

    def __init__(self, detail: str, *, sent: bool) -> None:
        super().__init__(detail)
        self.detail, self.sent = detail, sent


@dataclass(slots=True)
class _Endpoint:
    """One member's channel and stubs."""

    address: str
    channel: grpc.aio.Channel
    stubs: Mapping[str, Any]


class EtcdClient:
    """Calls to one etcd cluster. Belongs to one event loop."""

    def __init__(self, endpoints: Sequence[str], *, tls: EtcdTls | None, timeout_s: float) -> None:
        """`endpoints`: "host:port" each; `timeout_s` bounds every call that does not say otherwise."""
        self._addresses = [_check_endpoint(address) for address in endpoints]
        if not self._addresses:
            raise invalid("endpoints", endpoints, "names no etcd member", remedy="Give at least one host:port.")
        self._tls = tls
        self.timeout_s = timeout_s
        self._endpoints: dict[str, _Endpoint] = {}
        self._current = 0
        self.reconnects = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of the members."""
        return tuple(self._addresses)

    @property
    def tls(self) -> EtcdTls | None:
        """How members are reached; None: in the clear."""
        return self._tls

    async def close(self) -> None:
        """Close all channels; calls in flight fail."""
        endpoints, self._endpoints = self._endpoints, {}
        for endpoint in endpoints.values():
            await endpoint.channel.close(None)

    async def call(self, service: str, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """One unary call. Raises EtcdRefused or EtcdSilent."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        endpoint = await self._connected(timeout_s)
        try:
            return await getattr(endpoint.stubs[service], method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error

    async def txn(self, compare: list[Any], success: list[Any], failure: list[Any]) -> Any:
        """A transaction; the raw response, whose header carries the revision."""
        return await self.call("kv", "Txn", rpc.TxnRequest(compare=compare, success=success, failure=failure))

    async def get(self, key: bytes) -> tuple[Any | None, int]:
        """The key (None where absent) and etcd's revision as of the read; linearizable."""
        response = await self.call("kv", "Range", rpc.RangeRequest(key=key))
        return (response.kvs[0] if response.kvs else None), int(response.header.revision)

    async def keep_alive(self, lease: int, *, timeout_s: float) -> bool:
        """Renew a lease by one ttl; False where etcd knows it no longer."""
        endpoint = await self._connected(timeout_s)
        call = endpoint.stubs["lease"].LeaseKeepAlive(timeout=timeout_s)
        try:
            await call.write(rpc.LeaseKeepAliveRequest(ID=lease))
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error
        except asyncio.InvalidStateError as error:  # the stream ended while it was written to
            raise EtcdSilent(str(error), sent=True) from error
        finally:
            call.cancel()
        return bool(answer) and int(answer.TTL) > 0  # the end of the stream is false

    async def wait_for_delete(self, key: bytes, *, since: int, timeout_s: float) -> bool:
        """Wait until `key` is deleted at or after revision `since`; False where watching ended for another reason."""
        endpoint = await self._connected(timeout_s)
        call = endpoint.stubs["watch"].Watch(timeout=timeout_s)
        create = rpc.WatchCreateRequest(
            key=key, start_revision=since, filters=[rpc.WatchCreateRequest.FilterType.Value("NOPUT")]
        )
        try:
            await call.write(rpc.WatchRequest(create_request=create))
            while response := await call.read():  # the end of the stream is false
                if response.canceled or response.events:
                    return bool(response.events)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the caller looks again in any case
        finally:
            call.cancel()
        return False

    async def _connected(self, timeout_s: float) -> _Endpoint:
        """An endpoint whose connection stands, the current one first; EtcdSilent(sent=False) where none does."""
        tried: list[str] = []
        share_s = min(_CONNECT_TIMEOUT_S, timeout_s / len(self._addresses))
        for _ in self._addresses:
            endpoint = self._endpoint()
            try:
                async with asyncio.timeout(share_s):
                    if await _reached(endpoint.channel, patient=len(self._addresses) == 1):
                        return endpoint
            except (TimeoutError, grpc.aio.UsageError):  # the latter: it was closed meanwhile
                pass
            tried.append(endpoint.address)
            self._next_endpoint()
        raise EtcdSilent(f"no connection to {', '.join(tried)} within {share_s:g} s each", sent=False)

    def _endpoint(self) -> _Endpoint:
        address = self._addresses[self._current]
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            channel = self._open_channel(address)
            stubs = {
                "kv": rpc.KVStub(channel),
                "lease": rpc.LeaseStub(channel),
                "watch": rpc.WatchStub(channel),
                "maintenance": rpc.MaintenanceStub(channel),
            }
            endpoint = self._endpoints[address] = _Endpoint(address, channel, stubs)
        return endpoint

    def _open_channel(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, credentials_of(self._tls), options=CHANNEL_OPTIONS)

    def _next_endpoint(self) -> None:
        self._current = (self._current + 1) % len(self._addresses)
        self.reconnects += 1

    def _translate(self, error: grpc.aio.AioRpcError) -> EtcdRefused | EtcdSilent:
        detail = error.details() or error.code().name
        if error.code() in _DID_NOT_HAPPEN:
            return EtcdRefused(error.code(), detail)
        self._next_endpoint()
        return EtcdSilent(f"{error.code().name}: {detail}", sent=True)


def credentials_of(tls: EtcdTls) -> grpc.ChannelCredentials:
    """The files, read now. Raises INVALID."""
    try:
        return grpc.ssl_channel_credentials(
            root_certificates=tls.ca.read_bytes(),
            private_key=tls.key.read_bytes() if tls.key is not None else None,
            certificate_chain=tls.cert.read_bytes() if tls.cert is not None else None,
        )
    except OSError as error:
        raise FalError(
            Code.INVALID,
            f"etcd's TLS file {error.filename} cannot be read: {error.strerror}",
            remedy="Name readable PEM files for ca, cert and key.",
            field="tls",
        ) from error


def unavailable(error: EtcdRefused | EtcdSilent) -> FalError:
    """The error of a read or an election that etcd did not serve: nothing of ours changed."""
    code = Code.UNAVAILABLE if isinstance(error, EtcdSilent) else Code.STORE_FAILED
    return FalError(code, f"etcd did not answer: {error.detail}", remedy=_REMEDY)


def commit_failed(error: EtcdRefused | EtcdSilent) -> FalError:
    """The error of a commit: STORE_UNKNOWN exactly where it was sent and no answer says that it did not happen."""
    if isinstance(error, EtcdSilent) and error.sent:
        return FalError(
            Code.STORE_UNKNOWN,
            f"etcd's answer to a commit was lost ({error.detail})",
            remedy="The scheduler stops leading and loads the records again. " + _REMEDY,
        )
    if isinstance(error, EtcdRefused) and "space exceeded" in error.detail:
        return FalError(
            Code.STORE_FAILED,
            "etcd's database has reached its quota",
            remedy="Run `etcdctl defrag`, then `etcdctl alarm disarm`; raise --quota-backend-bytes if it comes back.",
        )
    return FalError(Code.STORE_FAILED, f"etcd refused a commit: {error.detail}", remedy=_REMEDY)


async def _reached(channel: grpc.aio.Channel, *, patient: bool) -> bool:
    """Wait until the connection stands; where there are other endpoints to try, not beyond the first failure."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)
        if not patient and channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            return False
    return True


def _check_endpoint(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise invalid("endpoints", address, "is not host:port", remedy="Write it like 10.0.0.5:2379, without a scheme.")
    return address
