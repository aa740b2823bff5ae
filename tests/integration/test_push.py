"""`falctl weights push` between real processes: scheduler, caches, and this one, which has the folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.identity import Identity, Role
from fal_contract.rpc import channel, fal_errors
from fal_contract.v1 import cluster_pb2, cluster_pb2_grpc, state_pb2
from fal_fsd.local_folder import LocalFile
from fal_fsd.push import Pushed, PushProgress, PushSettings, push
from fal_scheduler.ca import CertificateAuthority
from falctl.main import app
from fsd_rig import tree, write
from weights_rig import PIECE, Chain, chain, contents_of

SLOW = 24 << 20  # bytes a second: what is 32 MiB long can be stopped half way
LONG = 8 * PIECE
OnProgress = Callable[[PushProgress], None]


def identity(c: Chain, role: Role = Role.OPERATOR, name: str = "ada") -> Identity:
    ca = CertificateAuthority.open(c.scheduler.data / "identity")
    return ca.new_identity(role=role, name=name, now_s=SystemClock().wall_s())


class Api:
    """The scheduler as `falctl` calls it. `on_begin`: called before the first word to it."""

    def __init__(self, stub: cluster_pb2_grpc.ClusterAsyncStub, on_begin: Callable[[], object] = lambda: None) -> None:
        self._stub = stub
        self._on_begin = on_begin

    async def begin(self, request: cluster_pb2.BeginPushRequest) -> cluster_pb2.BeginPushReply:
        self._on_begin()
        with fal_errors():
            return await self._stub.BeginPush(request, timeout=30)

    async def end(self, request: cluster_pb2.EndPushRequest) -> cluster_pb2.ModelView:
        with fal_errors():
            return await self._stub.EndPush(request, timeout=30)


async def pushed(
    c: Chain,
    folder: Path,
    name: str = "m",
    *,
    own: Identity | None = None,
    on_progress: OnProgress = lambda progress: None,
    on_begin: Callable[[], object] = lambda: None,
    limit: int = 0,
) -> Pushed:
    """Push a folder as operator ada."""
    own = own or identity(c)
    settings = PushSettings(f"t/{name}", bandwidth_bytes_s=limit, lost_s=8.0)
    async with channel(c.scheduler.address, own) as opened:
        api = Api(cluster_pb2_grpc.ClusterStub(opened), on_begin)
        return await push(
            folder, settings, api, own, clock=SystemClock(), rng=random.Random(5), on_progress=on_progress
        )


async def ready_on(c: Chain, name: str, count: int) -> list[str]:
    """Names of the nodes that have it, once there are so many."""

    async def found() -> list[str]:
        ready = [node for node, told in (await c.where(name)).items() if told.cached.ready]
        return ready if len(ready) >= count else []

    found_: list[str] = await c.until(found)
    return found_


def files_on(c: Chain, node: str, view: cluster_pb2.ModelView) -> dict[str, bytes]:
    return tree(c.nodes[node].folder / "state" / "models" / view.model.manifest_digest)


def at_half(call: Callable[[PushProgress], object]) -> OnProgress:
    """Once, when half of it is there."""
    done = False

    def look(progress: PushProgress) -> None:
        nonlocal done
        if not done and progress.phase == "send" and 2 * progress.bytes_done >= progress.bytes_total:
            done = True
            call(progress)

    return look


def run(folder: Path, names: str, test: Callable[[Chain], object]) -> None:
    async def body() -> None:
        async with asyncio.timeout(150), chain(folder, names) as c:
            await test(c)  # type: ignore[misc]

    asyncio.run(body())


def test_a_folder_becomes_a_model_that_two_nodes_keep(tmp_path: Path) -> None:
    contents = {**contents_of(2 * PIECE + 7, 900), "unet/config.json": b"{}", "empty": b""}
    folder = write(tmp_path / "m", contents)

    async def test(c: Chain) -> None:
        viewer = identity(c, Role.VIEWER, "eve")
        with pytest.raises(FalError) as caught:
            await pushed(c, folder, own=viewer)
        assert caught.value.code is Code.PERMISSION_DENIED
        done = await pushed(c, folder)
        model = done.view.model
        assert (model.state, model.attestation) == (state_pb2.MODEL_STATE_ATTESTED, "push")
        assert model.attested_by == "operator/ada"
        total = sum(map(len, contents.values()))
        assert done.bytes_sent == total  # the second node has it from the first
        nodes = await ready_on(c, "m", 2)
        assert all(files_on(c, node, done.view) == contents for node in nodes)
        assert (await pushed(c, folder)).bytes_sent == 0
        third = next(name for name in c.nodes if name not in nodes)
        assert tree(await c.stage(third, model)) == contents
        result = await asyncio.to_thread(falctl, c, folder, "weights", "push", str(folder), "m", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["model"]["model"]["state"] == "ATTESTED"
        (folder / "w.ckpt").write_bytes(b"x")
        result = await asyncio.to_thread(falctl, c, folder, "weights", "push", str(folder), "m")
        assert result.exit_code == 1
        assert "w.ckpt" in str(result.exception)
        (folder / "w.ckpt").unlink()
        (folder / "empty").write_bytes(b"no more")
        with pytest.raises(FalError) as caught:
            await pushed(c, folder)
        assert caught.value.code is Code.ALREADY_EXISTS
        await dying_node(c, write(tmp_path / "long", contents_of(LONG)))

    run(tmp_path, "n1 n2 n3", test)


async def dying_node(c: Chain, folder: Path) -> None:
    """The node that takes it is killed half way: the next one goes on."""
    killed: list[asyncio.Task[None]] = []
    dead = ""

    def kill(progress: PushProgress) -> None:
        nonlocal dead
        dead = next(name for name, node in c.nodes.items() if node.node_id == progress.node_id)
        killed.append(asyncio.create_task(c.nodes[dead].kill()))

    done = await pushed(c, folder, "long", on_progress=at_half(kill), limit=SLOW)
    await asyncio.gather(*killed)
    assert dead
    assert done.view.model.state == state_pb2.MODEL_STATE_ATTESTED
    nodes = [node for node in await ready_on(c, "long", 1) if node != dead]
    assert files_on(c, nodes[0], done.view) == tree(folder)


def falctl(c: Chain, folder: Path, *arguments: str) -> Result:
    """The command, as operator ada of team t."""
    profile = folder.parent / "ada.toml"
    identity(c).save(folder.parent / "ada.pem")
    profile.write_text(f'servers = ["{c.scheduler.address}"]\nidentity = "ada.pem"\nteam = "t"\n')
    return CliRunner().invoke(app, ["--profile", str(profile), *arguments])


async def ended_push(c: Chain, folder: Path) -> None:
    """Ended half way; the next one goes on where it was."""
    had = 0

    def stop(progress: PushProgress) -> None:
        nonlocal had
        had = progress.bytes_done
        first.cancel()

    first = asyncio.create_task(pushed(c, folder, "ended", on_progress=at_half(stop), limit=SLOW))
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert had
    second = await pushed(c, folder, "ended")
    assert second.bytes_sent <= second.view.model.bytes - had


def test_ended_pushes_go_on_and_folders_that_change_are_never_attested(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", contents_of(LONG, 10))
    small = folder / "file-1.safetensors"

    def rewrite(*_: object) -> None:
        """So that only the digest tells."""
        before = small.stat()
        small.write_bytes(bytes(10))
        os.utime(small, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert LocalFile("", small, 10, before.st_mtime_ns).unchanged()

    def touch(*_: object) -> None:
        os.utime(small, ns=(1, 1))

    async def test(c: Chain) -> None:
        await ended_push(c, write(tmp_path / "ended", contents_of(LONG)))
        for name, given in (
            ("touched", {"on_progress": at_half(touch), "limit": SLOW}),
            ("wrong", {"on_begin": rewrite}),
        ):
            with pytest.raises(FalError) as caught:
                await pushed(c, folder, name, **given)  # type: ignore[arg-type]
            assert caught.value.code is Code.CONFLICT, caught.value
            assert small.name in caught.value.what
            assert (await c.model(name)).state == state_pb2.MODEL_STATE_REGISTERED
            small.write_bytes(os.urandom(10))
        small.write_bytes(b"x" * 10)
        done = await pushed(c, folder, "wrong")
        assert done.view.model.state == state_pb2.MODEL_STATE_ATTESTED
        assert files_on(c, "n1", done.view) == tree(folder)
        assert (await pushed(c, folder, "twin")).bytes_sent == 0  # the node has the content under another name

    run(tmp_path, "n1", test)
