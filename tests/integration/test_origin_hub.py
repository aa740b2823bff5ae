"""Model hubs: branches become commits once, large files come from a CDN, gated repositories say what to do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_fsd.origin import Credentials, OriginBusy, list_origin, open_origin
from origin_servers import ConnectProxy, HubServer, make_authority

LARGE = os.urandom(1_500_000)
FILES = {"unet/m.safetensors": LARGE, "model_index.json": b"{}", ".gitattributes": b"x", "README.md": b"# x"}


def credentials(hub: HubServer, **env: str) -> Credentials:
    return Credentials.load(None, {"HF_ENDPOINT": hub.endpoint, **env})


async def read(uri: str, path: str, known: Credentials) -> bytes:
    listing = await list_origin(uri, credentials=known)
    file = next(x for x in listing.files if x.path == path)
    origin = open_origin(listing.uri, known)
    taken = bytearray()
    try:
        half = file.size_bytes // 2
        await origin.read(file, 0, half, taken.extend)
        await origin.read(file, half, file.size_bytes - half, taken.extend)
    finally:
        await origin.close()
    return bytes(taken)


def test_a_branch_is_resolved_once() -> None:
    with HubServer() as hub:
        first = hub.add("org/repo", FILES)
        listing = asyncio.run(list_origin("hf://org/repo", credentials=credentials(hub)))
        assert (listing.uri, listing.revision) == (f"hf://org/repo@{first}", first)
        assert [x.path for x in listing.files] == ["README.md", "model_index.json", "unet/m.safetensors"]
        assert [len(x.sha256) for x in listing.files] == [0, 0, 32]
        assert all(x.version for x in listing.files)
        assert [x.path.startswith("/api/") for x in hub.requests] == [True]
        second = hub.add("org/repo", {**FILES, "model_index.json": b"{ }"})
        assert second != first
        assert asyncio.run(read(f"hf://org/repo@{first}", "model_index.json", credentials(hub))) == b"{}"
        assert asyncio.run(list_origin("hf://org/repo", revision=first, credentials=credentials(hub))) == listing
        assert asyncio.run(list_origin("hf://org/repo@main", credentials=credentials(hub))).revision == second


def test_folders_and_single_files() -> None:
    with HubServer() as hub:
        commit = hub.add("org/repo", FILES)
        known = credentials(hub)
        for asked in ("unet", "unet/"):
            listing = asyncio.run(list_origin(f"hf://org/repo/{asked}", credentials=known))
            assert listing.uri == f"hf://org/repo@{commit}/unet/"
            assert [x.path for x in listing.files] == ["m.safetensors"]
        alone = asyncio.run(list_origin("hf://org/repo/unet/m.safetensors", credentials=known))
        assert (alone.uri, alone.files) == (f"hf://org/repo@{commit}/unet/m.safetensors", listing.files)
        for uri in (listing.uri, alone.uri):
            assert asyncio.run(read(uri, "m.safetensors", known)) == LARGE
        with pytest.raises(FalError, match="vae") as caught:
            asyncio.run(list_origin("hf://org/repo/vae", credentials=known))
        assert caught.value.code is Code.NOT_FOUND


def test_the_token_goes_to_the_hub_and_not_to_its_cdn() -> None:
    with HubServer() as hub:
        hub.add("org/gated", FILES)
        hub.gated["org/gated"] = "hunter2"
        assert asyncio.run(read("hf://org/gated", "unet/m.safetensors", credentials(hub, HF_TOKEN="hunter2"))) == LARGE
        assert len(hub.cdn.requests) == 2
        assert "hunter2" not in str([x.headers for x in hub.cdn.requests])
        # The second range went straight to the CDN.
        assert len([x for x in hub.requests if "/resolve/" in x.path]) == 1


@pytest.mark.parametrize(
    ("env", "code"), [({}, Code.UNAUTHENTICATED), ({"HF_TOKEN": "expired"}, Code.PERMISSION_DENIED)]
)
def test_a_gated_repository_says_what_to_do(env: dict[str, str], code: Code) -> None:
    with HubServer() as hub:
        hub.add("org/gated", FILES)
        known = credentials(hub, HF_TOKEN="hunter2")
        listing = asyncio.run(list_origin("hf://org/gated", credentials=known))
        hub.gated["org/gated"] = "hunter2"

        async def late() -> None:
            """Listed while it was open, or with another token."""
            origin = open_origin(listing.uri, credentials(hub, **env))
            try:
                await origin.read(listing.files[0], 0, 1, bytearray().extend)
            finally:
                await origin.close()

        for attempt in (list_origin("hf://org/gated", credentials=credentials(hub, **env)), late()):
            with pytest.raises(FalError) as caught:
                asyncio.run(attempt)
            assert caught.value.code is code
            assert "gated" in caught.value.what
            assert "licence" in caught.value.remedy
            assert "HF_TOKEN" in caught.value.remedy
            assert "expired" not in caught.value.what


def test_what_a_hub_refuses() -> None:
    with HubServer() as hub:
        hub.add("org/repo", {**FILES, "m.ckpt": b"x"})
        known = credentials(hub)

        async def refused(uri: str, revision: str = "") -> FalError:
            with pytest.raises(FalError) as caught:
                await list_origin(uri, revision=revision, credentials=known)
            assert caught.value.remedy
            return caught.value

        async def scenario() -> None:
            assert (await refused("hf://org/none")).code is Code.UNAUTHENTICATED
            error = await refused("hf://org/repo", "v9")
            assert (error.code, "v9" in error.what) == (Code.NOT_FOUND, True)
            assert "m.ckpt" in (await refused("hf://org/repo")).what
            assert len((await list_origin("hf://org/repo", credentials=known, allow_pickle=True)).files) == 4
            hub.faults.answers = [(429, {"Retry-After": "200"}, "")]
            error = await refused("hf://org/repo")
            assert isinstance(error, OriginBusy)
            assert error.retry_s == 200.0
            hub.faults.answers = [(503, {}, "")]
            await list_origin("hf://org/repo", credentials=known, allow_pickle=True)

        asyncio.run(scenario())
    with pytest.raises(FalError, match="commit"):
        open_origin("hf://org/repo@main", known)
    with pytest.raises(FalError, match="endpoint"):
        asyncio.run(list_origin("hf://o/r", credentials=Credentials.load(None, {"HF_ENDPOINT": "http://far.invalid"})))


def test_a_private_hub_behind_a_proxy(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    with HubServer(tls=authority.tls) as hub, ConnectProxy(user="u:hunter2") as proxy:
        hub.add("org/repo", FILES)
        with pytest.raises(FalError, match="not trusted"):
            asyncio.run(list_origin("hf://org/repo", credentials=credentials(hub)))
        known = credentials(hub, SSL_CERT_FILE=str(authority.ca_file), HTTPS_PROXY=proxy.url)
        assert asyncio.run(read("hf://org/repo", "unet/m.safetensors", known)) == LARGE
        assert {int(x.rpartition(":")[2]) for x in proxy.connects} == {hub.port, hub.cdn.port}


def test_listing_leaves_the_home_directory_alone(tmp_path: Path) -> None:
    """huggingface_hub would look for a token there, and make a cache."""
    home = tmp_path / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("hunter2")
    program = (
        "import asyncio, os; from fal_fsd.origin import Credentials, list_origin\n"
        "asyncio.run(list_origin('hf://org/repo', credentials=Credentials.load(None, os.environ)))"
    )
    with HubServer() as hub:
        hub.add("org/repo", FILES)
        roots = os.pathsep.join(str(Path(__file__).parents[2] / x) for x in ("proto", "fsd"))
        env = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": roots}
        subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, check=True, timeout=60)
        assert "hunter2" not in str([x.headers for x in hub.requests])
    assert [x.name for x in home.rglob("*")] == [".cache", "huggingface", "token"]
