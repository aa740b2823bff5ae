"""Pulls from registries with skopeo: a tag becomes a digest once, and that digest is what is fetched.

A registry may fail for a while (5xx, 429, resets) and its bearer tokens may end during a long pull: the copy is begun
again with growing waits, which asks for a new token and keeps the layers that are there; as long as a try brings a
layer the count of tries starts anew. Credentials come from a file only and nothing of this machine's own is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError, invalid
from fal_runtime.images.commands import Ran, require, run
from fal_runtime.images.manifest import Manifest, choose, is_index, parse_index, parse_manifest, too_large
from fal_runtime.images.source import Platform, Source
from fal_runtime.images.tree import measure

TRIES_MAX: Final = 5  # in a row without a new layer
RETRY_BASE_S: Final = 0.5
RETRY_CAP_S: Final = 15.0
INSPECT_TIMEOUT_S: Final = 60.0
SILENCE_MAX_S: Final = 60.0
_AUTH_BYTES_MAX: Final = 256 << 10
_PROBE_TIMEOUT_S: Final = 5.0

_DENIED: Final = re.compile(r"unauthorized|authentication required|\b401\b|\b403\b|denied|invalid username/password")
_MISSING: Final = re.compile(r"manifest unknown|name unknown|\b404\b|not found|blob unknown|repository name not known")
_TRUST: Final = re.compile(r"x509|certificate|tls: ")
_PASSING: Final = re.compile(
    r"\b(?:408|429|500|502|503|504)\b|toomanyrequests|too many requests|connection reset|connection refused|broken pipe"
    r"|unexpected eof|\beof\b|i/o timeout|timeout|temporarily|server misbehaving|no route to host|unreachable|goaway"
    r"|stream error|connection closed|service unavailable|bad gateway|internal server error"
)


@dataclass(frozen=True, slots=True)
class RegistryAccess:
    """How registries are reached: a credentials file (as `skopeo login` writes), an authority's certificate (PEM), or a
    folder of certificates as skopeo reads it."""

    authfile: Path | None = None
    ca_file: Path | None = None
    cert_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """The one image that is pulled. `digest` of its manifest."""

    digest: str
    manifest: Manifest


class _SilentError(Exception):
    """A registry that sends nothing more."""


class _Fetching:
    """Watches an OCI layout grow."""

    def __init__(self, layout: Path, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._layout = layout
        self._clock = SystemClock()
        self._bytes = -1
        self._moved_s = 0.0

    @property
    def blobs(self) -> int:
        """Finished ones: skopeo renames them into place."""
        try:
            return sum(1 for _ in (self._layout / "blobs" / "sha256").iterdir())
        except OSError:
            return 0

    def begin(self) -> None:
        """Before each try."""
        self._bytes, self._moved_s = -1, self._clock.monotonic_s()

    def watch(self) -> None:
        """Raises when it is larger than it may be, or does not grow."""
        size = measure(self._layout).bytes
        if size > self.bytes_max:
            raise too_large(size, self.bytes_max)
        if size != self._bytes:
            self._bytes, self._moved_s = size, self._clock.monotonic_s()
        elif self._clock.monotonic_s() - self._moved_s > SILENCE_MAX_S:
            raise _SilentError


class Registry:
    """One registry as one pack uses it. Its files lie in `folder`."""

    def __init__(
        self,
        source: Source,
        access: RegistryAccess,
        folder: Path,
        *,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._source = source
        self._folder = folder
        self._say = say
        self._program = [require("skopeo", "skopeo")]
        if not Path("/etc/containers/policy.json").exists():
            self._program.append("--insecure-policy")  # the machine has no rules about signatures
        self._auth, self._certificates = _credentials(access, folder)
        self._plain = False

    async def resolve(self, platform: Platform, *, bytes_max: int) -> Resolved:
        """What the source means now, for `platform`. NOT_FOUND, UNAUTHENTICATED, UNAVAILABLE, FAILED_PRECONDITION."""
        self._plain = await _speaks_plain(self._source.registry)
        digest, text = await self._inspect(self._source.digest)
        if is_index(text):
            chosen = choose(parse_index(text), platform)
            digest, text = await self._inspect(chosen.digest)
        return Resolved(digest, parse_manifest(text, bytes_max=bytes_max))

    async def copy(self, resolved: Resolved, layout: Path, *, bytes_max: int, timeout_s: float) -> None:
        """Fetch all of it into an OCI layout at `layout`, which is made; tag "image"."""
        to = f"oci:{layout}:image"
        argv = ["copy", "--quiet", "--dest-oci-accept-uncompressed-layers", *self._options("src-")]
        fetching = _Fetching(layout, bytes_max)
        ran = await self._tried(
            [*argv, self._source.reference(resolved.digest), to], timeout_s=timeout_s, fetching=fetching
        )
        if ran.code:
            raise self._failed(ran)

    async def _inspect(self, digest: str) -> tuple[str, bytes]:
        """A manifest or index as it is, and its digest. CORRUPT when it is not what `digest` names."""
        argv = ["inspect", "--raw", *self._options(), self._source.reference(digest)]
        ran = await self._tried(argv, timeout_s=INSPECT_TIMEOUT_S)
        if ran.code:
            raise self._failed(ran)
        found = f"sha256:{hashlib.sha256(ran.stdout).hexdigest()}"
        if digest and found != digest:
            raise FalError(Code.CORRUPT, f"{self._source.registry} sent another manifest", remedy="Do not trust it.")
        return found, ran.stdout

    def _options(self, prefix: str = "") -> list[str]:
        options = [f"--authfile={self._auth}"]
        if self._certificates is not None:
            options.append(f"--{prefix}cert-dir={self._certificates}")
        if self._plain:
            options.append(f"--{prefix}tls-verify=false")
        return options

    async def _tried(self, argv: list[str], *, timeout_s: float, fetching: _Fetching | None = None) -> Ran:
        """Again while what failed may pass. While we fetch, the registry took our credentials before: a refusal is a
        token's end and passes, too."""
        tries, have = 0, 0
        while True:
            ran = await self._once(argv, timeout_s, fetching)
            tries += 1
            if fetching is not None and fetching.blobs > have:
                tries, have = 1, fetching.blobs
            if ran.code == 0 or tries >= TRIES_MAX or not _passes(ran.stderr, known=fetching is not None):
                return ran
            wait_s = min(RETRY_CAP_S, RETRY_BASE_S * 2 ** (tries - 1))
            self._say(f"{self._source.registry}: {_short(ran.last_line)}; again in {wait_s:g} s")
            await asyncio.sleep(wait_s)

    async def _once(self, argv: list[str], timeout_s: float, fetching: _Fetching | None) -> Ran:
        program = [*self._program, *argv]
        if fetching is None:
            return await run(program, timeout_s=timeout_s, folder=self._folder)
        fetching.begin()
        try:
            return await run(
                program,
                timeout_s=timeout_s,
                folder=self._folder,
                file_bytes_max=fetching.bytes_max,
                watch=fetching.watch,
            )
        except _SilentError:
            return Ran(-9, b"", f"i/o timeout: no byte for {SILENCE_MAX_S:g} s")

    def _failed(self, ran: Ran) -> FalError:
        return failure(ran.stderr, ran.last_line, self._source)


def failure(text: str, last_line: str, source: Source) -> FalError:
    """skopeo's complaint as one of ours. Pure."""
    low, where = text.lower(), f"{source.registry}/{source.repository}"
    why = _short(last_line)
    if _TRUST.search(low) and ("x509" in low or "certificate" in low):
        remedy = "Give its authority's certificate by --ca-file."
        return FalError(Code.UNAUTHENTICATED, f"{source.registry} is not trusted: {why}", remedy=remedy)
    if _PASSING.search(low) and not _DENIED.search(low) and not _MISSING.search(low):
        return FalError(Code.UNAVAILABLE, f"{source.registry} does not answer: {why}", remedy="Try again later.")
    if _MISSING.search(low):
        return FalError(
            Code.NOT_FOUND, f"{source.text} does not exist: {why}", remedy="Correct its name, tag or digest."
        )
    if _DENIED.search(low):
        remedy = "Give credentials that may pull it (a secret, or --authfile); a wrong name looks the same."
        return FalError(Code.UNAUTHENTICATED, f"{where} may not be pulled: {why}", remedy=remedy)
    if "server gave http response to https client" in low:
        return FalError(Code.UNAVAILABLE, f"{source.registry} has no TLS", remedy="Give the registry a certificate.")
    return FalError(Code.UNAVAILABLE, f"{source.text} was not pulled: {why}", remedy="Look at the registry.")


# --- inside -----------------------------------------------------------------------------------------------------------


def _short(line: str) -> str:
    """Without logrus' frame, the name that everybody knows, and line ends."""
    found = re.search(r'level=fatal msg="(.*?)"?$', line)
    text = (found[1] if found else line).replace('\\"', "'")
    text = re.sub(r"^Error parsing image name '[^']*': ", "", text)
    return re.sub(r"(?:\\+n|\s)+", " ", text).strip()[-300:]


def _passes(stderr: str, *, known: bool) -> bool:
    low = stderr.lower()
    if _TRUST.search(low) and "x509" in low:
        return False
    if _DENIED.search(low):
        return known
    return _PASSING.search(low) is not None and not _MISSING.search(low)


def _credentials(access: RegistryAccess, folder: Path) -> tuple[Path, Path | None]:
    """Files for skopeo. INVALID naming the option; never says what is in them."""
    if access.authfile is not None:
        auth = access.authfile.absolute()  # no copy: it may lie in memory, our folder is on a disk
        try:
            table = json.loads(_file(auth, "--authfile"))
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict) or not isinstance(table.get("auths", {}), dict):
            raise invalid("--authfile", str(access.authfile), "is no credentials file", remedy="Use `skopeo login`.")
    else:
        auth = folder / "auth.json"
        auth.write_bytes(b"{}")
    if access.ca_file is None:
        return auth, access.cert_dir and access.cert_dir.absolute()
    certificates = folder / "certificates"
    certificates.mkdir(mode=0o700)
    if access.cert_dir is not None:
        shutil.copytree(access.cert_dir, certificates, dirs_exist_ok=True)
    text = _file(access.ca_file, "--ca-file")
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise invalid("--ca-file", str(access.ca_file), "holds no certificate", remedy="Give a PEM file.")
    (certificates / "authority.crt").write_bytes(text)
    return auth, certificates


def _file(path: Path, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_AUTH_BYTES_MAX + 1)
    except OSError as exc:
        raise invalid(option, str(path), f"cannot be read: {exc.strerror}", remedy="Name a file.") from None
    if len(text) > _AUTH_BYTES_MAX:
        raise invalid(option, str(path), "is too large", remedy="Name the right file.")
    return text


async def _speaks_plain(registry: str) -> bool:
    """Whether it is on this very machine and speaks plain HTTP. Elsewhere TLS is a must."""
    host, _, port = registry.rpartition(":") if not registry.endswith("]") and ":" in registry else (registry, "", "80")
    if host not in ("localhost", "[::1]") and not re.fullmatch(r"127(\.[0-9]{1,3}){3}", host):
        return False
    writer = None
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.write(f"GET /v2/ HTTP/1.0\r\nHost: {registry}\r\n\r\n".encode())
            answer = await reader.read(1024)
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
    # A TLS server answers nothing, an alert, or (Go) a 400 that says so.
    return answer.startswith(b"HTTP/") and b" 400 " not in answer.split(b"\r\n", 1)[0]
