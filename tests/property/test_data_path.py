"""Properties of the data path's pure parts: HTTP parsing against h11, bodies in pieces, slots, control frames."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fal_agent.proxy import messages, routing
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.slots import Outcome, Refused, SlotTable
from fal_contract.datapath import Address
from fal_contract.dispatch_table import DispatchTable, LeaseEntry, RouteEntry, Slot
from fal_contract.errors import FalError
from fal_contract.http1 import (
    BodyKind,
    BodyScanner,
    Framing,
    HttpError,
    head_end,
    parse_request_head,
    parse_response_head,
)
from fal_contract.tunnel_wire import read_greeting, tunnel_greeting

# Pieces that heads are made of, so that random heads come near the legal ones.
PIECES = st.sampled_from(
    [
        b"GET", b"POST", b" ", b"/v1/runners/default/a-1/x", b"/", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r",
        b"host: a", b"Content-Length: 3", b"content-length:3", b"content-length: +3", b"Transfer-Encoding: chunked",
        b"transfer-encoding: gzip", b"fal-ticket: term=1;lease=a", b": ", b"a b: c", b"x:\x00", b" folded", b"\xff",
        b"connection: close", b"expect: 100-continue",
    ]
)  # fmt: skip
HEADS = st.lists(PIECES, max_size=14).map(b"".join) | st.binary(max_size=200)
LEGAL_HEADS = st.lists(
    st.sampled_from(
        [
            b"host: a",
            b"content-length: 3",
            b"transfer-encoding: chunked",
            b"x: y",
            b"X-Long: a b\tc",
            b"connection: close",
        ]
    ),
    max_size=5,
).map(lambda lines: b"\r\n".join([b"POST /a?b HTTP/1.1", *lines]))


@settings(max_examples=500, deadline=None)
@given(HEADS)
def test_a_head_is_parsed_or_refused_and_never_anything_else(raw: bytes) -> None:
    for parse in (parse_request_head, lambda head: parse_response_head(head, method=b"GET")):
        try:
            end = head_end(raw + b"\r\n\r\n")
            head = parse((raw + b"\r\n\r\n")[:end])
        except HttpError as error:
            assert 400 <= error.status < 600  # noqa: PT017
            continue
        if parse is parse_request_head:
            try:
                asked = routing.route(head)  # type: ignore[arg-type]
            except HttpError:
                continue
            if isinstance(asked, routing.RunnerRequest):
                out = routing.head_for_worker(head, asked, b"id")  # type: ignore[arg-type]
                again = parse_request_head(out)
                assert out.count(b"\r\n\r\n") == 1, "no second head can be smuggled"
                assert again.target == asked.target
                assert again.framing == head.framing


@settings(max_examples=300, deadline=None)
@given(HEADS | LEGAL_HEADS)
def test_what_we_accept_h11_reads_the_same(raw: bytes) -> None:
    raw = raw + b"\r\n\r\n"
    try:
        ours = parse_request_head(raw[: head_end(raw)])
    except HttpError:
        return
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(raw[: head_end(raw)])
    try:
        theirs = peer.next_event()
    except h11.RemoteProtocolError as error:
        assert "Host" in str(error), f"h11 refuses what we accept: {error}"  # noqa: PT017
        return
    assert isinstance(theirs, h11.Request)
    assert (bytes(theirs.method), bytes(theirs.target)) == (ours.method, ours.target)
    headers = dict(theirs.headers)
    if ours.framing.kind is BodyKind.LENGTH:
        assert int(headers[b"content-length"]) == ours.framing.length
    assert (b"transfer-encoding" in headers) == (ours.framing.kind is BodyKind.CHUNKED)


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.binary(max_size=20), st.data())
def test_a_body_ends_where_it_ends_however_it_is_cut(parts: list[bytes], after: bytes, data: st.DataObject) -> None:
    content = b"".join(parts)
    kind = data.draw(st.sampled_from([BodyKind.CHUNKED, BodyKind.LENGTH]))
    wire = chunked(parts) if kind is BodyKind.CHUNKED else content
    scanner = BodyScanner(Framing(kind, len(content)))
    payload: list[bytes] = []
    stream, used, at = wire + after, 0, 0
    while at < len(stream) and not scanner.done:
        size = data.draw(st.integers(1, len(stream) - at))
        used += scanner.feed(stream[at : at + size], payload)
        at += size
    assert scanner.done
    assert used == len(wire)
    assert b"".join(payload) == content


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_a_chunked_body_of_noise_is_refused_or_goes_on(noise: bytes) -> None:
    scanner = BodyScanner(Framing(BodyKind.CHUNKED))
    try:
        assert 0 <= scanner.feed(noise) <= len(noise)
    except HttpError as error:
        assert error.status == 400  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_control_frames_of_noise_are_refused(noise: bytes) -> None:
    try:
        message = messages.decode(noise)
    except FalError:
        return
    assert isinstance(message["t"], str)


def test_control_messages_survive_the_wire() -> None:
    entry = RunnerEntry("default/a-1", "/run/w.sock", 3, 60.0, cgroup="c", pid=7, draining=True, port=80, pid_ticks=9)
    assert (
        messages.runner_from_wire(messages.decode(messages.encode({"t": "x", **messages.runner_to_wire(entry)})[4:]))
        == entry
    )
    with pytest.raises(FalError, match="slots"):
        messages.runner_from_wire({**messages.runner_to_wire(entry), "slots": 0})
    with pytest.raises(FalError, match="port"):
        messages.runner_from_wire({**messages.runner_to_wire(entry), "port": 65536})
    older = {key: value for key, value in messages.runner_to_wire(entry).items() if key not in ("port", "pid_ticks")}
    assert messages.runner_from_wire(older).port == 0, "what a release before this one says"
    with pytest.raises(FalError, match="socket"):
        messages.runner_from_wire({**messages.runner_to_wire(entry), "socket": 5})
    assert read_greeting(tunnel_greeting("n-1")) == "n-1"


class Slots(RuleBasedStateMachine):
    """A slot table, requests of two processes, and a model of what must be in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable()
        self.running: list[str] = []
        self.inherited: list[str] = []
        self.limits: dict[str, int] = {}
        self.ended = 0
        self.now_s = 0.0

    runners = st.sampled_from(["t/a", "t/b"])

    @rule(runner=runners, slots=st.integers(1, 3), draining=st.booleans())
    def put(self, runner: str, slots: int, draining: bool) -> None:
        self.table.put(RunnerEntry(runner, "/s", slots, 1.0, draining=draining))
        self.limits[runner] = slots

    @rule(runner=runners)
    def remove(self, runner: str) -> None:
        assert self.table.remove(runner) == (runner in self.limits)
        self.limits.pop(runner, None)

    @rule(runner=runners)
    def drain(self, runner: str) -> None:
        assert self.table.drain(runner) == (runner in self.limits)

    @rule(runner=runners, term=st.integers(0, 4))
    def admit(self, runner: str, term: int) -> None:
        busy = (self.running + self.inherited).count(runner)
        admitted = self.table.admit(runner, term, self.now_s)
        if not isinstance(admitted, Refused):
            assert runner in self.limits
            assert busy < self.limits[runner], "one too many"
            assert term >= self.table.terms[1]
            self.running.append(runner)

    @rule(term=st.integers(0, 4))
    def lead(self, term: int) -> None:
        before = self.table.terms
        assert self.table.set_term(term) == (term > before[0])
        assert self.table.terms >= before

    @rule(outcome=st.sampled_from(Outcome), data=st.data())
    def end(self, outcome: Outcome, data: st.DataObject) -> None:
        if self.running:
            runner = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.table.release(runner, outcome, self.now_s)
        if self.inherited and data.draw(st.booleans()):
            self.table.release_inherited(self.inherited.pop(), outcome, self.now_s)

    @rule()
    def hand_over(self) -> None:
        handed = self.table.hand_over(self.now_s)
        successor = SlotTable()
        successor.set_terms(*self.table.terms)
        for runner in handed:
            successor.take_over(runner, self.now_s)
        self.table = successor
        self.inherited += self.running
        self.running = []
        for runner in handed:  # a removed runner lives on, draining, until its last request ends
            self.limits.setdefault(runner.entry.runner_id, runner.entry.max_multiplexing)

    @invariant()
    def counts_agree(self) -> None:
        shown = {one.runner_id: one.in_flight for one in self.table.stats(self.now_s)}
        assert shown == {one: (self.running + self.inherited).count(one) for one in self.limits}


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_lease_is_never_used_by_more_requests_than_it_has_slots(data: st.DataObject) -> None:
    table, now_s = DispatchTable(), 0.0
    held: list[Slot] = []
    limits: dict[str, int] = {}
    for runner in ("t/a-1", "t/a-2"):
        table.put_routes(
            [RouteEntry(runner, "t/a", "n", (Address("h", 1),), True, 2, 60.0)], (), complete=False, term=1
        )
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["lease", "revoke", "take", "give", "tick"])):
            case "lease":
                lease_id, slots = data.draw(st.sampled_from(["l-1", "l-2"])), data.draw(st.integers(1, 3))
                if lease_id in {slot.lease_id for slot in held}:
                    slots = max(slots, limits.get(lease_id, 0))  # a leader does not shrink what is in use
                runner = "t/a-" + lease_id[-1]
                limits[lease_id] = slots
                table.put_leases([LeaseEntry(lease_id, runner, "n", "t/a", slots, 1, 10.0)], (), now_s)
            case "revoke":
                if not held:
                    table.put_leases([], ["l-1"], now_s)
            case "take":
                slot = table.take("t/a", now_s, leaderless=False)
                if slot is not None:
                    held.append(slot)
            case "give":
                if held:
                    table.give_back(held.pop(), now_s, served=True)
            case "tick":
                now_s += data.draw(st.sampled_from([0.5, 3.0, 11.0]))
                table.updates(now_s)
        in_table = {entry.lease_id for entry in table.held()}
        for lease_id, limit in limits.items():
            if lease_id in in_table:
                assert sum(slot.lease_id == lease_id for slot in held) <= limit
