"""Files behind https://, and the reading of all origins that speak HTTP.

A folder (final '/') has a list of its files beside them, `falctl-files.json`:

    {"files": [{"path": "unet/model.safetensors", "size_bytes": 123, "sha256": "64 hexadecimal digits"}]}

`size_bytes` and `sha256` may be left out; the server is asked for each file's length and version all the same.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from fal_contract.artifact import ArtifactFile
from fal_contract.clock import Clock
from fal_contract.errors import FalError, invalid
from fal_contract.limits import (
    MODEL_FILES_MAX,
    ORIGIN_CONNECTIONS_MAX,
    ORIGIN_LIST_BYTES_MAX,
    ORIGIN_LOCATION_TTL_S,
    ORIGIN_SILENCE_MAX_S,
)
from fal_contract.model_manifest import check_path
from fal_fsd.origin.answers import (
    Wanted,
    changed,
    check_body,
    check_status,
    condition_of,
    no_ranges,
    overlong,
    size_of,
    version_of,
)
from fal_fsd.origin.credentials import Credentials
from fal_fsd.origin.reading import Body, Origin, patiently
from fal_fsd.origin.uri import LIST_FILE, OriginUri, host_of
from fal_fsd.origin.web_client import Target, WebClient, error_text

if TYPE_CHECKING:
    import aiohttp

_DISPOSITION: Final = re.compile(r"filename=\"?([^\";]{1,255})\"?", re.IGNORECASE)
# An address that was good and is refused now may only be old: signatures end.
_STALE_STATUS: Final = (400, 401, 403, 404, 410)


class HttpOrigin(Origin):
    """Reads ranges over HTTP. A subclass says where a file is and whether answers tell the listed version."""

    hub = False
    tells_version = True

    def __init__(
        self,
        uri: OriginUri,
        credentials: Credentials,
        *,
        connections_max: int = ORIGIN_CONNECTIONS_MAX,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        silence_max_s: float = ORIGIN_SILENCE_MAX_S,
    ) -> None:
        super().__init__(uri, connections_max=connections_max, clock=clock, rng=rng)
        self.credentials = credentials
        self.client = WebClient(credentials, connections_max=connections_max, silence_max_s=silence_max_s)
        self._located: dict[str, tuple[Target, float]] = {}  # path → where it was found, good until
        self._ranges: dict[str, bool] = {}

    async def close(self) -> None:
        await self.client.close()
        await super().close()

    async def supports_ranges(self, file: ArtifactFile) -> bool:
        if file.size_bytes and file.path not in self._ranges:
            await patiently(lambda: self._probe(file), rng=self._rng)
        return self._ranges.get(file.path, True)

    @abstractmethod
    async def _address(self, file: ArtifactFile) -> Target:
        """Where the file is, as the origin names or signs it now."""

    async def _probe(self, file: ArtifactFile) -> None:
        async with self._answer(file, 0, 1) as response:
            self._note_ranges(file, response)

    @asynccontextmanager
    async def _open(self, file: ArtifactFile, offset: int, length: int, *, whole: bool) -> AsyncIterator[Body]:
        version = file.version if self.tells_version else ""
        wanted = Wanted(self.label(file), offset, length, file.size_bytes, version)
        async with self._answer(file, offset, length) as response:
            skip = check_body(response.status, response.headers, wanted)
            self._note_ranges(file, response)
            if not self._ranges[file.path] and not whole:
                raise no_ranges(wanted.label)
            content = response.content
            yield Body(skip, content.iter_any(), lambda: content.total_bytes)

    def _resumes(self, file: ArtifactFile) -> bool:
        return self._ranges.get(file.path, True)

    @asynccontextmanager
    async def _answer(self, file: ArtifactFile, offset: int, length: int) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if self.tells_version:
            headers |= condition_of(file.version)
        async with AsyncExitStack() as stack:
            known = self._known(file)
            target = known or await self._locate(file)
            response = await stack.enter_async_context(self.client.get(target, headers))
            if known is not None and response.status in _STALE_STATUS:
                response.close()
                target = await self._locate(file)
                response = await stack.enter_async_context(self.client.get(target, headers))
            if response.status >= 300:
                text = await error_text(response)
                self._located.pop(file.path, None)
                label, now_s = self.label(file), self._clock.wall_s()
                check_status(response.status, response.headers, label, now_s, hub=self.hub, text=text)
            self._remember(file, target, response)
            yield response

    def _known(self, file: ArtifactFile) -> Target | None:
        target, until_s = self._located.get(file.path, (None, 0.0))
        return target if self._clock.monotonic_s() < until_s else None

    async def _locate(self, file: ArtifactFile) -> Target:
        target = await self._address(file)
        self._located[file.path] = (target, self._clock.monotonic_s() + ORIGIN_LOCATION_TTL_S)
        return target

    def _remember(self, file: ArtifactFile, target: Target, response: aiohttp.ClientResponse) -> None:
        """Where redirects ended, so that each range does not ask a hub for the way again."""
        found = str(response.url)
        if found == target.url or file.path not in self._located:
            return
        trusted = response.url.origin() == type(response.url)(target.url, encoded=True).origin()
        there = Target(found, target.label, target.headers if trusted else {})
        self._located[file.path] = (there, self._located[file.path][1])

    def _note_ranges(self, file: ArtifactFile, response: aiohttp.ClientResponse) -> None:
        self._ranges[file.path] = response.status == 206 or "Content-Range" in response.headers


class PlainOrigin(HttpOrigin):
    """Files of a web server."""

    async def _address(self, file: ArtifactFile) -> Target:
        return web_target(self.uri, self.credentials, file.path)


def web_target(uri: OriginUri, credentials: Credentials, path: str) -> Target:
    """Where `path` of a web server's folder (or its one file) is. Raises INVALID for http:// that is not allowed."""
    options = credentials.of("https", host_of(uri.authority), uri.authority)
    if uri.scheme == "http" and not (uri.is_loopback or options.get("allow_http")):
        raise invalid(
            "uri",
            str(uri),
            "is not encrypted",
            remedy=f'Use https://, or allow it: [https."{uri.authority}"] allow_http = true in the credentials file.',
        )
    headers = {str(key): str(value) for key, value in options.get("headers", {}).items()}
    if "bearer" in options:
        headers["Authorization"] = f"Bearer {options['bearer']}"
    elif "user" in options or "password" in options:
        headers["Authorization"] = basic_auth(str(options.get("user", "")), str(options.get("password", "")))
    where = f"{uri}{quote(path)}" if uri.is_folder else str(uri)
    return Target(where, where, headers)


def basic_auth(user: str, password: str) -> str:
    """Value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class WebLister:
    """Lists one https:// URI. Of one event loop."""

    def __init__(self, uri: OriginUri, credentials: Credentials, rng: random.Random, clock: Clock) -> None:
        self._uri = uri
        self._credentials = credentials
        self._rng = rng
        self._clock = clock
        self._client = WebClient(credentials, connections_max=ORIGIN_CONNECTIONS_MAX)
        self._slots = asyncio.Semaphore(ORIGIN_CONNECTIONS_MAX)

    async def list(self) -> list[ArtifactFile]:
        """Its files. Raises INVALID for a list or a file that cannot be used, and what reading raises."""
        try:
            if not self._uri.is_folder:
                return [await self._look("", None, b"")]
            named = parse_list(await patiently(self._read_list, rng=self._rng), str(self._uri))
            async with asyncio.TaskGroup() as group:
                looks = [group.create_task(self._look(*entry)) for entry in named]
            return [look.result() for look in looks]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            await self._client.close()

    async def _read_list(self) -> bytes:
        target = web_target(self._uri, self._credentials, LIST_FILE)
        async with self._client.get(target, {}) as response:
            await self._check(response, target.label)
            told = bytearray()
            async for chunk in response.content.iter_any():
                told += chunk
                if len(told) > ORIGIN_LIST_BYTES_MAX:
                    raise overlong(target.label)
        return bytes(told)

    async def _look(self, path: str, size_bytes: int | None, sha256: bytes) -> ArtifactFile:
        async with self._slots:
            found = await patiently(lambda: self._ask(path, sha256), rng=self._rng)
        if size_bytes is not None and found.size_bytes != size_bytes:
            raise changed(path, f"the list says {size_bytes} bytes, the server {found.size_bytes}")
        return found

    async def _ask(self, path: str, sha256: bytes) -> ArtifactFile:
        target = web_target(self._uri, self._credentials, path)
        async with self._client.get(target, {"Range": "bytes=0-0"}) as response:
            empty = response.status == 416 and response.headers.get("Content-Range", "").endswith("/0")
            if not empty:
                await self._check(response, target.label)
            size = 0 if empty else size_of(response.status, response.headers)
            if size is None:
                raise invalid(
                    "uri", target.label, "has no length that the server tells", remedy="Serve it with Content-Length."
                )
            version = version_of(response.headers)
            if not version and not sha256:
                raise invalid(
                    "uri",
                    target.label,
                    "has neither ETag nor Last-Modified, so a change would not be seen",
                    remedy=f"Serve one of them, or give its sha256 in {LIST_FILE}.",
                )
            name = path or own_name(self._uri, response.headers.get("Content-Disposition", ""))
        return ArtifactFile(name, size, version, sha256)

    async def _check(self, response: aiohttp.ClientResponse, label: str) -> None:
        text = await error_text(response) if response.status >= 300 else ""
        check_status(response.status, response.headers, label, self._clock.wall_s(), hub=False, text=text)


def own_name(uri: OriginUri, disposition: str) -> str:
    """Name of a file that is listed alone: what the server calls it, else the last part of its address."""
    found = _DISPOSITION.search(disposition)
    name = PurePosixPath(found[1]).name if found else ""
    return name or PurePosixPath(unquote(uri.path.partition("?")[0])).name


def parse_list(told: bytes, label: str) -> list[tuple[str, int | None, bytes]]:
    """(path, size or None, SHA-256 or nothing) of each file in a `falctl-files.json`. Raises INVALID."""

    def wrong(why: str) -> FalError:
        return invalid("uri", f"{label}{LIST_FILE}", why, remedy='Write it as {"files": [{"path": "…"}]}.')

    try:
        files: Any = json.loads(told)["files"]
        entries = [(str(x["path"]), x.get("size_bytes"), bytes.fromhex(x.get("sha256", ""))) for x in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise wrong("is no list of files") from None
    if len(entries) > MODEL_FILES_MAX:
        raise wrong(f"has more than {MODEL_FILES_MAX} files")
    for path, size, sha256 in entries:
        check_path(path)
        if (size is not None and (type(size) is not int or size < 0)) or len(sha256) not in (0, 32):
            raise wrong(f"has a wrong size or sha256 of {path!r}")
    return entries


__all__ = ["HttpOrigin", "PlainOrigin", "WebLister", "basic_auth", "own_name", "parse_list", "web_target"]
