"""The stand-ins of fsd's parts do what the ports say."""

from __future__ import annotations

import asyncio

import pytest

from fal_fsd.ports import BadPiece
from fsd_fakes import FakeNet, FakePart, RecordingEvents, make_artifact, piece_of


def test_part_counts_only_right_bytes() -> None:
    artifact, contents = make_artifact([100_000, 0, 70_000])
    part = FakePart(artifact)
    try:
        data = memoryview(piece_of(artifact, contents, 1))
        writer = part.writer(1, source="n1")
        assert writer is not None
        assert part.writer(1, source="n2") is None  # somebody writes it
        writer.write(data[:-1])
        with pytest.raises(BadPiece):
            writer.finish()
        assert not part.has(1)
        writer = part.writer(1, source="n1")
        assert writer is not None
        writer.write(data)
        assert writer.finish() == part.digest_of(1)
        assert part.has(1)
        assert part.writer(1, source="n2") is None
        writer = part.writer(0, source="n1")
        assert writer is not None
        with pytest.raises(ValueError, match="beyond"):
            writer.write(memoryview(bytes(100_000)))
        writer.abort()
        assert part.writing == frozenset()
    finally:
        part.close()


async def _fill() -> None:
    artifact, contents = make_artifact([300_000])
    net = FakeNet()
    events = {name: RecordingEvents() for name in ("a", "b")}
    parts = {"a": FakePart(artifact, contents), "b": FakePart(artifact)}
    try:
        peers = {name: net.peers(name, events[name]) for name in ("a", "b")}
        for name, part in parts.items():
            peers[name].join(part)
        await events["b"].until(lambda e: e.named("peer_up", "a"))
        peers["b"].ask("a", artifact.id, list(range(artifact.layout.count)), urgent=False)
        await events["b"].until_came(artifact.layout.count)
        assert parts["b"].contents() == contents
        net.cut("a", "b")
        assert events["b"].named("peer_down") == [("a", artifact.id, "cut")]
    finally:
        for part in parts.values():
            part.close()


def test_peers_give_what_is_asked() -> None:
    asyncio.run(_fill())
