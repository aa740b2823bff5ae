"""Nodes of the cluster that lie about what nobody has attested: who is honest is neither dropped nor named for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fal_contract.identity import Identity
from fal_fsd.attest import Signer
from fal_fsd.claims import ClaimBook
from fsd_cluster import PIECE, cluster, contents_of, listed, run
from fsd_rig import message_of, tree
from origin_servers import HttpOrigin


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
