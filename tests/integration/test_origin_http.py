"""Reading from web servers, good ones and bad ones."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError
from fal_fsd.origin import Credentials, Listing, Origin, OriginBusy, list_origin, parse_uri
from fal_fsd.origin.web import PlainOrigin
from origin_servers import Authority, ConnectProxy, Faults, HttpOrigin, make_authority, write_secret

DATA = os.urandom(3_000_000)
NOTHING = Credentials()
_T = TypeVar("_T")


class AtOnce(random.Random):
    """No waiting between attempts."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0


class Taken:
    """A sink that keeps what it got, and in which threads."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.threads: set[int] = set()
        self.blocks: list[int] = []
        self.first = threading.Event()

    def __call__(self, block: memoryview) -> None:
        self.data += block
        self.threads.add(threading.get_ident())
        self.blocks.append(len(block))
        self.first.set()


def opened(listing: Listing, credentials: Credentials = NOTHING, *, silence_max_s: float = 20.0) -> PlainOrigin:
    return PlainOrigin(parse_uri(listing.uri), credentials, rng=AtOnce(), silence_max_s=silence_max_s)


def reading(
    web: HttpOrigin, use: Callable[[Origin, ArtifactFile], Awaitable[_T]], *, silence_max_s: float = 20.0
) -> _T:
    """List `m.safetensors` of a server, open it, use it, close it."""

    async def scenario() -> _T:
        listing = await list_origin(f"{web.url}m.safetensors", credentials=NOTHING)
        origin = opened(listing, silence_max_s=silence_max_s)
        try:
            return await use(origin, listing.files[0])
        finally:
            await origin.close()

    return asyncio.run(scenario())


async def fetched(origin: Origin, file: ArtifactFile, offset: int = 0, length: int = -1) -> bytes:
    taken = Taken()
    await origin.read(file, offset, file.size_bytes - offset if length < 0 else length, taken)
    return bytes(taken.data)


async def failed(origin: Origin, file: ArtifactFile, offset: int = 0, length: int = -1) -> FalError:
    with pytest.raises(FalError) as caught:
        await fetched(origin, file, offset, length)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("faults", [Faults(), Faults(ranges_as_200=True), Faults(etag="weak"), Faults(etag="none")])
def test_ranges_come_as_they_are(faults: Faults) -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        loop_thread, taken = threading.get_ident(), Taken()
        await origin.read(file, 0, len(DATA), taken)
        assert taken.data == DATA
        assert loop_thread not in taken.threads
        assert max(taken.blocks) <= 1 << 20
        parts = await asyncio.gather(*(fetched(origin, file, at, 100_000) for at in range(0, 3_000_000, 100_000)))
        assert b"".join(parts) == DATA
        assert await fetched(origin, file, len(DATA) - 1, 1) == DATA[-1:]
        assert await fetched(origin, file, 5, 0) == b""
        assert origin.bytes_read == 2 * len(DATA) + 1
        assert await origin.supports_ranges(file)
        assert (await failed(origin, file, 1, len(DATA))).field == "range"

    with HttpOrigin({"m.safetensors": DATA}, faults) as web:
        reading(web, use)


def test_a_server_without_ranges_gives_whole_files_only() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        assert not await origin.supports_ranges(file)
        assert await fetched(origin, file) == DATA
        error = await failed(origin, file, 10, 10)
        assert error.code is Code.FAILED_PRECONDITION
        assert "one pass" in error.remedy
        assert (await failed(origin, file, 10)).code is Code.FAILED_PRECONDITION

    with HttpOrigin({"m.safetensors": DATA}, Faults(ranges=False)) as web:
        reading(web, use)


def test_a_whole_file_that_broke_off_is_read_again_from_the_start_where_there_are_no_ranges() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.cut_after = [2_000_000]
        assert await fetched(origin, file) == DATA
        assert origin.bytes_read > len(DATA)
        # It does not go on for ever.
        web.faults.cut_after = [1_000_000] * 50
        asked = len(web.requests)
        assert (await failed(origin, file)).code is Code.CORRUPT
        assert len(web.requests) - asked == 5

    with HttpOrigin({"m.safetensors": DATA}, Faults(ranges=False)) as web:
        reading(web, use)


def test_a_broken_connection_is_resumed_where_it_was() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.cut_after = [500_000, 0, 100_000, 1_000_000]
        assert await fetched(origin, file) == DATA
        begins = [int(x.headers["Range"].removeprefix("bytes=").split("-")[0]) for x in web.requests[-5:]]
        assert begins[0] == 0 < begins[-1]
        assert begins == sorted(begins)
        # What the connection held when it broke is lost, at most a buffer of 512 KiB each time; and it is counted.
        assert len(DATA) <= origin.bytes_read <= web.bytes_sent <= len(DATA) + 3 * (512 << 10)

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


def test_a_server_that_always_ends_early_is_given_up() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.cut_after = [0] * 5
        assert (await failed(origin, file)).code is Code.CORRUPT
        assert web.faults.cut_after == []

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        (Faults(length_lie=10), Code.CORRUPT),
        (Faults(more_bytes=10), Code.CORRUPT),
        (Faults(range_lie=1), Code.CONFLICT),
        (Faults(etag="nothing"), Code.CONFLICT),
        (Faults(encoding="gzip"), Code.INVALID),
        (Faults(answers=[(404, {}, "")]), Code.NOT_FOUND),
        (Faults(answers=[(403, {}, "")]), Code.PERMISSION_DENIED),
        (Faults(answers=[(401, {}, "")]), Code.UNAUTHENTICATED),
        (Faults(answers=[(500, {}, "")] * 5), Code.UNAVAILABLE),
        (Faults(redirect="{path}"), Code.INVALID),
        (Faults(redirect="ftp://127.0.0.1/x"), Code.INVALID),
        (Faults(redirect="http://user:hunter2@127.0.0.1/x"), Code.INVALID),
    ],
)
def test_what_a_server_does_wrong_is_one_error(faults: Faults, code: Code) -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults = faults
        error = await failed(origin, file, 1000, 100_000)
        assert error.code is code
        assert "hunter2" not in str(error)

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("etag", ["strong", "none"])
def test_a_file_that_changes_under_us(etag: str, ignores: bool) -> None:
    """Also when the server does not know conditions, and when the change comes in the middle of a read."""

    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.put("m.safetensors", bytes(len(DATA)))
        assert (await failed(origin, file, 10, 10)).code is Code.CONFLICT
        web.put("m.safetensors", DATA[:-1])
        assert (await failed(origin, file, 10, 10)).code is Code.CONFLICT

    async def midway(origin: Origin, file: ArtifactFile) -> None:
        web.faults.cut_after, web.faults.stall_after = [2_000_000], 3 << 19
        seen = bytearray()

        def sink(block: memoryview) -> None:
            if not seen:
                web.put("m.safetensors", bytes(len(DATA)))
                web.faults.go.set()
            seen.extend(block)

        with pytest.raises(FalError) as caught:
            await origin.read(file, 0, len(DATA), sink)
        assert caught.value.code is Code.CONFLICT
        assert seen == DATA[: len(seen)]

    for scenario in (use, midway):
        with HttpOrigin({"m.safetensors": DATA}, Faults(etag=etag, ignore_conditions=ignores)) as web:
            reading(web, scenario)


def test_retry_after_is_honoured_or_handed_on() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.answers = [(429, {"Retry-After": "0"}, ""), (503, {"Retry-After": "0"}, "")]
        assert await fetched(origin, file) == DATA
        web.faults.answers = [(429, {"Retry-After": "120"}, "")]
        asked = len(web.requests)
        error = await failed(origin, file)
        assert isinstance(error, OriginBusy)
        assert (error.code, error.retry_s) == (Code.BUSY, 120.0)
        assert len(web.requests) == asked + 1
        web.faults.answers = [(503, {"Retry-After": "Thu, 01 Jan 2150 00:00:00 GMT"}, "")]
        error = await failed(origin, file)
        assert isinstance(error, OriginBusy)
        assert (error.code, error.retry_s) == (Code.UNAVAILABLE, 300.0)

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


def test_a_silent_server_is_left_and_asked_again() -> None:
    async def comes_on(origin: Origin, file: ArtifactFile) -> None:
        # Each answer brings a MiB before it stalls.
        web.faults.stall_after = 1 << 20
        assert await fetched(origin, file) == DATA

    async def never(origin: Origin, file: ArtifactFile) -> None:
        web.faults.stall_after = 0
        error = await failed(origin, file)
        assert error.code is Code.UNAVAILABLE
        assert "silent" in error.what

    for scenario, silence_max_s in ((comes_on, 1.0), (never, 0.1)):
        with HttpOrigin({"m.safetensors": DATA}) as web:
            reading(web, scenario, silence_max_s=silence_max_s)


def test_a_server_that_is_gone_is_unavailable() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> tuple[str, ArtifactFile]:
        return str(origin.uri), file

    with HttpOrigin({"m.safetensors": DATA}) as web:
        uri, file = reading(web, use)

    async def later() -> None:
        origin = PlainOrigin(parse_uri(uri), NOTHING, rng=AtOnce())
        assert (await failed(origin, file)).code is Code.UNAVAILABLE
        await origin.close()

    asyncio.run(later())


def test_a_cancelled_read_calls_its_sink_no_more() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.stall_after = 2 << 20
        taken = Taken()
        task = asyncio.create_task(origin.read(file, 0, len(DATA), taken))
        await asyncio.to_thread(taken.first.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held = len(taken.data)
        web.faults.stall_after = -1
        web.faults.go.set()
        assert await fetched(origin, file) == DATA
        assert len(taken.data) == held
        assert taken.data == DATA[:held]
        assert origin.bytes_read >= len(DATA) + held

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


@pytest.mark.parametrize("error", [TimeoutError("disk"), FalError(Code.UNAVAILABLE, "disk full", remedy="Free some.")])
def test_what_the_sink_raises_comes_out_unchanged(error: Exception) -> None:
    def sink(block: memoryview) -> None:
        raise error

    async def use(origin: Origin, file: ArtifactFile) -> None:
        asked = len(web.requests)
        with pytest.raises(type(error)) as caught:
            await origin.read(file, 0, len(DATA), sink)
        assert caught.value is error
        assert len(web.requests) == asked + 1
        assert await fetched(origin, file) == DATA

    with HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


def test_credentials_go_to_their_host_and_not_behind_a_redirect(tmp_path: Path) -> None:
    with HttpOrigin({"m.safetensors": DATA}) as cdn, HttpOrigin({"m.safetensors": DATA}) as web:
        web.faults.authorization = "Bearer hunter2"
        text = f'[https."127.0.0.1:{web.port}"]\nbearer = "hunter2"\nheaders = {{ X-Key = "hunter3" }}\n'
        credentials = Credentials.load(write_secret(tmp_path / "c.toml", text), {})

        async def scenario() -> None:
            with pytest.raises(FalError) as caught:
                await list_origin(f"{web.url}m.safetensors", credentials=NOTHING)
            assert caught.value.code is Code.UNAUTHENTICATED
            listing = await list_origin(f"{web.url}m.safetensors", credentials=credentials)
            web.faults.redirect = f"{cdn.url[:-1]}{{path}}"
            origin = opened(listing, credentials)
            assert await fetched(origin, listing.files[0]) == DATA
            asked = len(web.requests)
            assert await fetched(origin, listing.files[0], 7, 7) == DATA[7:14]
            await origin.close()
            # The way was remembered.
            assert len(web.requests) == asked

        asyncio.run(scenario())
        assert len(cdn.requests) == 2
        assert "hunter" not in str([x.headers for x in cdn.requests])
        assert "hunter3" in str(web.requests[-1].headers)


def test_a_remembered_way_that_is_refused_is_asked_for_anew() -> None:
    async def use(origin: Origin, file: ArtifactFile) -> None:
        web.faults.redirect = f"{cdn.url}signed-1"
        cdn.put("signed-1", DATA)
        assert await fetched(origin, file, 0, 10) == DATA[:10]
        del cdn.files["signed-1"]
        cdn.put("signed-2", DATA)
        web.faults.redirect = f"{cdn.url}signed-2"
        assert await fetched(origin, file, 10, 10) == DATA[10:20]
        del cdn.files["signed-2"]
        assert (await failed(origin, file, 10, 10)).code is Code.NOT_FOUND

    with HttpOrigin({}) as cdn, HttpOrigin({"m.safetensors": DATA}) as web:
        reading(web, use)


def test_a_folder_is_listed_by_its_list() -> None:
    with HttpOrigin({"m/unet/a b.safetensors": DATA, "m/empty.json": b"", "other": b"x"}) as web:
        web.put_list("m/")

        async def scenario() -> None:
            listing = await list_origin(f"{web.url}m/", credentials=NOTHING)
            assert [(x.path, x.size_bytes) for x in listing.files] == [
                ("empty.json", 0),
                ("unet/a b.safetensors", len(DATA)),
            ]
            assert all(len(x.sha256) == 32 and x.version for x in listing.files)
            origin = opened(listing)
            assert await fetched(origin, listing.files[1], 9, 9) == DATA[9:18]
            assert await fetched(origin, listing.files[0]) == b""
            await origin.close()
            web.put("m/empty.json", b"not any more")
            with pytest.raises(FalError, match="changed") as caught:
                await list_origin(f"{web.url}m/", credentials=NOTHING)
            assert caught.value.code is Code.CONFLICT

        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "faults", "code", "says"),
    [
        ("none.safetensors", Faults(), Code.NOT_FOUND, "none.safetensors"),
        ("folder/", Faults(), Code.NOT_FOUND, "falctl-files.json"),
        ("m.ckpt", Faults(), Code.INVALID, "pickle"),
        ("m.safetensors", Faults(disposition='attachment; filename="x.ckpt"'), Code.INVALID, "pickle"),
        ("m.safetensors", Faults(etag="nothing"), Code.INVALID, "neither ETag nor Last-Modified"),
        ("m.safetensors", Faults(ranges=False, more_bytes=1), Code.INVALID, "no length"),
        ("m.safetensors", Faults(redirect="/m.safetensors"), Code.INVALID, "redirects more than 5"),
        ("m.safetensors", Faults(answers=[(429, {"Retry-After": "99"}, "")]), Code.BUSY, "patience"),
    ],
)
def test_what_cannot_be_listed(path: str, faults: Faults, code: Code, says: str) -> None:
    with HttpOrigin({"m.safetensors": DATA, "m.ckpt": DATA}, faults) as web:
        with pytest.raises(FalError) as caught:
            asyncio.run(list_origin(f"{web.url}{path}", credentials=NOTHING))
        assert caught.value.code is code
        assert says in caught.value.what


def test_listing_ends_in_time() -> None:
    with HttpOrigin({"falctl-files.json": b'{"files": [' + b" " * 100_000}, Faults(stall_after=0)) as web:
        with pytest.raises(FalError) as caught:
            asyncio.run(list_origin(web.url, credentials=NOTHING, timeout_s=0.2))
        assert caught.value.code is Code.TIMEOUT


def test_unencrypted_hosts_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(FalError, match="not encrypted"):
        asyncio.run(list_origin("http://example.invalid/x", credentials=NOTHING))
    # "0.0.0.0" is this machine, too, but no loopback address.
    with HttpOrigin({"m.safetensors": DATA}, host="0.0.0.0") as web:
        allowed = Credentials.load(write_secret(tmp_path / "c.toml", web.credentials_toml()), {})
        assert asyncio.run(list_origin(f"{web.url}m.safetensors", credentials=allowed)).files[0].size_bytes == len(DATA)
        with pytest.raises(FalError, match="not encrypted"):
            asyncio.run(list_origin(f"{web.url}m.safetensors", credentials=NOTHING))


def test_a_revision_means_nothing_to_a_web_server() -> None:
    with pytest.raises(FalError, match="Only hf://"):
        asyncio.run(list_origin("https://example.invalid/x", revision="main", credentials=NOTHING))


def test_a_private_authority_and_a_proxy(tmp_path: Path) -> None:
    authority: Authority = make_authority(tmp_path)
    with HttpOrigin({"m.safetensors": DATA}, tls=authority.tls) as web, ConnectProxy(user="u:hunter2") as proxy:
        uri = f"{web.url}m.safetensors"

        async def listed(env: dict[str, str]) -> Listing:
            credentials = Credentials.load(None, env)
            listing = await list_origin(uri, credentials=credentials)
            origin = opened(listing, credentials)
            assert await fetched(origin, listing.files[0], 100, 2_000_000) == DATA[100:2_000_100]
            await origin.close()
            return listing

        trusted = {"SSL_CERT_FILE": str(authority.ca_file)}
        with pytest.raises(FalError, match="not trusted") as caught:
            asyncio.run(listed({}))
        assert caught.value.code is Code.UNAUTHENTICATED
        assert "ca_file" in caught.value.remedy
        direct = asyncio.run(listed(trusted))
        assert proxy.connects == []
        assert asyncio.run(listed(trusted | {"HTTPS_PROXY": proxy.url})) == direct
        assert proxy.connects == [f"127.0.0.1:{web.port}"] * 2
        asyncio.run(listed(trusted | {"HTTPS_PROXY": proxy.url, "NO_PROXY": "127.0.0.0/8"}))
        assert len(proxy.connects) == 2
        with pytest.raises(FalError, match="proxy refuses") as caught:
            asyncio.run(listed(trusted | {"HTTPS_PROXY": proxy.url.replace("hunter2", "hunter3")}))
        assert caught.value.code is Code.UNAUTHENTICATED
        assert "hunter" not in str(caught.value)
        with pytest.raises(FalError, match="ca_file"):
            asyncio.run(listed({"SSL_CERT_FILE": str(tmp_path / "none.pem")}))
