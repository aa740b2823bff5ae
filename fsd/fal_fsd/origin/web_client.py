"""One HTTP client for all origins: proxies, private authorities, redirects followed by our rules.

A redirect may lead to another host (stores keep large files on a CDN), but then it goes without our credentials; never
from https to http, never more than five times. Errors name the file by its label; an address may hold a signature and
appears in no error and no log line.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    ORIGIN_CONNECT_TIMEOUT_S,
    ORIGIN_REDIRECTS_MAX,
    ORIGIN_SILENCE_MAX_S,
)
from fal_fsd.origin.answers import cut_short, unavailable
from fal_fsd.origin.credentials import Credentials

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_READ_BUFFER_BYTES: Final = 256 << 10  # aiohttp stops reading the socket at twice as much
_HEADER_BYTES_MAX: Final = 16 << 10  # signed addresses are long
_ERROR_TEXT_BYTES: Final = 2048


@dataclass(frozen=True)
class Target:
    """Where a file's bytes are. `url` may be signed and `headers` hold credentials: neither is ever shown."""

    url: str = field(repr=False)
    label: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class WebClient:
    """Connections to one origin and where it redirects to. Of one event loop."""

    def __init__(
        self, credentials: Credentials, *, connections_max: int, silence_max_s: float = ORIGIN_SILENCE_MAX_S
    ) -> None:
        self._proxies = credentials.of("proxy")
        self._ca_file = str(credentials.of("tls").get("ca_file", ""))
        self._connections_max = connections_max
        self._silence_max_s = silence_max_s
        self._session: aiohttp.ClientSession | None = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        """End all connections; the client is of no use afterwards."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def get(self, target: Target, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET, whatever its status, behind all redirects; ended when the block is left.

        Raises UNAVAILABLE (retryable), CORRUPT when the body ends early, UNAUTHENTICATED for a certificate or a proxy
        that says no, INVALID for a redirect that is not followed. The same errors come out of reading the body.
        """
        session = await self._ready()
        async with _as_fal_errors(target.label):
            response = await self._follow(session, target, headers)
            try:
                yield response
            finally:
                # Closing, not releasing: what is left of a body is not wanted. A body read to its end has released
                # its connection already.
                response.close()

    async def _follow(
        self, session: aiohttp.ClientSession, target: Target, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        from yarl import URL

        url, trusted = URL(target.url, encoded=True), True
        for _ in range(ORIGIN_REDIRECTS_MAX + 1):
            sent = {"Accept-Encoding": "identity", **headers, **(target.headers if trusted else {})}
            proxy = proxy_of(url.scheme, url.host or "", self._proxies)
            response = await session.get(url, headers=sent, allow_redirects=False, proxy=proxy)
            location = response.headers.get("Location", "")
            if response.status not in _REDIRECTS or not location:
                return response
            response.close()
            there = _redirected(url, location, target.label)
            trusted = trusted and there.origin() == url.origin()
            url = there
        raise invalid(
            "uri", target.label, f"redirects more than {ORIGIN_REDIRECTS_MAX} times", remedy="Check the server."
        )

    async def _ready(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._session is None:
                # The first import takes 0.3 s, reading the authorities tens of milliseconds: not on the loop.
                context = await asyncio.to_thread(_prepared, self._ca_file)
                import aiohttp

                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=self._connections_max, ssl=context),
                    timeout=aiohttp.ClientTimeout(
                        total=None, sock_connect=ORIGIN_CONNECT_TIMEOUT_S, sock_read=self._silence_max_s
                    ),
                    headers={"User-Agent": "falctl"},
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    trust_env=False,
                    read_bufsize=_READ_BUFFER_BYTES,
                    max_line_size=_HEADER_BYTES_MAX,
                    max_field_size=_HEADER_BYTES_MAX,
                )
        return self._session


async def error_text(response: aiohttp.ClientResponse) -> str:
    """The first bytes of an error's body, which may name its cause."""
    try:
        return (await response.content.read(_ERROR_TEXT_BYTES)).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def _prepared(ca_file: str) -> ssl.SSLContext:
    importlib.import_module("aiohttp")
    return tls_context(ca_file)


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Trusts what the system trusts and the authorities in `ca_file`. Raises INVALID. Blocks on the disk."""
    try:
        return _made_context(ca_file, os.stat(ca_file).st_mtime_ns if ca_file else 0)
    except OSError as exc:
        why = exc.strerror or "it holds no certificate"
        raise invalid("ca_file", ca_file, f"cannot be read: {why}", remedy="Name a PEM file.") from None


@lru_cache(maxsize=8)
def _made_context(ca_file: str, changed_ns: int) -> ssl.SSLContext:
    """Made once for each state of the file: reading the system's authorities costs 30 ms."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(cafile=ca_file)
    return context


def proxy_of(scheme: str, host: str, proxies: Mapping[str, str]) -> str | None:
    """The proxy for a host, or None; `no_proxy` lists hosts, domains (with all below them) and networks."""
    proxy = proxies.get(scheme, "")
    if not proxy:
        return None
    host = host.lower().strip("[]")
    for entry in (x.strip().lower() for x in proxies.get("no_proxy", "").split(",")):
        bare = entry.removeprefix("*").removeprefix(".")
        if entry == "*" or (bare and (host == bare or host.endswith(f".{bare}"))) or _in_network(host, entry):
            return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _in_network(host: str, network: str) -> bool:
    try:
        return "/" in network and ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _redirected(url: URL, location: str, label: str) -> URL:
    from yarl import URL

    try:
        there = url.join(URL(location, encoded=True))
        secure = there.scheme == "https" or (there.scheme == "http" and url.scheme == "http")
        good = secure and bool(there.host) and there.user is None
    except ValueError:
        good = False
    if not good:
        raise invalid(
            "uri", label, "redirects to another scheme or to no address", remedy="Give the file's last address."
        )
    return there


@asynccontextmanager
async def _as_fal_errors(label: str) -> AsyncIterator[None]:
    """Network errors as ours. None keeps the original: its text may hold the address."""
    import aiohttp

    try:
        yield
    except TimeoutError:
        raise unavailable(label, "was silent for too long") from None
    except aiohttp.ClientPayloadError:
        raise cut_short(label) from None
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as exc:
        raise _untrusted(label, exc) from None
    except aiohttp.ClientHttpProxyError as exc:
        raise _proxy_refused(label, exc.status) from None
    except aiohttp.ClientConnectionError as exc:
        why = getattr(exc, "strerror", None) or "the connection ended"
        raise unavailable(label, f"does not answer: {why}") from None
    except aiohttp.InvalidURL:
        raise invalid("uri", label, "has an address that cannot be used", remedy="Check the endpoint.") from None
    except aiohttp.ClientError:
        raise unavailable(label, "does not speak HTTP") from None


def _untrusted(label: str, exc: Exception) -> FalError:
    reason = getattr(getattr(exc, "certificate_error", exc), "verify_message", "") or "TLS failed"
    return FalError(
        Code.UNAUTHENTICATED,
        f"the server of {label} is not trusted: {reason}",
        remedy="Name its authority: [tls] ca_file in the credentials file, or SSL_CERT_FILE.",
        field="uri",
    )


def _proxy_refused(label: str, status: int) -> FalError:
    if status >= 500:
        return unavailable(label, f"is not reached by the proxy ({status})")
    code = Code.UNAUTHENTICATED if status in (401, 407) else Code.PERMISSION_DENIED
    return FalError(
        code,
        f"the proxy refuses to connect to the origin of {label} ({status})",
        remedy="Check [proxy] in the credentials file, or HTTPS_PROXY.",
        field="proxy",
    )


__all__ = ["Target", "WebClient", "error_text", "proxy_of", "tls_context"]
