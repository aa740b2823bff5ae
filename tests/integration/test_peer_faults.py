"""What a bad, slow or dying peer can do to a bulk port: nothing is stored, nothing hangs, others go on."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.pieces import Bitmap
from fal_fsd.core.rates import BandwidthLimits
from fal_fsd.peers import wire
from fal_fsd.peers.frames import Busy, Cancel, DataHead, Frame, Have, Hello, HelloOk, Ping, Pong, Req
from fal_fsd.peers.inbox import TAKEN_RETRY_S
from fal_fsd.peers.net import GREETING_MAX, GREETING_TIMEOUT_S, PING_S, SILENCE_MAX_S, STALL_TIMEOUT_S
from fal_fsd.peers.outbox import JOBS_MAX
from fal_fsd.peers.wire import HEAD, MAGIC, Kind, encode
from fsd_fakes import make_artifact, piece_of
from peers_rig import CLUSTER, Node, RawPeer, Rig, on_loop, rig, ticket

ARTIFACT, CONTENTS = make_artifact([900_000, 70_000], seed=1)
BIG, BIG_CONTENTS = make_artifact([24 << 20], seed=2, piece_bytes=8 << 20)
COUNT = ARTIFACT.layout.count


async def _raw(world: Rig, to: Node, pieces: int | None = None) -> RawPeer:
    """A peer by hand that has everything (or so many of the first pieces) and is up at `to`."""
    raw = RawPeer.dial(to.port)
    count = world.artifact.layout.count
    have = Bitmap(count, range(count if pieces is None else pieces))
    assert isinstance(await asyncio.to_thread(raw.greet, world, to), HelloOk)
    await asyncio.to_thread(raw.join, world, bytes(have))
    await to.events.until(lambda e: e.named("peer_up", "raw"))
    return raw


def _blocks(world: Rig, piece: int, data: bytes | None = None, *, stop: int | None = None) -> bytes:
    """A piece as frames; only the first `stop` bytes of it when told."""
    data = piece_of(world.artifact, world.contents, piece) if data is None else data
    out = b""
    for at in range(0, len(data) if stop is None else stop, wire.BLOCK_BYTES_MAX):
        block = data[at : at + wire.BLOCK_BYTES_MAX]
        out += encode(DataHead(world.id, piece, at, len(block), at + len(block) == len(data))) + block
    return out


@on_loop
async def test_a_flipped_byte_is_told_and_not_stored() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a, b = await world.add("a", None), await world.add("b")
        world.meet()
        await world.up("a", "b")
        a.part.flip(3)
        b.net.ask("a", ARTIFACT.id, list(range(COUNT)), urgent=False)
        await b.events.until(lambda e: len(e.named("piece_came")) == COUNT - 1 and e.named("piece_bad"))
        assert b.events.named("piece_bad") == [("a", ARTIFACT.id, 3)]
        assert not b.part.has(3)
        assert b.part.writing == frozenset()


@on_loop
async def test_a_peer_that_never_answers_is_given_up() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        raw = await _raw(world, a)
        try:
            a.net.ask("raw", ARTIFACT.id, [0, 1], urgent=False)
            await asyncio.to_thread(raw.read, Req)
            world.clock.advance(STALL_TIMEOUT_S + 1)
            await a.events.until(lambda e: e.named("peer_down"))
            assert "stalled" in a.events.named("peer_down")[0][2]
        finally:
            raw.close()


@on_loop
async def test_a_peer_that_dies_within_a_piece_leaves_nothing_behind() -> None:
    async with rig(BIG, BIG_CONTENTS) as world:
        a, _ = await world.add("a"), await world.add("other", None)
        world.meet(("a", "other"))
        raw = await _raw(world, a)
        await world.up("a", "other")
        a.net.ask("raw", BIG.id, [1], urgent=False)
        await asyncio.to_thread(raw.send, _blocks(world, 1, stop=3 << 20))
        await _until(lambda: a.part.writing == {1})
        raw.close()
        await a.events.until(lambda e: e.named("peer_down", "raw"))
        assert a.part.writing == frozenset()
        assert not a.part.has(1)
        a.net.ask("other", BIG.id, [1], urgent=False)
        await a.events.until(lambda e: e.named("piece_came", "other"))


async def _until(done: object) -> None:
    """For what no event tells."""
    assert callable(done)
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 48, "protocol"),
        (HEAD.pack(MAGIC, Kind.HAVE, 0, 0, 0, 1 << 30, b"\x01" * 32), "too long"),
        (HEAD.pack(MAGIC, 99, 0, 0, 0, 0, bytes(32)), "type 99"),
        (HEAD.pack(MAGIC, Kind.META, 1, 7, 0, 1 << 20, b"\x01" * 32), "too long"),
        (encode(Have(ARTIFACT.id, (COUNT,))), f"piece {COUNT}"),
        (encode(Req(ARTIFACT.id, (COUNT,))), f"piece {COUNT}"),
        (encode(Hello(CLUSTER, "raw", "x")), "second greeting"),
        (encode(DataHead(ARTIFACT.id, 0, 0, 5)) + b"x" * 5 + encode(DataHead(ARTIFACT.id, 0, 9, 5)), "follow"),
        (encode(DataHead(ARTIFACT.id, 0, 0, 1 << 17, last=True)), "follow"),
    ],
    ids=["http", "oversize", "unknown", "manifest unasked", "have beyond", "ask beyond", "hello", "gap", "too short"],
)
@on_loop
async def test_what_is_no_frame_ends_the_connection(sent: bytes, why: str) -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        raw = await _raw(world, a)
        try:
            a.net.ask("raw", ARTIFACT.id, [0], urgent=False)
            await asyncio.to_thread(raw.read, Req)
            await asyncio.to_thread(raw.send, sent)
            assert why in await asyncio.to_thread(raw.ended)
            await a.events.until(lambda e: e.named("peer_down"))
            assert why in a.events.named("peer_down")[0][2]
        finally:
            raw.close()
        assert a.part.writing == frozenset()


@on_loop
async def test_garbage_before_the_greeting_is_cut_off() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        for garbage in (b"\0" * 100, b"\x16\x03\x01 no TLS here" + b"\0" * 100, encode(Ping())):
            raw = RawPeer.dial(a.port)
            try:
                await asyncio.to_thread(raw.send, garbage)
                await asyncio.to_thread(raw.ended)
            finally:
                raw.close()
        assert a.events.seen == []


@on_loop
async def test_a_greeting_that_never_ends_is_cut_off_and_others_come_in() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        slow = [RawPeer.dial(a.port) for _ in range(GREETING_MAX + 8)]
        try:
            for raw in slow:
                raw.sock.sendall(encode(Ping())[:7])
            welcome = await _raw(world, a)
            welcome.close()
            world.clock.advance(GREETING_TIMEOUT_S + 1)
            for raw in slow:
                assert await asyncio.to_thread(raw.ended) == ""
        finally:
            for raw in slow:
                raw.close()


@on_loop
async def test_silence_is_broken_by_pings_and_ends_a_connection() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        raw = await _raw(world, a)
        try:
            world.clock.advance(PING_S)
            assert isinstance(await asyncio.to_thread(raw.read, Ping), Ping)
            await asyncio.to_thread(raw.send, Ping())
            assert isinstance(await asyncio.to_thread(raw.read, Pong), Pong)
            world.clock.advance(SILENCE_MAX_S + 1)
            await a.events.until(lambda e: e.named("peer_down"))
            assert "silent" in a.events.named("peer_down")[0][2]
        finally:
            raw.close()


@on_loop
async def test_a_withdrawn_piece_is_stopped_and_can_be_had_elsewhere() -> None:
    async with rig(BIG, BIG_CONTENTS) as world:
        a, _ = await world.add("a"), await world.add("other", None)
        world.meet(("a", "other"))
        raw = await _raw(world, a)
        await world.up("a", "other")
        a.net.ask("raw", BIG.id, [0, 1], urgent=False)
        await asyncio.to_thread(raw.send, _blocks(world, 0, stop=2 << 20))
        await _until(lambda: a.part.writing == {0})
        a.net.withdraw("raw", BIG.id, [0])
        cancel = await asyncio.to_thread(raw.read, Cancel)
        assert isinstance(cancel, Cancel)
        assert cancel.pieces == (0,)
        # The thread that writes may be in the middle of it for a moment: then it is refused, and asked again.
        a.events.hooks["piece_refused"] = lambda node, id, pieces, _s: a.net.ask(node, id, pieces, urgent=False)
        a.net.ask("other", BIG.id, [0], urgent=False)
        await a.events.until(lambda e: e.named("piece_came", "other"))
        # What was on its way all the same is passed over, and the other request is served.
        await asyncio.to_thread(raw.send, encode(DataHead(BIG.id, 0, 2 << 20, 0, aborted=True)), _blocks(world, 1))
        await a.events.until(lambda e: e.named("piece_came", "raw"))
        raw.close()
        assert len(a.events.named("piece_came")) == 2
        assert a.part.bytes_of("file-0")[: 16 << 20] == BIG_CONTENTS["file-0"][: 16 << 20]


@on_loop
async def test_a_sender_stops_a_piece_that_is_cancelled() -> None:
    """A slow link: without the cancel 24 MiB would come."""
    async with rig(BIG, BIG_CONTENTS) as world:
        a = await world.add("a", None, limits=BandwidthLimits(node=40 << 20))
        raw = await _raw(world, a, pieces=0)
        try:
            await asyncio.to_thread(raw.send, Req(BIG.id, (0, 1)))
            await asyncio.to_thread(raw.read, DataHead)
            await asyncio.to_thread(raw.send, Cancel(BIG.id, (0,)))

            def aborted(item: Frame | bytes) -> bool:
                return isinstance(item, DataHead) and item.aborted

            assert await asyncio.to_thread(raw.read_until, aborted) == DataHead(BIG.id, 0, _anything(), 0, aborted=True)
            head = await asyncio.to_thread(raw.read, DataHead)
            assert isinstance(head, DataHead)
            assert (head.piece, head.offset) == (1, 0)
        finally:
            raw.close()


def _anything() -> int:
    class Any(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            return True

    return Any(0)


@on_loop
async def test_urgent_pieces_overtake_between_blocks() -> None:
    async with rig(BIG, BIG_CONTENTS) as world:
        a = await world.add("a", None, limits=BandwidthLimits(node=40 << 20))
        raw = await _raw(world, a, pieces=0)
        try:
            await asyncio.to_thread(raw.send, Req(BIG.id, (0, 1)))
            await asyncio.to_thread(raw.read, DataHead)
            await asyncio.to_thread(raw.send, Req(BIG.id, (2,), urgent=True))

            def ended(item: Frame | bytes) -> bool:
                return isinstance(item, DataHead) and item.last

            order = [await asyncio.to_thread(raw.read_until, ended) for _ in range(3)]
            assert [x.piece for x in order if isinstance(x, DataHead)] == [2, 0, 1]
        finally:
            raw.close()


@on_loop
async def test_more_requests_than_a_peer_may_have_are_busy() -> None:
    over = 300  # some are sent before the last are asked for
    many, contents = make_artifact([(JOBS_MAX + over) * 1024], piece_bytes=1024)
    async with rig(many, contents) as world:
        a = await world.add("a", None, limits=BandwidthLimits(node=64 << 10))
        raw = await _raw(world, a, pieces=0)
        try:
            await asyncio.to_thread(raw.send, Req(many.id, tuple(range(JOBS_MAX + over))))
            busy = await asyncio.to_thread(raw.read, Busy)
            assert isinstance(busy, Busy)
            assert 0 < len(busy.pieces) <= over
            assert busy.pieces[-1] == JOBS_MAX + over - 1
            assert busy.retry_ms > 0
        finally:
            raw.close()


@on_loop
async def test_busy_is_told_to_the_node() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        a = await world.add("a")
        raw = await _raw(world, a)
        try:
            a.net.ask("raw", ARTIFACT.id, [0, 1], urgent=False)
            await asyncio.to_thread(raw.send, Busy(ARTIFACT.id, (0, 1, 2), 1500))
            await a.events.until(lambda e: e.named("piece_refused"))
            assert a.events.named("piece_refused") == [("raw", ARTIFACT.id, (0, 1), 1.5)]
        finally:
            raw.close()


@on_loop
async def test_a_full_disk_is_told_and_the_next_piece_is_taken() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        _, b = await world.add("a", None), await world.add("b")
        world.meet()
        await world.up("a", "b")
        b.part.fail_with = FalError(Code.NO_CAPACITY, "the disk is full", remedy="Free some space.")
        b.net.ask("a", ARTIFACT.id, [0], urgent=False)
        await b.events.until(lambda e: e.named("piece_refused"))
        assert [event[0] for event in b.events.seen[-2:]] == ["disk_failed", "piece_refused"]
        assert b.part.writing == frozenset()
        b.part.fail_with = None
        b.net.ask("a", ARTIFACT.id, [0, 1], urgent=False)
        await b.events.until_came(2)


@on_loop
async def test_a_piece_that_another_writes_is_refused_and_passed_over() -> None:
    async with rig(ARTIFACT, CONTENTS) as world:
        _, b = await world.add("a", None), await world.add("b")
        world.meet()
        await world.up("a", "b")
        writer = b.part.writer(0, source="origin")
        assert writer is not None
        b.net.ask("a", ARTIFACT.id, [0, 1], urgent=False)
        await b.events.until(lambda e: e.named("piece_refused") and e.named("piece_came"))
        assert b.events.named("piece_refused") == [("a", ARTIFACT.id, (0,), TAKEN_RETRY_S)]
        writer.abort()


@on_loop
async def test_a_part_that_was_left_is_not_touched_any_more() -> None:
    async with rig(BIG, BIG_CONTENTS) as world:
        a = await world.add("a", None, limits=BandwidthLimits(node=40 << 20))
        raw = await _raw(world, a, pieces=0)
        try:
            await asyncio.to_thread(raw.send, Req(BIG.id, (0, 1, 2)))
            await asyncio.to_thread(raw.read, DataHead)
            a.net.leave(BIG.id)
            await asyncio.wait_for(a.net.quiet(BIG.id), 20)
            a.part.close()
            head = await asyncio.to_thread(raw.read_until, lambda x: isinstance(x, DataHead) and x.aborted)
            assert isinstance(head, DataHead)
        finally:
            raw.close()


CHILD = """
import asyncio, sys
sys.path[:0] = {path!r}
from test_peer_faults import child
asyncio.run(child(int(sys.argv[1])))
"""


async def child(port: int) -> None:
    """A node in a process of its own that gives BIG slowly, to be killed."""
    async with rig(BIG, BIG_CONTENTS) as world:
        node = await world.add("child", None, limits=BandwidthLimits(node=20 << 20))
        shown = ticket(world.clock, BIG.id, caller="child", at="a")
        address = world.address(node, caller="child")
        node.net.set_members(BIG.id, [type(address)("a", (("127.0.0.1", port),), shown, 1e12)])
        await asyncio.Event().wait()


@on_loop
async def test_a_process_that_is_killed_within_a_piece() -> None:
    async with rig(BIG, BIG_CONTENTS) as world:
        a = await world.add("a")
        path = [str(Path(__file__).parent), *sys.path]
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD.format(path=path), str(a.port))
        try:
            await a.events.until(lambda e: e.named("peer_up", "child"), timeout_s=60)
            a.net.ask("child", BIG.id, [0, 1, 2], urgent=False)
            await _until(lambda: a.part.writing)
            process.send_signal(signal.SIGKILL)
            await a.events.until(lambda e: e.named("peer_down", "child"))
            assert a.part.writing == frozenset()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
