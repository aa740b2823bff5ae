"""Weight caches and `fal-scheduler` as a process, over real mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fake_cache import FakeCache, Run, holding, wanting
from fal_contract.artifact import from_manifest, key_of_pem
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity
from fal_contract.rpc import channel, fal_errors
from fal_contract.ticket import check_ticket
from fal_contract.v1 import cluster_pb2, weights_pb2, weights_pb2_grpc
from scheduler_process import Process, cluster, identity, init, joined, scheduler


def dialling(process: Process, own: Identity) -> Run:
    """Speaks to the process with this identity."""

    async def run(
        name: str,
        incoming: AsyncIterator[weights_pb2.CacheUp],
        receive: Callable[[weights_pb2.CacheDown], Awaitable[None]],
    ) -> None:
        async with channel(process.address, own) as opened:
            with fal_errors():
                async for message in weights_pb2_grpc.CacheServiceStub(opened).Session(incoming):
                    await receive(message)

    return run


def test_caches_form_a_swarm_and_hear_of_a_withdrawal(tmp_path: Path) -> None:
    data, folder = tmp_path / "s", tmp_path / "model"
    init(data)
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(b"w" * 5000)

    async def body(process: Process) -> None:
        own = [await joined(process, f"node-{i}") for i in range(2)]
        async with cluster(process) as stub:
            model = (await stub.AddModel(cluster_pb2.AddModelRequest(id="t/m", uri=f"file://{folder}"))).model
            artifact = model.artifact_id
            have, want = (FakeCache(dialling(process, one), one.peer.name) for one in own)
            have.dial(holding(artifact, model.bytes, manifest_digest=model.manifest_digest))
            want.dial(wanting(artifact, model.bytes))
            await want.until(lambda: have.node_id in want.neighbours(artifact) and artifact in want.attested)
            member = want.neighbours(artifact)[have.node_id]
            assert have.welcome is not None
            why = check_ticket(
                have.welcome.ticket_keys,
                member.ticket,
                caller=want.node_id,
                artifact_id=artifact,
                now_s=member.ticket_expires_s - 60,
            )
            assert why == ""
            attested = from_manifest(want.attested[artifact], ca_key=key_of_pem(own[0].ca_pem))
            assert attested.manifest_digest == model.manifest_digest
            where = await stub.WhereModel(cluster_pb2.WhereModelRequest(id="t/m"))
            assert next((x.node, x.ready_in_s) for x in where.nodes) == ("node-0", 0.0)
            await stub.RevokeModel(cluster_pb2.RevokeModelRequest(id="t/m", reason="the licence ended"))
            await want.until(lambda: artifact in want.drops and want.drops[artifact].revoked)
            await have.until(lambda: artifact in have.drops)
            await stub.RevokeNode(cluster_pb2.RevokeNodeRequest(node="node-0", reason="stolen"))
            assert have.task is not None
            with pytest.raises(FalError):
                await asyncio.wait_for(have.task, 20)
            await want.hang_up()

    with scheduler(data) as process:
        asyncio.run(body(process))


def test_manifests_are_for_nodes_only(tmp_path: Path) -> None:
    data = tmp_path / "s"
    init(data)

    async def read(process: Process, own: Identity) -> FalError:
        request = weights_pb2.GetManifestRequest(id="a" * 64)
        async with channel(process.address, own) as opened:
            with pytest.raises(FalError) as caught, fal_errors():
                await weights_pb2_grpc.CacheServiceStub(opened).GetManifest(request, timeout=20)
        return caught.value

    async def body(process: Process) -> None:
        node = await joined(process, "node-0")
        assert (await read(process, node)).code is Code.NOT_FOUND
        assert (await read(process, identity(data, "admin"))).code is Code.PERMISSION_DENIED

    with scheduler(data) as process:
        asyncio.run(body(process))
