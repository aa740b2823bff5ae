"""Between the messages of serving.proto and the plain values of `dispatch_table`. Pure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Final

from fal_contract.datapath import NOT_RUN, Address
from fal_contract.dispatch_table import LeaseEntry, RouteEntry, Slot, Update
from fal_contract.errors import Code, FalError
from fal_contract.node_paths import NodePath
from fal_contract.v1 import agent_pb2, serving_pb2, state_pb2

WIRE_VERSION: Final = 1
_OPEN: Final = frozenset({state_pb2.RUNNER_STATE_IDLE, state_pb2.RUNNER_STATE_RUNNING, state_pb2.RUNNER_STATE_UNKNOWN})


def hello(
    gateway_id: str, software: str, tunnels: Iterable[Address], held: Iterable[LeaseEntry], apps: Iterable[str]
) -> serving_pb2.GatewayMessage:
    return serving_pb2.GatewayMessage(
        hello=serving_pb2.GatewayHello(
            versions=agent_pb2.Versions(min=WIRE_VERSION, max=WIRE_VERSION, software=software),
            gateway_id=gateway_id,
            tunnel_endpoints=[agent_pb2.Endpoint(host=address.host, port=address.port) for address in tunnels],
            held=[
                serving_pb2.HeldLease(
                    lease_id=entry.lease_id, runner_id=entry.runner_id, slots=entry.slots, term=entry.term
                )
                for entry in held
            ],
            apps=apps,
        )
    )


def updates(items: Iterable[Update]) -> serving_pb2.GatewayMessage:
    return serving_pb2.GatewayMessage(
        updates=serving_pb2.LeaseUpdates(
            updates=[
                serving_pb2.LeaseUpdate(
                    lease_id=one.lease_id,
                    returned=one.returned,
                    renew=one.renew,
                    served=one.served,
                    failed=one.failed,
                )
                for one in items
            ]
        )
    )


def reached(items: Iterable[NodePath]) -> serving_pb2.GatewayMessage:
    return serving_pb2.GatewayMessage(
        reached=serving_pb2.Reachability(
            nodes=[
                serving_pb2.Reach(node_id=one.node_id, path=one.path, reason=one.reason, wants_tunnel=one.wants_tunnel)
                for one in items
            ]
        )
    )


def routes(message: serving_pb2.Routes) -> list[RouteEntry]:
    return [
        RouteEntry(
            runner_id=route.runner_id,
            app=route.app,
            node_id=route.node_id,
            addresses=tuple(Address(endpoint.host, endpoint.port) for endpoint in route.endpoints),
            open=route.state in _OPEN,
            max_multiplexing=max(1, route.max_multiplexing),
            request_timeout_s=route.request_timeout_s,
            any_path=route.any_path,
            shared=tuple((one.app, one.model) for one in route.shared),
        )
        for route in message.routes
    ]


def leases(message: serving_pb2.Leases) -> list[LeaseEntry]:
    return [
        LeaseEntry(
            lease_id=lease.lease_id,
            runner_id=lease.runner_id,
            node_id=lease.node_id,
            app=lease.app,
            slots=lease.slots,
            term=lease.term,
            ttl_s=lease.ttl_s,
        )
        for lease in message.leases
    ]


def refusal(message: serving_pb2.Refusal) -> FalError:
    try:
        code = Code(message.code)
    except ValueError:
        code = Code.UNAVAILABLE  # of a newer scheduler
    return FalError(code, message.what, remedy=message.remedy)


def proxy_refusal(slot: Slot, status: int, raw_code: bytes, body: bytes) -> FalError:
    """What the proxy said instead of passing on an answer of the worker."""
    raw = raw_code.decode("ascii", "replace")
    code = Code(raw) if raw in set(Code) else Code.INTERNAL
    what = f"the proxy answered {status} {raw}"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        what = str(json.loads(body)["error"]["what"])
    remedy = "Try again." if code in NOT_RUN else "It may have run; send it again if that does no harm."
    return FalError(code, f"request to runner {slot.runner_id}: {what}", remedy=remedy)
