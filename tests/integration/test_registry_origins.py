"""The registrar against real origins: an S3 server, and a hub whose branch moves; credentials come from a file."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_scheduler.blobs import ManifestBlobs
from fal_scheduler.core.records import Model, ModelState
from fal_scheduler.leadership import Leadership
from fal_scheduler.models import ModelRegistrar, origin_lister
from origin_servers import HubServer, S3Server, why_no_s3
from scheduler_rig import ACTOR, leading

WEIGHTS = b"w" * 70_000


def registrar_test(
    folder: Path, credentials: str, test: Callable[[Leadership, ModelRegistrar], Awaitable[None]], *, mode: int = 0o600
) -> None:
    file = folder / "credentials.toml"
    file.write_text(credentials)
    file.chmod(mode)

    async def body() -> None:
        async with leading(folder / "leader") as leader:
            blobs = ManifestBlobs(folder / "blobs", leader.ca.public_key)
            models = ModelRegistrar(
                leader.engine, blobs, leader.ca, clock=leader.clock, note=print, lister=origin_lister(file)
            )
            await test(leader, models)
            await models.close()

    asyncio.run(body())


async def add(leader: Leadership, models: ModelRegistrar, name: str, uri: str, **more: object) -> Model:
    given = {"kind": "", "revision": "", "actor": ACTOR, **more}
    await models.add(f"t/{name}", uri, **given)  # type: ignore[arg-type]
    return leader.view.models[f"t/{name}"]


async def refused(call: Awaitable[object]) -> FalError:
    with pytest.raises(FalError) as caught:
        await call
    return caught.value


def test_a_folder_of_a_real_s3_server_is_registered_and_read_by_nobody(tmp_path: Path) -> None:
    if why_no_s3():
        pytest.skip(why_no_s3())
    bucket = tmp_path / "s3" / "models" / "sdxl"
    (bucket / "unet").mkdir(parents=True)
    (bucket / "unet" / "w.safetensors").write_bytes(WEIGHTS)
    (bucket / "model_index.json").write_text("{}")
    with S3Server(tmp_path / "s3") as server:

        async def test(leader: Leadership, models: ModelRegistrar) -> None:
            model = await add(leader, models, "sdxl", "s3://models/sdxl")
            assert (model.state, model.files, model.bytes) == (ModelState.REGISTERED, 2, 70_002)
            artifact = models.desk.artifact_of(model.artifact_id)
            assert [x.path for x in artifact.files] == ["model_index.json", "unet/w.safetensors"]
            assert all(x.version for x in artifact.files)
            assert server.bytes_sent < len(WEIGHTS), "names and sizes, not the bytes"
            assert await add(leader, models, "sdxl", "s3://models/sdxl") == model
            (bucket / "model_index.json").write_text("[]")
            error = await refused(add(leader, models, "sdxl", "s3://models/sdxl"))
            assert error.code is Code.ALREADY_EXISTS
            (bucket / "old.ckpt").write_bytes(b"p")
            error = await refused(add(leader, models, "other", "s3://models/sdxl"))
            assert (error.code, "old.ckpt" in error.what) == (Code.INVALID, True)
            assert (await add(leader, models, "other", "s3://models/sdxl", allow_pickle=True)).files == 3
            assert (await refused(add(leader, models, "no", "s3://models/nothing"))).code in (
                Code.NOT_FOUND,
                Code.INVALID,
            )

        registrar_test(tmp_path, server.credentials_toml(), test)


def test_a_branch_of_a_hub_is_a_commit_from_the_first_moment(tmp_path: Path) -> None:
    with HubServer() as hub:
        first = hub.add("org/m", {"w.safetensors": WEIGHTS, "config.json": b"{}"})

        async def test(leader: Leadership, models: ModelRegistrar) -> None:
            model = await add(leader, models, "m", "hf://org/m", revision="main")
            assert first in model.resolved_uri
            artifact = models.desk.artifact_of(model.artifact_id)
            published = {x.path: x.sha256 for x in artifact.files}
            assert published == {"config.json": b"", "w.safetensors": hashlib.sha256(WEIGHTS).digest()}
            second = hub.add("org/m", {"w.safetensors": WEIGHTS[1:], "config.json": b"{}"})
            error = await refused(add(leader, models, "m", "hf://org/m", revision="main"))
            assert (error.code, first in error.what) == (Code.ALREADY_EXISTS, True)
            assert second in (await add(leader, models, "m2", "hf://org/m", revision="main")).resolved_uri
            hub.gated["org/m"] = "secret-token-of-somebody"
            error = await refused(add(leader, models, "m3", "hf://org/m"))
            assert error.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
            assert "secret-token" not in str(error)
            assert set(leader.view.models) == {"t/m", "t/m2"}

        registrar_test(tmp_path, f'[hf]\nendpoint = "{hub.endpoint}"\n', test)


def test_a_credentials_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    async def test(leader: Leadership, models: ModelRegistrar) -> None:
        error = await refused(add(leader, models, "m", "s3://b/m"))
        assert error.code is Code.FAILED_PRECONDITION
        assert "hush" not in str(error)

    registrar_test(tmp_path, '[s3]\naccess_key_id = "a"\nsecret_access_key = "hush"\n', test, mode=0o644)
