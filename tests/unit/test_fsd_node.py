"""Parts of the cache's node that need no process: turns, claims, hashing, origin ranges, what is believed, options."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_cache_scheduler import FakeCacheScheduler
from fal_contract.artifact import Artifact, to_manifest
from fal_contract.errors import Code, FalError
from fal_contract.limits import SMALL_ARTIFACT_BYTES
from fal_contract.v1 import state_pb2
from fal_fsd import attest, claims
from fal_fsd.claims import ClaimBook
from fal_fsd.core.messages import ORIGIN, Claim, Lease
from fal_fsd.frontier import Frontier
from fal_fsd.lanes import Lanes
from fal_fsd.lease_reads import LeaseReads, PieceSink, runs
from fal_fsd.options import FsdOptions, check
from fal_fsd.ports import BadPiece
from fal_fsd.vouched import VouchedPart
from fsd_fakes import FakePart, make_artifact, piece_of
from fsd_rig import message_of, plain_message

PIECE = 1 << 16


@dataclass
class Claimant:
    bytes_total: int
    read: bool = False
    asked_for: bool = True


def test_turns_go_by_reader_then_runner_then_age_and_small_ones_have_their_own() -> None:
    async def main() -> None:
        lanes, order = Lanes(large_max=1, small_max=1), []
        release = {name: asyncio.Event() for name in "abcde"}

        async def hold(name: str, claimant: Claimant) -> None:
            async with lanes.turn(claimant):
                order.append(name)
                await release[name].wait()

        large = SMALL_ARTIFACT_BYTES
        wished = Claimant(large, asked_for=False)
        claimants = {"a": Claimant(large), "b": wished, "c": Claimant(large), "d": Claimant(1), "e": Claimant(large)}
        tasks = {}
        for name, claimant in claimants.items():
            tasks[name] = asyncio.create_task(hold(name, claimant))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["a", "d"]
        assert "other artifacts" in lanes.why(claimants["c"])
        claimants["e"].read = True
        lanes.look()
        await asyncio.sleep(0)
        assert order == ["a", "d", "e"]  # a reader waits: beyond the bound
        tasks["c"].cancel()
        await asyncio.gather(tasks["c"], return_exceptions=True)
        for name in "aebd":
            release[name].set()
        await asyncio.gather(*(tasks[name] for name in "abde"))
        assert order == ["a", "d", "e", "b"]

    asyncio.run(main())


def test_claims_survive_contradictions_too_and_a_torn_end_is_cut(tmp_path: Path) -> None:
    book = ClaimBook(tmp_path / "c", 10)
    one, two = Claim(1, b"a" * 32, "n1", b"s"), Claim(2, b"b" * 32, "n2", b"t")
    other = Claim(1, b"c" * 32, "n3", b"u")
    assert book.take([one, two, other, one, Claim(10, b"d" * 32, "n1", b"")]) == [one, two, other]
    assert (book.get(1), book.get(1, other.digest), book.get(1, b"e" * 32)) == (one, other, None)
    with (tmp_path / "c").open("ab") as out:
        out.write(b"\x50\x00\x00\x00torn")
    again = ClaimBook(tmp_path / "c", 10)
    assert again.all() == [one, other, two]
    again.drop([1])
    assert again.take([other]) == [other]
    assert ClaimBook(tmp_path / "c", 10).all() == [other, two]
    again.clear()
    assert ClaimBook(tmp_path / "c", 10).all() == []


def test_liars_fill_no_book_and_push_out_nobodys_own_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "OTHERS_MAX", 3)
    book = ClaimBook(tmp_path / "c", 10)
    lies = [Claim(0, bytes([n]) * 32, "liar", b"") for n in range(9)]
    assert book.take(lies) == lies[:4]
    mine = Claim(0, b"m" * 32, "me", b"")
    assert book.take([mine], own=True) == [mine]
    assert ClaimBook(tmp_path / "c", 10).get(0, mine.digest) == mine


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(7)), lose=st.integers(0, 6))
def test_the_frontier_hashes_whatever_the_order_and_begins_anew_where_something_was_lost(
    order: list[int], lose: int
) -> None:
    artifact, contents = make_artifact([3 * PIECE + 1, 0, 3 * PIECE - 5], attested=False)
    part, stop = FakePart(artifact), threading.Event()
    try:
        frontier = Frontier(part)
        for at, piece in enumerate(order):
            part.put(piece, piece_of(artifact, contents, piece))
            assert frontier.advance(stop) == (at == 6)
        want = [hashlib.sha256(contents[file.path]).digest() for file in artifact.files]
        assert frontier.digests == want
        part.lose(lose)
        frontier.lost(lose)
        assert not frontier.advance(stop)
        assert frontier.digests is None
        part.put(lose, piece_of(artifact, contents, lose))
        assert frontier.advance(stop)
        assert frontier.digests == want
    finally:
        part.close()


@settings(deadline=None, max_examples=25)
@given(have=st.sets(st.integers(0, 9)), blocks=st.lists(st.integers(4096, 3 * PIECE), min_size=1, max_size=8))
def test_ranges_bring_exactly_what_is_missing(have: set[int], blocks: list[int]) -> None:
    artifact, contents = make_artifact([4 * PIECE, 0, 5 * PIECE + 1])
    part = FakePart(artifact, contents, sorted(have))
    try:
        told: list[int] = []
        for run in list(runs(part, range(10))):
            data = contents[artifact.files[run.file].path][run.offset : run.offset + run.length]
            sink, at = PieceSink(part, run.pieces, lambda piece, digest: told.append(piece)), 0
            while at < len(data):
                block = blocks[at % len(blocks)]
                sink(memoryview(data)[at : at + block])
                at += block
        assert sorted(told) == sorted(set(range(10)) - have)
        assert part.contents() == contents
    finally:
        part.close()


class FakeOrigin:
    """Serves `contents`; `whole`: no ranges; `wait`: each read waits for it."""

    def __init__(self, contents: dict[str, bytes], *, whole: bool = False) -> None:
        self.contents = contents
        self.whole = whole
        self.bytes_read = 0
        self.wait = asyncio.Event()
        self.wait.set()

    async def read(self, file: object, offset: int, length: int, sink: object) -> None:
        data = self.contents[file.path]  # type: ignore[attr-defined]
        if self.whole and (offset, length) != (0, len(data)):
            raise FalError(Code.FAILED_PRECONDITION, "no ranges", remedy="Read it whole.")
        await self.wait.wait()
        self.bytes_read += length
        await asyncio.to_thread(sink, memoryview(data)[offset : offset + length])  # type: ignore[arg-type]

    async def close(self) -> None:
        pass


class Told:
    """LeaseEvents."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.ended = asyncio.Event()

    def origin_piece(self, piece: int, digest: bytes, seconds: float) -> None:
        self.events.append(("piece", piece))

    def origin_bad(self, piece: int) -> None:
        self.events.append(("bad", piece))

    def origin_done(self, lease: Lease) -> None:
        self.events.append(("done", lease.first))
        self.ended.set()

    def origin_failed(self, lease: Lease, error: FalError, retry_s: float) -> None:
        self.events.append(("failed", lease.first, error.code, retry_s))
        self.ended.set()


def test_an_origin_without_ranges_is_read_by_who_holds_the_first_piece_alone() -> None:
    artifact, contents = make_artifact([6 * PIECE])

    async def main() -> None:
        part, told = FakePart(artifact), Told()
        reads = LeaseReads(part, FakeOrigin(contents, whole=True), told, now_s=asyncio.get_running_loop().time)
        try:
            reads.start(Lease(3, 2, 1, "me"), (3, 4))
            await told.ended.wait()
            assert told.events == [("failed", 3, Code.UNAVAILABLE, 30.0)]
            told.ended.clear()
            reads.start(Lease(0, 2, 1, "me"), (0, 1))
            await told.ended.wait()
            assert part.have.complete
            assert told.events[-1] == ("done", 0)
        finally:
            await reads.close()
            part.close()

    asyncio.run(main())


def test_wrong_bytes_of_the_origin_count_for_nothing_and_a_stopped_read_says_nothing() -> None:
    artifact, contents = make_artifact([4 * PIECE])

    async def main() -> None:
        part, told = FakePart(artifact), Told()
        bad = {"file-0": contents["file-0"][:PIECE] + b"x" * (3 * PIECE)}
        origin = FakeOrigin(bad)
        reads = LeaseReads(part, origin, told, now_s=asyncio.get_running_loop().time)
        try:
            reads.start(Lease(0, 4, 1, "me"), (0, 1, 2, 3))
            await told.ended.wait()
            assert [x for x in told.events if x[0] == "bad"] == [("bad", 1)]
            assert list(part.have) == [0]
            assert not part.writing
            origin.wait.clear()
            told.events.clear()
            reads.start(Lease(2, 2, 2, "me"), (2, 3))
            await asyncio.sleep(0)
            reads.stop(Lease(2, 2, 2, "me"))
            await reads.close()
            assert told.events == []
            assert reads.count == 0
        finally:
            part.close()

    asyncio.run(main())


def test_a_peers_piece_needs_somebody_who_vouches_for_it(tmp_path: Path) -> None:
    artifact, contents = make_artifact([2 * PIECE], attested=False)
    whole, _ = make_artifact([2 * PIECE])
    part = FakePart(artifact)
    try:
        book = ClaimBook(tmp_path / "c", 2)
        guarded = VouchedPart(part, book)
        assert guarded.writer(0, source="n2") is None
        assert whole.hashes is not None
        book.take([Claim(0, whole.hashes[0], "n1", b"")])
        writer = guarded.writer(0, source="n2")
        assert writer is not None
        writer.write(memoryview(b"x" * PIECE))
        with pytest.raises(BadPiece):
            writer.finish()
        writer = guarded.writer(0, source="n2")
        assert writer is not None
        writer.write(memoryview(contents["file-0"][:PIECE]))
        writer.finish()
        free = guarded.writer(1, source=ORIGIN)  # who reads the origin says what it is
        assert free is not None
        free.abort()
    finally:
        part.close()


def test_only_what_the_ca_signed_is_believed(tmp_path: Path) -> None:
    scheduler = FakeCacheScheduler(tmp_path)
    bare, _ = make_artifact([PIECE])
    good, key = scheduler.signed(bare), scheduler.ca.public_key
    assert attest.asked(message_of(good), key) == good
    for wrong in (bare, replace(good, hashes=(bytes(32),)), replace(good, kind="lora", piece_bytes=2 * PIECE)):
        with pytest.raises(FalError) as caught:
            attest.asked(message_of(wrong), key)
        assert caught.value.code in (Code.CORRUPT, Code.INVALID)
    message = message_of(good)
    message.manifest_digest = "0" * 64
    with pytest.raises(FalError, match="was asked for"):
        attest.asked(message, key)
    assert attest.asked(plain_message(tmp_path, {"x": b"1"}), None) is not None
    with pytest.raises(FalError, match="signature"):
        attest.believed(state_pb2.ModelManifest.FromString(_unsigned(good)), key)
    with pytest.raises(FalError, match="no manifest"):
        attest.parsed(b"\xff\xff")


def _unsigned(artifact: Artifact) -> bytes:
    return to_manifest(replace(artifact, hashes=None, signature=b"")).SerializeToString()


@pytest.mark.parametrize(
    ("given_", "field"),
    [
        ({"schedulers": ["x"]}, "schedulers"),
        ({"schedulers": ["h:1"]}, "identity"),
        ({"addresses": ["lan"]}, "addresses"),
        ({"socket": Path("/" + "x" * 120)}, "socket"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, given_: dict[str, object], field: str) -> None:
    with pytest.raises(FalError) as caught:
        check(FsdOptions(state_dir=tmp_path, **given_))  # type: ignore[arg-type]
    assert caught.value.field == field
