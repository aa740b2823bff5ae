"""The control protocol of fal-proxy: length-prefixed msgpack maps over a unix socket.

The caller sends `hello` with the versions it speaks; the proxy answers `welcome`. Then requests `{"t": kind, "id": n,
…}`, each answered by `{"t": "ok" | "error", "id": n, …}`, and `{"t": "stats", …}` pushed whenever something changed.
Unknown keys are ignored, so that a newer side may add some; unknown kinds are answered with an error.

Used by `control` (the agent's side), `control_server` and `handover`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgpack

from fal_agent.proxy.tally import Tally
from fal_contract.errors import Code, FalError, invalid
from fal_contract.revocation import RevokedPeer

CONTROL_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 4 << 20
_LENGTH: Final = struct.Struct(">I")
_VALUE_CHARS_MAX: Final = 80

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunnerEntry:
    """A runner that the proxy may send requests to."""

    runner_id: str  # team/name
    socket_path: str  # of the worker, on the host
    max_multiplexing: int  # requests at once
    request_timeout_s: float
    cgroup: str = ""  # last component of the worker's cgroup, SCOPE.ID; empty: not checked
    pid: int = 0  # the worker is this process or a descendant; 0: not checked
    draining: bool = False  # finishes what it has, takes nothing new
    port: int = 0  # its server listens on this port of loopback; 0: on the socket
    pid_ticks: int = 0  # when `pid` began: the port is in that process's network namespace; `pid` 0: on the node's own


@dataclass(frozen=True, slots=True)
class GatewayEntry:
    """A gateway that wants tunnels."""

    gateway_id: str  # the name in its certificate
    endpoints: tuple[tuple[str, int], ...]  # host, port; tried in order


def revoked_to_wire(peer: RevokedPeer) -> list[object]:
    return [peer.serial, peer.subject, peer.revoked_at_s]


def revoked_from_wire(raw: object) -> RevokedPeer:
    match raw:
        case [str(serial), str(subject), float() | int() as revoked_at_s]:
            return RevokedPeer(serial, subject, float(revoked_at_s))
    raise invalid("revoked", str(raw)[:_VALUE_CHARS_MAX], "is no revocation", remedy="Give [serial, subject, time].")


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """What became of one runner's requests since the proxy's `instance` began."""

    runner_id: str
    max_multiplexing: int
    draining: bool
    in_flight: int
    served: int
    failed: int
    cancelled: int
    last_used_age_s: float  # since the last request ended; -1: none yet
    busy_s: float = 0.0  # with a request under way; a proxy of the first release does not tell it


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """All runners, and the gateways to which a tunnel stands."""

    instance: str  # counters start again when it changes; a hand-over keeps it
    connections: int
    runners: tuple[RunnerStats, ...]
    tunnels: tuple[str, ...]
    tally: Tally = field(default_factory=Tally)  # of this process


@dataclass(frozen=True, slots=True)
class ProxyInfo:
    """The proxy's answer to hello."""

    version: int
    software: str
    pid: int
    instance: str
    node_id: str
    listen: tuple[tuple[str, int], ...]  # host, port


def encode(message: Mapping[str, object]) -> bytes:
    """One frame."""
    body = msgpack.packb(message, use_bin_type=True)
    if len(body) > FRAME_BYTES_MAX:
        raise FalError(
            Code.INVALID, f"a control message of {len(body)} bytes is too long", remedy="Send it in smaller parts."
        )
    return _LENGTH.pack(len(body)) + bytes(body)


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message. Raises IncompleteReadError at the end and FalError(INVALID) for what is no message."""
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > FRAME_BYTES_MAX:
        raise FalError(
            Code.INVALID, f"a control message of {size} bytes is too long", remedy="The peer is no fal process."
        )
    return decode(await reader.readexactly(size))


def decode(body: bytes) -> dict[str, Any]:
    """The map in a frame's body."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as exc:
        raise FalError(
            Code.INVALID, f"a control message is not msgpack: {exc}", remedy="The peer is no fal process."
        ) from None
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise FalError(Code.INVALID, "a control message has no kind", remedy="The peer is no fal process.")
    return message


def runner_to_wire(entry: RunnerEntry) -> dict[str, object]:
    return {
        "runner": entry.runner_id,
        "socket": entry.socket_path,
        "slots": entry.max_multiplexing,
        "timeout_s": entry.request_timeout_s,
        "cgroup": entry.cgroup,
        "pid": entry.pid,
        "draining": entry.draining,
        "port": entry.port,
        "pid_ticks": entry.pid_ticks,
    }


def runner_from_wire(raw: Mapping[str, Any]) -> RunnerEntry:
    entry = RunnerEntry(
        runner_id=take(raw, "runner", str),
        socket_path=take(raw, "socket", str),
        max_multiplexing=take(raw, "slots", int),
        request_timeout_s=float(take(raw, "timeout_s", (int, float))),
        cgroup=take(raw, "cgroup", str, default=""),
        pid=take(raw, "pid", int, default=0),
        draining=take(raw, "draining", bool, default=False),
        port=take(raw, "port", int, default=0),
        pid_ticks=take(raw, "pid_ticks", int, default=0),
    )
    if entry.max_multiplexing < 1:
        raise invalid("slots", entry.max_multiplexing, "is less than 1", remedy="A runner takes at least one request.")
    if not 0 <= entry.port <= 65535:
        raise invalid("port", entry.port, "is no port", remedy="Give 1 to 65535, or 0 for a socket.")
    if not entry.request_timeout_s > 0:
        raise invalid("timeout_s", entry.request_timeout_s, "is not positive", remedy="Give seconds.")
    if "/" not in entry.runner_id:
        raise invalid("runner", entry.runner_id, "has no team", remedy="Write team/name.")
    return entry


def gateway_to_wire(entry: GatewayEntry) -> dict[str, object]:
    return {"gateway": entry.gateway_id, "endpoints": [list(endpoint) for endpoint in entry.endpoints]}


def gateway_from_wire(raw: Mapping[str, Any]) -> GatewayEntry:
    endpoints = take(raw, "endpoints", list)
    if not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)
        for pair in endpoints
    ):
        raise invalid(
            "endpoints", str(endpoints)[:_VALUE_CHARS_MAX], "are not pairs", remedy="Give [host, port] pairs."
        )
    return GatewayEntry(take(raw, "gateway", str), tuple((host, port) for host, port in endpoints))


def stats_to_wire(stats: ProxyStats) -> dict[str, object]:
    """The pushed form; also the answer to a `stats` request."""
    return {
        "instance": stats.instance,
        "connections": stats.connections,
        "tunnels": list(stats.tunnels),
        "tally": stats.tally.to_wire(),
        "runners": [
            [r.runner_id, r.max_multiplexing, r.draining, r.in_flight, r.served, r.failed, r.cancelled,
             r.last_used_age_s, r.busy_s]
            for r in stats.runners
        ],
    }  # fmt: skip


def stats_from_wire(raw: Mapping[str, Any]) -> ProxyStats:
    return ProxyStats(
        instance=take(raw, "instance", str),
        connections=take(raw, "connections", int),
        runners=tuple(RunnerStats(*row) for row in take(raw, "runners", list)),
        tunnels=tuple(take(raw, "tunnels", list)),
        tally=Tally.from_wire(take(raw, "tally", dict, default={})),
    )


def info_to_wire(info: ProxyInfo) -> dict[str, object]:
    return {
        "t": "welcome",
        "version": info.version,
        "software": info.software,
        "pid": info.pid,
        "instance": info.instance,
        "node": info.node_id,
        "listen": [list(address) for address in info.listen],
    }


def info_from_wire(raw: Mapping[str, Any]) -> ProxyInfo:
    return ProxyInfo(
        version=take(raw, "version", int),
        software=take(raw, "software", str),
        pid=take(raw, "pid", int),
        instance=take(raw, "instance", str),
        node_id=take(raw, "node", str),
        listen=tuple((str(host), int(port)) for host, port in take(raw, "listen", list)),
    )


def error_to_wire(error: FalError, request_id: int) -> dict[str, object]:
    return {
        "t": "error",
        "id": request_id,
        "code": error.code.value,
        "what": error.what,
        "remedy": error.remedy,
        "field": error.field,
    }


def error_from_wire(raw: Mapping[str, Any]) -> FalError:
    try:
        code = Code(str(raw.get("code")))
    except ValueError:
        code = Code.INTERNAL
    return FalError(code, str(raw.get("what", "")), remedy=str(raw.get("remedy", "")), field=str(raw.get("field", "")))


def take(raw: Mapping[str, Any], key: str, kind: type[T] | tuple[type[T], ...], *, default: T | None = None) -> T:
    """`raw[key]` when it is of `kind`, else FalError(INVALID). A missing key is `default`, when there is one."""
    value = raw.get(key, default)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(each.__name__ for each in kinds)
        raise invalid(key, str(value)[:_VALUE_CHARS_MAX], f"is not {names}", remedy="The peer speaks another version.")
    return value
