"""Object stores: s3:// against rclone's server; gs:// and az:// against the wire format of theirs."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import GenericError

from fal_contract.errors import Code, FalError
from fal_fsd.origin import Credentials, Listing, list_origin, open_origin, parse_uri
from fal_fsd.origin.stores import StoreOrigin, as_fal_errors
from origin_servers import CountingRelay, HttpOrigin, S3Server, s3_bucket, why_no_s3, write_secret

DATA = os.urandom(3_000_000)
needs_s3 = pytest.mark.skipif(bool(why_no_s3()), reason=why_no_s3())


@dataclass(frozen=True)
class Store:
    server: S3Server
    folder: Path
    credentials: Credentials


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("s3")
    files = {"x/m.safetensors": DATA, "x/unet/config json.json": b"{}", "x/empty": b"", "y/m.ckpt": b"x", "xx/z": b"z"}
    with s3_bucket(folder, files) as server:
        home = tmp_path_factory.mktemp("secrets")
        yield Store(server, folder, Credentials.load(server.credentials_file(home), {}))


async def read_all(listing: Listing, known: Credentials, *, part: int = 700_000) -> dict[str, bytes]:
    origin = open_origin(listing.uri, known)
    found: dict[str, bytes] = {}
    try:
        for file in listing.files:
            taken = bytearray()
            for at in range(0, file.size_bytes, part):
                await origin.read(file, at, min(part, file.size_bytes - at), taken.extend)
            found[file.path] = bytes(taken)
    finally:
        await origin.close()
    assert origin.bytes_read == sum(x.size_bytes for x in listing.files)
    return found


@needs_s3
def test_a_folder_of_a_bucket(store: Store) -> None:
    before = store.server.bytes_sent
    for uri in ("s3://models/x", "s3://models/x/"):
        listing = asyncio.run(list_origin(uri, credentials=store.credentials))
        assert listing.uri == "s3://models/x/"
        assert [x.path for x in listing.files] == ["empty", "m.safetensors", "unet/config json.json"]
        assert listing.files[1].version == f'"{hashlib.md5(DATA).hexdigest()}"'
    found = asyncio.run(read_all(listing, store.credentials))
    assert found == {"m.safetensors": DATA, "unet/config json.json": b"{}", "empty": b""}
    assert len(DATA) <= store.server.bytes_sent - before < len(DATA) + 100_000


@needs_s3
def test_one_object(store: Store) -> None:
    listing = asyncio.run(list_origin("s3://models/x/m.safetensors", credentials=store.credentials))
    assert listing.uri == "s3://models/x/m.safetensors"
    assert asyncio.run(read_all(listing, store.credentials)) == {"m.safetensors": DATA}


@needs_s3
@pytest.mark.parametrize(
    ("uri", "code", "says"),
    [
        ("s3://models/nothing", Code.INVALID, "holds no file"),
        ("s3://models/y", Code.INVALID, "m.ckpt"),
        ("s3://no-such-bucket/x", Code.NOT_FOUND, "NoSuchBucket"),
    ],
)
def test_what_is_not_there(store: Store, uri: str, code: Code, says: str) -> None:
    with pytest.raises(FalError) as caught:
        asyncio.run(list_origin(uri, credentials=store.credentials))
    assert caught.value.code is code
    assert says in caught.value.what


@needs_s3
def test_wrong_keys_are_refused_and_not_shown(store: Store, tmp_path: Path) -> None:
    text = store.server.credentials_toml().replace(S3Server.secret_access_key, "hunter2")
    wrong = Credentials.load(write_secret(tmp_path / "c.toml", text), {})
    listing = asyncio.run(list_origin("s3://models/x/", credentials=store.credentials))
    for attempt in (list_origin("s3://models/x/", credentials=wrong), read_all(listing, wrong)):
        with pytest.raises(FalError) as caught:
            asyncio.run(attempt)
        assert caught.value.code is Code.PERMISSION_DENIED
        assert "SignatureDoesNotMatch" in caught.value.what
        for secret in ("hunter2", S3Server.access_key_id, "X-Amz"):
            assert secret not in str(caught.value)


@needs_s3
def test_an_object_that_changes_is_a_conflict(store: Store) -> None:
    """Although this server ignores If-Match."""
    place = store.folder / "models/changing/m.safetensors"
    place.parent.mkdir()
    place.write_bytes(DATA)
    listing = asyncio.run(list_origin("s3://models/changing", credentials=store.credentials))
    place.write_bytes(bytes(len(DATA)))
    with pytest.raises(FalError) as caught:
        asyncio.run(read_all(listing, store.credentials))
    assert caught.value.code is Code.CONFLICT
    place.unlink()
    with pytest.raises(FalError) as caught:
        asyncio.run(read_all(listing, store.credentials))
    assert caught.value.code is Code.NOT_FOUND


@needs_s3
def test_a_connection_that_is_cut_is_resumed(store: Store) -> None:
    listing = asyncio.run(list_origin("s3://models/x/m.safetensors", credentials=store.credentials))

    async def scenario() -> bytes:
        origin = open_origin(listing.uri, store.credentials)
        taken = bytearray()

        def sink(block: memoryview) -> None:
            if not taken:
                store.server.relay.cut()
            taken.extend(block)

        await origin.read(listing.files[0], 0, len(DATA), sink)
        await origin.close()
        return bytes(taken)

    assert asyncio.run(scenario()) == DATA


def test_a_store_that_is_gone_is_unavailable() -> None:
    with CountingRelay(1) as relay:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", **keys}
        with pytest.raises(FalError) as caught:
            asyncio.run(list_origin("s3://models/x", credentials=Credentials.load(None, env), timeout_s=0.5))
    assert caught.value.code in (Code.UNAVAILABLE, Code.TIMEOUT)


def test_without_credentials_the_remedy_names_them() -> None:
    """What obstore says where a machine has no identity; asking for one here would leave this machine."""
    told = GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 2ms - HTTP error")
    with pytest.raises(FalError) as caught, as_fal_errors("s3://models/x", 0.0):
        raise told
    assert caught.value.code is Code.UNAUTHENTICATED
    assert "anonymous" in caught.value.remedy


class CloudServer(HttpOrigin):
    """Lists like Google's and Azure's stores (XML), and serves objects. Signatures are looked at, not computed."""

    asked_for: tuple[str, str] = ("", "")  # a header or query key, and what must be in it

    def special(self, path: str, headers: Any) -> tuple[int, dict[str, str], str] | None:
        key, value = self.asked_for
        told = headers.get("Authorization", "")
        if key and value not in headers.get(key, "") and value not in path and "SharedKey" not in told:
            return 403, {}, "<Error><Code>AuthenticationFailed</Code></Error>"
        if "list-type=2" in path:
            return 200, {}, self._s3_list()
        if "comp=list" in path:
            return 200, {}, self._azure_list()
        return super().special(path, headers)

    def _names(self) -> dict[str, bytes]:
        return {x.partition("models/")[2]: y for x, y in self.files.items()}

    def _s3_list(self) -> str:
        rows = "".join(
            f"<Contents><Key>{x}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{hashlib.md5(y).hexdigest()}"</ETag><Size>{len(y)}</Size></Contents>'
            for x, y in self._names().items()
        )
        return f"<ListBucketResult><Name>models</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"

    def _azure_list(self) -> str:
        rows = "".join(
            f"<Blob><Name>{x}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>"
            f"<Content-Length>{len(y)}</Content-Length><Etag>{hashlib.md5(y).hexdigest()}</Etag>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for x, y in self._names().items()
        )
        return f"<EnumerationResults><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>"


@pytest.mark.parametrize(
    ("keys", "asked_for"),
    [
        ('token = "hunter2"', ("Authorization", "Bearer hunter2")),
        ("anonymous = true", ("", "")),
    ],
)
def test_google(tmp_path: Path, keys: str, asked_for: tuple[str, str]) -> None:
    with CloudServer({"models/x/m.safetensors": DATA, "models/x/unet": b""}) as cloud:
        cloud.put("models/x/unet/a.json", b"{}")
        cloud.asked_for = asked_for
        text = f'[gs]\nendpoint = "{cloud.url[:-1]}"\n{keys}\n'
        known = Credentials.load(write_secret(tmp_path / "c.toml", text), {})
        listing = asyncio.run(list_origin("gs://models/x/", credentials=known))
        # The empty object only marks a folder.
        assert [x.path for x in listing.files] == ["m.safetensors", "unet/a.json"]
        assert asyncio.run(read_all(listing, known)) == {"m.safetensors": DATA, "unet/a.json": b"{}"}


@pytest.mark.parametrize(
    ("keys", "asked_for"),
    [
        ('account_key = "aHVudGVyMg=="', ("Authorization", "sig=")),
        ('sas_token = "?sv=2022&sig=hunter2"', ("", "")),
        ('token = "hunter2"', ("Authorization", "Bearer hunter2")),
    ],
)
def test_azure(tmp_path: Path, keys: str, asked_for: tuple[str, str]) -> None:
    with CloudServer({"account1/models/x/m.safetensors": DATA, "account1/models/x/a b.json": b"{}"}) as cloud:
        text = f'[az.account1]\nendpoint = "{cloud.url}account1"\n{keys}\n'
        known = Credentials.load(write_secret(tmp_path / "c.toml", text), {})
        listing = asyncio.run(list_origin("az://account1/models/x/", credentials=known))
        assert [x.path for x in listing.files] == ["a b.json", "m.safetensors"]
        cloud.asked_for = asked_for
        assert asyncio.run(read_all(listing, known)) == {"m.safetensors": DATA, "a b.json": b"{}"}
        # A signature for such a name would be refused; obstore reads it itself.
        assert not any("sig=" in x.path for x in cloud.requests if "account_key" in keys and "a%20b" in x.path)
        assert "hunter2" not in str(listing)


def test_machine_identities_read_through_obstore(tmp_path: Path) -> None:
    """Without keys nothing can be signed here; conditions and places are checked all the same."""
    with CloudServer({"account1/models/x/m.safetensors": DATA}) as cloud:
        # Anonymous, so that obstore does not look for a machine's identity.
        text = f'[az.account1]\nendpoint = "{cloud.url}account1"\nanonymous = true\n'
        known = Credentials.load(write_secret(tmp_path / "c.toml", text), {})
        listing = asyncio.run(list_origin("az://account1/models/x/", credentials=known))

        async def streamed() -> bytes:
            origin = StoreOrigin(parse_uri(listing.uri), known, signed=False)
            taken = bytearray()
            try:
                await origin.read(listing.files[0], 11, 2_000_000, taken.extend)
            finally:
                await origin.close()
            return bytes(taken)

        assert asyncio.run(streamed()) == DATA[11:2_000_011]
        cloud.faults.cut_after = [1_000_000]
        assert asyncio.run(streamed()) == DATA[11:2_000_011]
        for ignores in (False, True):
            cloud.faults.ignore_conditions = ignores
            cloud.put("account1/models/x/m.safetensors", bytes(len(DATA)))
            with pytest.raises(FalError) as caught:
                asyncio.run(streamed())
            assert caught.value.code is Code.CONFLICT
        cloud.files.clear()
        with pytest.raises(FalError) as caught:
            asyncio.run(streamed())
        assert caught.value.code is Code.NOT_FOUND
