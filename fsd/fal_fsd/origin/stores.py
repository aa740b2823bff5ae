"""Object stores, through obstore: s3://, gs://, az://.

obstore finds credentials (keys, roles of the machine, tokens), lists, and signs an address for each object; ranges are
then read over plain HTTP like any other file, where Retry-After, entity tags and servers that answer a range with 200
are dealt with in one way (obstore 0.12 refuses such a 200, tells no header of an error, and its own retries ignore
Retry-After). Where it cannot sign (machine identities of gs and az, odd names in az), it reads the ranges itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    MODEL_FILES_MAX,
    ORIGIN_BLOCK_BYTES,
    ORIGIN_CONNECT_TIMEOUT_S,
    ORIGIN_SILENCE_MAX_S,
)
from fal_fsd.origin.answers import Wanted, canonical_tag, changed, check_body, check_status, unavailable
from fal_fsd.origin.credentials import Credentials, Options
from fal_fsd.origin.reading import Body
from fal_fsd.origin.uri import OriginUri
from fal_fsd.origin.web import HttpOrigin
from fal_fsd.origin.web_client import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

STORES: Final = ("s3", "gs", "az")
_SIGNED_FOR: Final = timedelta(minutes=30)  # longer than an address is kept
_REQUEST_TIMEOUT_S: Final = 30.0
_STATUS: Final = re.compile(r"status code: (\d{3})")
_SIGNABLE: Final = {
    "gs": ("anonymous", "service_account_file", "service_account_key", "token"),
    "az": ("anonymous", "account_key", "sas_token", "token"),
}
# Where obstore looks last, when it was given nothing.
_METADATA: Final = ("http://169.254.169.254/", "http://metadata.google.internal", "http://169.254.170.")
_AZURE_VERSION: Final = "2021-12-02"


def store_options(uri: OriginUri, credentials: Credentials) -> Options:
    """What the credentials say about this bucket or account."""
    return credentials.of(uri.scheme, uri.authority.partition("/")[0], uri.authority)


def open_store(uri: OriginUri, credentials: Credentials) -> Any:
    """obstore's object for the bucket. Raises INVALID for settings that it refuses. Blocks: it may read files."""
    from obstore import store

    options = store_options(uri, credentials)
    common: dict[str, Any] = {
        "client_options": _client_options(options, credentials),
        # Retries are ours: see the top.
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=_REQUEST_TIMEOUT_S)},
    }
    if options.get("anonymous"):
        common["skip_signature"] = True
    bucket, endpoint = uri.authority, options.get("endpoint")
    try:
        if uri.scheme == "s3":
            keys = ("access_key_id", "secret_access_key", "session_token", "endpoint")
            common |= {key: options[key] for key in keys if options.get(key)}
            return store.S3Store(bucket, region=options.get("region", "us-east-1"), **common)
        if uri.scheme == "gs":
            names = {"service_account_file": "service_account", "token": "bearer_token", "endpoint": "base_url"}
            names["service_account_key"] = "service_account_key"
            common |= {names[key]: options[key] for key in names if options.get(key)}
            return store.GCSStore(bucket, **common)
        names = {"account_key": "account_key", "sas_token": "sas_key", "token": "token"}
        common |= {names[key]: options[key] for key in names if options.get(key)}
        account, _, container = bucket.partition("/")
        if endpoint:
            common["endpoint"] = endpoint
        return store.AzureStore(container_name=container, account_name=account, **common)
    except (ValueError, OSError, _base_error()):
        # Its text may quote what it could not read.
        raise invalid(
            "credentials", f"[{uri.scheme}]", f"cannot be used for {uri}", remedy="Check the keys of this section."
        ) from None


def _client_options(options: Options, credentials: Credentials) -> dict[str, Any]:
    made: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=ORIGIN_CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=ORIGIN_SILENCE_MAX_S),
        # Of a whole request: a stream of one range must fit.
        "timeout": timedelta(hours=1),
        "user_agent": "falctl",
    }
    endpoint = urlsplit(str(options.get("endpoint", "")))
    if options.get("allow_http") or endpoint.hostname in ("127.0.0.1", "localhost", "::1"):
        made["allow_http"] = True
    ca_file, proxies = credentials.of("tls").get("ca_file"), credentials.of("proxy")
    if ca_file:
        made["root_certificate"] = _read_ca(str(ca_file))
    proxy = proxies.get("http" if endpoint.scheme == "http" else "https")
    if proxy:
        made["proxy_url"] = proxy if "://" in proxy else f"http://{proxy}"
        if proxies.get("no_proxy"):
            made["proxy_excludes"] = proxies["no_proxy"]
    return made


def _read_ca(ca_file: str) -> bytes:
    try:
        with open(ca_file, "rb") as opened:
            return opened.read(1 << 20)
    except OSError as exc:
        raise invalid("ca_file", ca_file, f"cannot be read: {exc.strerror}", remedy="Name a PEM file.") from None


async def list_store(uri: OriginUri, store: Any, now_s: float) -> tuple[OriginUri, list[ArtifactFile]]:
    """The object of that name, or all below that folder, with the URI that says which of both it is."""
    import obstore

    if not uri.is_folder:
        with as_fal_errors(str(uri), now_s):
            try:
                meta = await obstore.head_async(store, uri.path)
            except FileNotFoundError:
                meta = None
        if meta is not None:
            return uri, [_file(meta, uri.path.rpartition("/")[0])]
    folder = uri.as_folder() if uri.path else uri
    files: list[ArtifactFile] = []
    with as_fal_errors(str(uri), now_s):
        async for metas in obstore.list(store, folder.path or None, chunk_size=1000):
            files += [_file(x, folder.path.rstrip("/")) for x in metas if x["path"].startswith(folder.path)]
            if len(files) > 2 * MODEL_FILES_MAX:
                raise invalid("uri", str(uri), "has too many files", remedy=f"A model has at most {MODEL_FILES_MAX}.")
    # Consoles mark folders by empty objects of their names.
    folders = {x.path[:at] for x in files for at, char in enumerate(x.path) if char == "/"}
    return folder, [x for x in files if x.size_bytes or x.path not in folders]


def _file(meta: Any, folder: str) -> ArtifactFile:
    path = str(meta["path"])
    if not meta["e_tag"]:
        raise invalid("file", path, "has no ETag that the store tells", remedy="Use a store that gives entity tags.")
    return ArtifactFile(path[len(folder) + 1 if folder else 0 :], int(meta["size"]), canonical_tag(meta["e_tag"]))


class StoreOrigin(HttpOrigin):
    """Objects of one bucket."""

    def __init__(
        self, uri: OriginUri, credentials: Credentials, *, signed: bool | None = None, **settings: Any
    ) -> None:
        """`signed`: read signed addresses, or through obstore; None decides by the credentials."""
        super().__init__(uri, credentials, **settings)
        self._options = store_options(uri, credentials)
        self._signed = self._signable if signed is None else signed
        self._store: Any = None

    async def _address(self, file: ArtifactFile) -> Target:
        key, label = self.uri.key_of(file.path), self.label(file)
        plain = self._plain(key)
        if plain is not None:
            return Target(plain[0], label, plain[1])
        store = await self._opened()
        import obstore

        with as_fal_errors(label, self._clock.wall_s()):
            url = await obstore.sign_async(store, "GET", key, _SIGNED_FOR)
        return Target(url, label)

    @asynccontextmanager
    async def _open(self, file: ArtifactFile, offset: int, length: int, *, whole: bool) -> AsyncIterator[Body]:
        if self._by_address(file):
            async with super()._open(file, offset, length, whole=whole) as body:
                yield body
        else:
            yield Body(0, await self._streamed(file, offset, length))

    async def supports_ranges(self, file: ArtifactFile) -> bool:
        return await super().supports_ranges(file) if self._by_address(file) else True

    @property
    def _signable(self) -> bool:
        """Whether an address can be had without asking the cloud for a signature that it may refuse."""
        return self.uri.scheme == "s3" or any(self._options.get(x) for x in _SIGNABLE[self.uri.scheme])

    def _by_address(self, file: ArtifactFile) -> bool:
        """Whether this file is read by its address."""
        key = self.uri.key_of(file.path)
        # obstore 0.12 signs Azure's addresses over the quoted name, which Azure refuses.
        miswritten = self.uri.scheme == "az" and quote(key) != key and self._plain(key) is None
        return self._signed and not miswritten

    def _plain(self, key: str) -> tuple[str, dict[str, str]] | None:
        """Address and headers where nothing has to be signed."""
        options, scheme = self._options, self.uri.scheme
        token, sas = options.get("token"), options.get("sas_token")
        if not (options.get("anonymous") or token or sas):
            return None
        bucket = self.uri.authority
        if scheme == "s3":
            base = options.get("endpoint") or f"https://s3.{options.get('region', 'us-east-1')}.amazonaws.com"
        elif scheme == "gs":
            base = options.get("endpoint") or "https://storage.googleapis.com"
        else:
            account, _, bucket = self.uri.authority.partition("/")
            base = options.get("endpoint") or f"https://{account}.blob.core.windows.net"
        headers = {"x-ms-version": _AZURE_VERSION} if scheme == "az" else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        query = f"?{str(sas).removeprefix('?')}" if sas and scheme == "az" else ""
        return f"{str(base).rstrip('/')}/{bucket}/{quote(key)}{query}", headers

    async def _opened(self) -> Any:
        if self._store is None:
            # The import, and reading keys, are not for the loop.
            self._store = await asyncio.to_thread(open_store, self.uri, self.credentials)
        return self._store

    async def _streamed(self, file: ArtifactFile, offset: int, length: int) -> AsyncIterator[bytes]:
        label, now_s = self.label(file), self._clock.wall_s()
        store = await self._opened()
        import obstore

        with as_fal_errors(label, now_s):
            result = await obstore.get_async(
                store,
                self.uri.key_of(file.path),
                options={"range": (offset, offset + length), "if_match": file.version},
            )
            told = {"ETag": str(result.meta["e_tag"] or "")}
            first, end = result.range
            told["Content-Range"] = f"bytes {first}-{end - 1}/{result.meta['size']}"
            check_body(206, told, Wanted(label, offset, length, file.size_bytes, file.version))
        return _chunks(result.stream(min_chunk_size=ORIGIN_BLOCK_BYTES // 4), label, now_s)


async def _chunks(stream: Any, label: str, now_s: float) -> AsyncIterator[bytes]:
    with as_fal_errors(label, now_s):
        async for chunk in stream:
            yield chunk


def _base_error() -> type[Exception]:
    from obstore.exceptions import BaseError

    return BaseError


@contextmanager
def as_fal_errors(label: str, now_s: float) -> Iterator[None]:
    """obstore's errors as ours. Their texts quote requests and answers, so only the status and its code are taken."""
    from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

    try:
        yield
    except PreconditionError:
        raise changed(label, "the origin answers 412") from None
    except FileNotFoundError as exc:
        raise _explained(exc, 404, label, now_s) from None
    except UnauthenticatedError as exc:
        raise _explained(exc, 401, label, now_s) from None
    except PermissionDeniedError as exc:
        raise _explained(exc, 403, label, now_s) from None
    except _base_error() as exc:
        raise _explained(exc, 0, label, now_s) from None


def _explained(exc: Exception, status: int, label: str, now_s: float) -> FalError:
    text = str(exc)
    if any(place in text for place in _METADATA):
        return FalError(
            Code.UNAUTHENTICATED,
            f"there are no credentials for {label}, and this machine has no identity of its own in that cloud",
            remedy="Give them in the credentials file or the environment; anonymous = true reads public data.",
            field="uri",
        )
    found = _STATUS.search(text)
    status = int(found[1]) if found else status
    if not status:
        if "CERTIFICATE" in text.upper():
            return FalError(
                Code.UNAUTHENTICATED,
                f"the server of {label} is not trusted",
                remedy="Name its authority: [tls] ca_file in the credentials file, or SSL_CERT_FILE.",
                field="uri",
            )
        return unavailable(label, "does not answer")
    try:
        check_status(status, {}, label, now_s, hub=False, text=text)
    except FalError as error:
        return error
    return unavailable(label, "does not answer as a store does")


__all__ = ["STORES", "StoreOrigin", "as_fal_errors", "list_store", "open_store", "store_options"]
