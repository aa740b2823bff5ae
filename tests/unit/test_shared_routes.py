"""A shared runner on its way to a request: the route table, the client's table, the proxy's head for the worker."""

from __future__ import annotations

from fal_agent.proxy.routing import RunnerRequest, head_for_worker, refused_by_worker, route
from fal_contract.dispatch_table import DispatchTable, LeaseEntry, RouteEntry, Slot
from fal_contract.http1 import BodyKind, Framing, RequestHead, ResponseHead

FRAMING = Framing(BodyKind.NONE)
A, B = "default/a", "default/b"


def entry(*shared: tuple[str, str]) -> RouteEntry:
    return RouteEntry("default/r", shared[0][0] if shared else A, "n", (), True, 2, 60.0, shared=shared)


def test_every_app_finds_the_runner_and_names_its_model() -> None:
    table = DispatchTable()
    table.put_routes([entry((A, "default/ma"), (B, "default/mb"))], (), complete=True, term=1)
    slots = [table.take(app, 0.0, leaderless=True) for app in (A, B)]
    assert [table.headers_for(slot) for slot in slots if slot] == [
        [("fal-model", "default/ma")],
        [("fal-model", "default/mb")],
    ]
    table.put_routes([entry((B, "default/mb"))], (), complete=False, term=1)  # its first app gave its place up
    assert table.take(A, 0.0, leaderless=True) is None
    table.put_routes([], ["default/r"], complete=False, term=1)
    assert table.take(B, 0.0, leaderless=True) is None


def test_a_runner_of_one_app_needs_no_name() -> None:
    table = DispatchTable()
    table.put_routes([entry()], (), complete=True, term=1)
    table.put_leases([LeaseEntry("l", "default/r", "n", A, 1, 1, 30.0)], (), 0.0)
    slot = table.take(A, 0.0, leaderless=False)
    assert slot == Slot("default/r", "n", A, "l", 1)
    assert table.headers_for(slot) == []


def test_only_the_gateways_word_reaches_the_worker() -> None:
    headers = (
        (b"fal-ticket", b"term=1;lease=l"),
        (b"fal-model", b"default/ma"),
        (b"x-fal-model", b"rivals/secret"),
        (b"x-fal-control", b"1"),
    )
    asked = RequestHead(b"POST", b"/v1/runners/default/r/infer", headers, FRAMING)
    found = route(asked)
    assert isinstance(found, RunnerRequest)
    lines = head_for_worker(asked, found, b"id").split(b"\r\n")
    assert b"x-fal-model: default/ma" in lines
    assert not [line for line in lines if b"rivals" in line or b"control" in line]


def test_a_worker_without_the_model_has_not_run_the_request() -> None:
    not_run = ((b"x-fal-not-run", b"BUSY"),)
    assert refused_by_worker(ResponseHead(409, b"Conflict", not_run, FRAMING))
    assert not refused_by_worker(ResponseHead(409, b"Conflict", (), FRAMING)), "what the client itself asked for"
