"""The origins that this node reads: opened with the credentials of the moment, paced, and counted.

Invariants: the credentials file is read again when it changed (before an origin is opened, and when one answers that
what it was shown is not enough), so nobody restarts anything for a new token; what an origin sent stays counted after
its end. Used by fal_fsd.assembly.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_fsd.core.rates import LinkClass
from fal_fsd.origin import Credentials, Origin, open_origin
from fal_fsd.peers.pacer import Pacer

_REFUSALS: Final = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED})
_log = get_logger("fsd.origins")


class CredentialsFile:
    """What `file` and `env` say, read again when the file changes. Raises FalError when made with a bad file."""

    def __init__(self, file: Path | None, env: Mapping[str, str]) -> None:
        self._file = file
        self._env = dict(env)
        self._stamp = _stamp(file)
        self.error: FalError | None = None
        self.current = Credentials.load(file, self._env)

    def look(self) -> Credentials:
        """Those of now. A file that cannot be read leaves the last good ones in use and is kept in `error`.

        Reads a few kB at most, and only after a change: short enough for the event loop.
        """
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.current, self.error = Credentials.load(self._file, self._env), None
                _log.info("credentials_read", file=str(self._file))
            except FalError as exc:
                self.error = exc
                _log.warning("credentials_not_read", error=str(exc))
        return self.current


class Origins:
    """See the module's docstring."""

    def __init__(self, credentials: CredentialsFile, pacer: Pacer) -> None:
        self.credentials = credentials
        self.pacer = pacer
        self._open: set[CountedOrigin] = set()
        self._read = 0

    @property
    def bytes_read(self) -> int:
        """What left origins for this node, aborted ranges included: the audited egress. Any thread."""
        return self._read + sum(origin.bytes_read for origin in list(self._open))

    def open(self, uri: str) -> CountedOrigin:
        """Raises FalError: a URI that is none, credentials that are missing."""
        origin = CountedOrigin(uri, self)
        self._open.add(origin)
        return origin

    def closed(self, origin: CountedOrigin) -> None:
        """What it read stays counted."""
        self._open.discard(origin)
        self._read += origin.bytes_read


class CountedOrigin:
    """One origin. Implements lease_reads.OriginReader."""

    def __init__(self, uri: str, origins: Origins) -> None:
        self._uri = uri
        self._origins = origins
        self._closed = threading.Event()
        self._used = origins.credentials.look()
        self._opened: list[Origin] = [open_origin(uri, self._used)]  # the last one is read; others end their reads

    @property
    def bytes_read(self) -> int:
        return sum(origin.bytes_read for origin in self._opened)

    async def read(self, file: ArtifactFile, offset: int, length: int, sink: Callable[[memoryview], None]) -> None:
        """As origin.Origin.read; once more with new credentials, from where it stood, when the old ones are refused."""
        given, paced = 0, self._origins.pacer.limited(LinkClass.ORIGIN)

        def counted(data: memoryview) -> None:
            nonlocal given
            if paced:
                self._closed.wait(self._origins.pacer.take(LinkClass.ORIGIN, len(data)))
            sink(data)
            given += len(data)

        used = self._used
        try:
            await self._opened[-1].read(file, offset, length, counted)
        except FalError as exc:
            if exc.code not in _REFUSALS or not self._renewed(used):
                raise
            await self._opened[-1].read(file, offset + given, length - given, counted)

    async def close(self) -> None:
        self._closed.set()
        await asyncio.gather(*(origin.close() for origin in self._opened))
        self._origins.closed(self)

    def _renewed(self, used: Credentials) -> bool:
        """Whether there are other credentials than those. Raises the file's own error, which is nearer to the cause."""
        now = self._origins.credentials.look()
        if self._origins.credentials.error is not None:
            raise self._origins.credentials.error
        if now is not self._used:
            self._opened.append(open_origin(self._uri, now))
            self._used = now
        return self._used is not used


def _stamp(file: Path | None) -> tuple[int, int, int]:
    if file is None:
        return (0, 0, 0)
    try:
        info = os.stat(file)
    except OSError:
        return (0, 0, 0)
    return (info.st_mtime_ns, info.st_ino, info.st_mode)


__all__ = ["CountedOrigin", "CredentialsFile", "Origins"]
