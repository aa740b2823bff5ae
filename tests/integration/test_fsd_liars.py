"""Nodes of the cluster that lie about what nobody has attested: who is honest is neither dropped nor named for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_fsd import assembly, node
from fal_fsd.alone import NoMount
from fal_fsd.attest import Signer
from fal_fsd.claims import ClaimBook
from fal_fsd.ports import Part
from fsd_cluster import PIECE, cluster, content_of, contents_of, flipped, listed, run
from fsd_rig import message_of, tree
from origin_servers import Faults, HttpOrigin


def test_who_claims_wrong_bytes_first_has_nobody_dropped_and_signs_for_nothing(tmp_path: Path) -> None:
    contents = contents_of(30 * PIECE)

    async def main(origin: HttpOrigin) -> None:
        async with cluster(tmp_path, "n1 n2") as c:
            s = c.scheduler
            bare = s.registered(await listed(origin))
            liar = Signer(Identity.load(s.identity("n9")))
            lies = [liar.claim(bare.id, piece, bytes([piece]) * 32) for piece in range(bare.layout.count)]
            for rig in c.rigs.values():  # as if it had told them before anybody read anything
                ClaimBook(rig.folder / "state" / "claims" / bare.id, bare.layout.count).take(lies)
            paths = await asyncio.gather(*(c.stage(name, message_of(bare)) for name in c.rigs))
            assert all(tree(path) == contents for path in paths)
            signers = {told.signers[n] for told in s.attestations for n in told.piece_signers}
            assert signers <= {"n1", "n2"}
            await s.until(lambda: "CLAIMS_DIFFER" in s.kinds())
            assert {event.subject for event in s.events if event.kind in ("CLAIMS_DIFFER", "BAD_PEER")} == {"n9"}

    with HttpOrigin(contents) as origin:
        run(main(origin))


def test_who_could_read_wrong_bytes_before_they_were_attested_is_told(tmp_path: Path) -> None:
    contents = contents_of(6 * PIECE)

    async def main(origin: HttpOrigin) -> None:
        async with cluster(tmp_path, "") as c:
            s = c.scheduler
            rig = await c.add("n1")
            mount = ReadableAnyhow(tmp_path / "view")
            rig.cache.transfers.bind(replace(rig.cache.transfers.tools, mount=mount))
            s.attests = False
            bare = s.registered(await listed(origin))
            origin.files["file-0.safetensors"] = flipped(contents["file-0.safetensors"], 3 * PIECE + 7)
            path, ready = await rig.client.view(message_of(bare, allow_provisional=True), "r")
            assert (path, ready) == (tmp_path / "view", False)
            await s.until(lambda: s.attestations)
            begun = asyncio.Event()
            staging = rig.client.stage(message_of(bare), "r", on_progress=lambda done, total: begun.set())
            following = asyncio.create_task(staging)
            await begun.wait()
            origin.files["file-0.safetensors"] = contents["file-0.safetensors"]
            s.attest(content_of(bare, contents))
            with pytest.raises(FalError, match="could be read before") as caught:
                await following
            assert caught.value.code is Code.CORRUPT
            assert "could be read before" in mount.failed[bare.id]
            assert tree(await c.stage("n1", message_of(bare), "other")) == contents

    with HttpOrigin(contents, Faults(etag="none")) as origin:
        run(main(origin))


def test_an_attestation_that_was_lost_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "ATTEST_AGAIN_S", 0.1)
    monkeypatch.setattr(assembly, "TEND_S", 0.1)
    contents = contents_of(3 * PIECE)

    async def main(origin: HttpOrigin) -> None:
        async with cluster(tmp_path, "n1") as c:
            s = c.scheduler
            s.attests = False
            bare = s.registered(await listed(origin))
            staging = asyncio.create_task(c.stage("n1", message_of(bare)))
            await s.until(lambda: len(s.attestations) >= 2)
            s.signed(content_of(bare, contents))  # and the word of it is lost: nobody tells n1
            assert tree(await staging) == contents

    with HttpOrigin(contents) as origin:
        run(main(origin))


class ReadableAnyhow(NoMount):
    """A mount that needs no kernel: its path is told, nothing is there."""

    def __init__(self, path: Path) -> None:
        super().__init__("")
        self.path = path
        self.failed: dict[str, str] = {}

    async def open(self, part: Part) -> Path:
        return self.path

    def shows(self, artifact_id: str) -> bool:
        return True

    def fail(self, artifact_id: str, reason: str) -> None:
        self.failed[artifact_id] = reason
