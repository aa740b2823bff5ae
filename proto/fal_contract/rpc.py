"""gRPC as every process here uses it: options, credentials, errors, standard services.

The one place where a `FalError` becomes a gRPC status (plus `fal-error-bin` trailing metadata) and back. The guard
that checks roles on the server side is `fal_contract.rpc_guard`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fal_contract.errors import GRPC_STATUS, Code, FalError
from fal_contract.identity import Identity, Role, dns_name_of
from fal_contract.limits import KEEPALIVE_TIME_S, KEEPALIVE_TIMEOUT_S, MESSAGE_BYTES_MAX
from fal_contract.v1 import errors_pb2

ERROR_KEY: Final = "fal-error-bin"
# A client's header block may hold 8 KiB by default; an error must not be lost for being long.
_WHAT_CHARS_MAX: Final = 1024
_REMEDY_CHARS_MAX: Final = 512
_FIELD_CHARS_MAX: Final = 128
_DETAILS_CHARS_MAX: Final = 200
_LEADER_ADDRESSES_MAX: Final = 8
_LEADER_CHARS_MAX: Final = 128

_COMMON_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: idle sessions must stay open through NAT
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
CHANNEL_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    # Reconnecting is the caller's: it re-dials with its own jitter, so the channel must not sit in a long backoff.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5000),  # also how long one attempt to connect lasts; the default is 20 s
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    # Clients ping every 30 s; without these the server answers GOAWAY too_many_pings to idle sessions.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
)

_CODE_OF_STATUS: Final[dict[grpc.StatusCode, Code]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Code.INVALID,
    grpc.StatusCode.NOT_FOUND: Code.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: Code.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED: Code.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: Code.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Code.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Code.BUSY,
    grpc.StatusCode.UNAVAILABLE: Code.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Code.TIMEOUT,
    grpc.StatusCode.CANCELLED: Code.CANCELLED,
    grpc.StatusCode.DATA_LOSS: Code.CORRUPT,
    grpc.StatusCode.UNIMPLEMENTED: Code.VERSION_MISMATCH,
}
_REMEDY_OF_CODE: Final[dict[Code, str]] = {
    Code.UNAVAILABLE: "Check that the scheduler runs and that its address is right; then try again.",
    Code.TIMEOUT: "Try again; if it stays, check the scheduler's log and load.",
    Code.VERSION_MISMATCH: "The server does not know this call; bring both sides to neighbouring releases.",
    Code.UNAUTHENTICATED: "Check the certificate; renew it or join again.",
    Code.BUSY: "Try again later.",
}
# What gRPC says when it does not believe a server; it has no status of its own for that.
_TLS_REFUSALS: Final = (
    ("certificate has expired", "the server's certificate has expired by this machine's clock"),
    ("certificate is not yet valid", "the server's certificate is not valid yet by this machine's clock"),
    ("Hostname Verification Check failed", "the server has a certificate, but not that of our cluster's control plane"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not of our cluster"),
)


def channel(address: str, identity: Identity, *, server: Role = Role.SCHEDULER) -> grpc.aio.Channel:
    """A channel to `address` (host:port) that believes only a server of our cluster with the role `server`.

    Opens lazily. Our certificate's dates are not checked here; call `identity.check(now_s=…)` first for a clear error.
    """
    expected = dns_name_of(identity.peer.cluster_id, server)
    return grpc.aio.secure_channel(
        address,
        channel_credentials(identity),
        options=[*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", expected)],
    )


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Ours to show, this cluster's CA alone to trust."""
    return grpc.ssl_channel_credentials(
        root_certificates=identity.ca_pem, private_key=identity.key_pem, certificate_chain=identity.cert_pem
    )


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Every client must show a certificate of this cluster."""
    return grpc.ssl_server_credentials(
        [(identity.key_pem, identity.cert_pem)], root_certificates=identity.ca_pem, require_client_auth=True
    )


def renewing_server_credentials(current: Callable[[], Identity]) -> grpc.ServerCredentials:
    """As `server_credentials`, asking `current` at each handshake, so that renewal needs no restart.

    `current` is called on a gRPC thread: it returns a stored value and does nothing else.
    """
    used = current()

    def configuration(identity: Identity) -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(identity.key_pem, identity.cert_pem)], root_certificates=identity.ca_pem
        )

    def fetch() -> Any:
        nonlocal used
        latest = current()
        if latest is used:
            return None  # keep what is there
        used = latest
        return configuration(latest)

    return grpc.dynamic_ssl_server_credentials(configuration(used), fetch, require_client_authentication=True)


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Add a TLS port; returns its number (useful with port 0). Raises FalError(UNAVAILABLE) when it is taken."""
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise FalError(
            Code.UNAVAILABLE,
            f"cannot listen on {address}",
            remedy="Stop what uses the port (`ss -ltnp` names it), or choose another address.",
        )
    return port


class HealthService(Protocol):
    """The part of the standard health servicer that we use."""

    def set(self, service: str, status: int) -> Awaitable[None]: ...


async def add_standard_services(server: grpc.aio.Server, services: Sequence[str]) -> HealthService:
    """Add gRPC health (all SERVING) and reflection for the full names in `services`, as every server of ours does."""
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", *services):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    result: HealthService = servicer
    return result


def methods_of(service: Any) -> frozenset[str]:
    """Full method names (`/fal.v1.Cluster/GetStatus`) of a service descriptor."""
    return frozenset(f"/{service.full_name}/{method.name}" for method in service.methods)


def status_of(error: FalError) -> grpc.StatusCode:
    """The gRPC status under which an error travels."""
    return grpc.StatusCode[GRPC_STATUS[error.code]]


def error_metadata(error: FalError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that carries the whole error."""
    detail = errors_pb2.ErrorDetail(
        code=str(error.code),
        what=_cut(error.what, _WHAT_CHARS_MAX),
        remedy=_cut(error.remedy, _REMEDY_CHARS_MAX),
        field=_cut(error.field, _FIELD_CHARS_MAX),
        retryable=error.retryable,
        leader=[address for address in error.leader if len(address) <= _LEADER_CHARS_MAX][:_LEADER_ADDRESSES_MAX],
    )
    return ((ERROR_KEY, detail.SerializeToString()),)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: FalError) -> NoReturn:
    """End the call with `error`."""
    await context.abort(status_of(error), _cut(str(error), _DETAILS_CHARS_MAX), error_metadata(error))
    raise AssertionError("abort returned")


def to_fal_error(error: grpc.aio.AioRpcError) -> FalError:
    """What the server said; for failures that gRPC made itself, the nearest code with a remedy."""
    trailing: Any = error.trailing_metadata() or ()  # its type in the stubs is that of one item
    for key, value in trailing:
        if key == ERROR_KEY and isinstance(value, bytes):
            carried = _from_detail(value)
            if carried is not None:
                return carried
    said = error.details() or error.code().name
    for sign, what in _TLS_REFUSALS:
        if sign in said:
            return FalError(
                Code.UNAUTHENTICATED,
                what,
                remedy="Check the address, and both clocks; use an identity of that cluster, or join it with a token.",
            )
    code = _CODE_OF_STATUS.get(error.code(), Code.INTERNAL)
    what = f"the call failed: {_cut(said, _WHAT_CHARS_MAX)}"
    return FalError(code, what, remedy=_REMEDY_OF_CODE.get(code, "See the server's log."))


@contextmanager
def fal_errors() -> Iterator[None]:
    """Around client calls: `AioRpcError` leaves as the `FalError` that the server raised."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise to_fal_error(exc) from exc


def _from_detail(raw: bytes) -> FalError | None:
    detail = errors_pb2.ErrorDetail()
    try:
        detail.ParseFromString(raw)
        code = Code(detail.code)
    except Exception:  # DecodeError, or a code of a later release: fall back to the status
        return None
    leader = tuple(detail.leader[:_LEADER_ADDRESSES_MAX])
    return FalError(code, detail.what, remedy=detail.remedy, field=detail.field, leader=leader)


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"
