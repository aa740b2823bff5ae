"""Watches what is announced for this machine: by the metadata endpoint of its cloud, or by a file.

A source is asked again and again (`NOTICE_POLL_S`; Google's holds the question until something changes). One that does
not answer is said once and then asked ever more rarely; what it said last stands, because silence withdraws nothing.
`Notices.run` tells the most urgent thing of all sources to its caller, whenever that changes; None once every source
has said that there is nothing. Made by fal_agent.agent; readers of the answers are core/notice's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import aiohttp

from fal_agent.core import notice
from fal_agent.core.notice import Announced
from fal_contract.clock import Clock
from fal_contract.errors import invalid
from fal_contract.limits import (
    NOTICE_BYTES_MAX,
    NOTICE_FILE_POLL_S,
    NOTICE_HELD_S,
    NOTICE_POLL_S,
    NOTICE_RETRY_CAP_S,
    NOTICE_SOURCES_MAX,
    NOTICE_TIMEOUT_S,
)

Tell = Callable[[Announced | None], None]
OnEvent = Callable[[str, str, str], None]  # kind, subject, message

_TOKEN_TTL_S: Final = 21_600
_AZURE_VERSION: Final = "2020-07-01"
_AZURE_NAME_VERSION: Final = "2021-02-01"


class Source(Protocol):
    """Somebody who announces. `ask` raises OSError, aiohttp.ClientError, TimeoutError, ValueError."""

    name: str
    pause_s: float

    async def ask(self) -> list[Announced]:
        """Everything that is announced now."""
        ...


class _Http:
    """GETs and PUTs of one endpoint, bounded; no proxy, no redirects."""

    def __init__(self, base: str) -> None:
        self._base = base.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self, method: str, path: str, headers: dict[str, str], *, timeout_s: float = NOTICE_TIMEOUT_S
    ) -> tuple[int, str, str]:
        """Status, body, ETag."""
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self._session.request(
            method, self._base + path, headers=headers, timeout=timeout, allow_redirects=False
        ) as answer:
            body = await answer.content.read(NOTICE_BYTES_MAX + 1)
            while len(body) <= NOTICE_BYTES_MAX and (more := await answer.content.read(NOTICE_BYTES_MAX)):
                body += more
            if len(body) > NOTICE_BYTES_MAX:
                raise ValueError(f"{path} answers more than {NOTICE_BYTES_MAX} bytes")
            return answer.status, body.decode(errors="replace"), answer.headers.get("ETag", "")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Aws:
    """Instance metadata, version 2: a token first."""

    name, pause_s = "aws", NOTICE_POLL_S
    _PATHS: Final = (
        ("/latest/meta-data/spot/instance-action", notice.aws_action),
        ("/latest/meta-data/events/recommendations/rebalance", notice.aws_rebalance),
        ("/latest/meta-data/events/maintenance/scheduled", notice.aws_events),
    )

    def __init__(self, http: _Http) -> None:
        self._http = http
        self._token = ""

    async def ask(self) -> list[Announced]:
        found = []
        for path, read in self._PATHS:
            body = await self._get(path)
            if body is not None and (one := read(body)) is not None:
                found.append(one)
        return found

    async def _get(self, path: str) -> str | None:
        """None: there is nothing of that kind."""
        for fresh in (not self._token, True):
            if fresh:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
                self._token = _good(await self._http.ask("PUT", "/latest/api/token", lifetime), "/latest/api/token")
            answer = await self._http.ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if answer[0] == 404:
                return None
            if answer[0] != 401:  # the token's time is over
                break
        return _good(answer, path)


class Gcp:
    """One value of Google's metadata server, which answers when it changes."""

    pause_s = NOTICE_FILE_POLL_S  # between two held questions

    def __init__(self, http: _Http, what: str, clock: Clock) -> None:
        self.name = f"gcp {what}"
        self._http, self._what, self._clock = http, what, clock
        self._etag = ""
        self._last: tuple[str, list[Announced]] = ("", [])

    async def ask(self) -> list[Announced]:
        path, timeout_s = f"/computeMetadata/v1/instance/{self._what}", NOTICE_TIMEOUT_S
        if self._etag:
            path += f"?wait_for_change=true&timeout_sec={NOTICE_HELD_S:.0f}&last_etag={self._etag}"
            timeout_s += NOTICE_HELD_S
        answer = await self._http.ask("GET", path, {"Metadata-Flavor": "Google"}, timeout_s=timeout_s)
        body = _good(answer, path)
        if body != self._last[0]:  # how long is left counts from the change
            read = notice.gcp_preempted if self._what == "preempted" else notice.gcp_maintenance
            found = read(body, now_s=self._clock.wall_s())
            self._last = body, [found] if found is not None else []
        self._etag = answer[2]
        return self._last[1]


class Azure:
    """Azure's scheduled events. None is acknowledged: a machine is given up at its time, not before."""

    name, pause_s = "azure", NOTICE_POLL_S

    def __init__(self, http: _Http, clock: Clock) -> None:
        self._http, self._clock = http, clock
        self._own_name = ""
        self._last: tuple[str, list[Announced]] = ("", [])

    async def ask(self) -> list[Announced]:
        headers = {"Metadata": "true"}
        if not self._own_name:
            path = f"/metadata/instance/compute/name?api-version={_AZURE_NAME_VERSION}&format=text"
            self._own_name = _good(await self._http.ask("GET", path, headers), path).strip()
        path = f"/metadata/scheduledevents?api-version={_AZURE_VERSION}"
        body = _good(await self._http.ask("GET", path, headers), path)
        if body != self._last[0]:
            found = notice.azure_events(body, name=self._own_name, now_s=self._clock.wall_s())
            self._last = body, [found] if found is not None else []
        return self._last[1]


class File:
    """A file that is there while something is announced."""

    pause_s = NOTICE_FILE_POLL_S

    def __init__(self, path: Path) -> None:
        self.name, self._path = f"file {path}", path

    async def ask(self) -> list[Announced]:
        try:
            with self._path.open("rb") as file:
                written_s = self._path.stat().st_mtime
                body = file.read(NOTICE_BYTES_MAX + 1)
        except FileNotFoundError:
            return []
        if len(body) > NOTICE_BYTES_MAX:
            raise ValueError(f"it is longer than {NOTICE_BYTES_MAX} bytes")
        found = notice.file_notice(body.decode(), written_s=written_s)
        return [found] if found is not None else []


def _good(answer: tuple[int, str, str], path: str) -> str:
    status, body, _ = answer
    if status != 200:
        raise ValueError(f"{path} answers status {status}")
    return body


class Notices:
    """All sources of one machine. `subject`: for events."""

    def __init__(self, sources: Sequence[str], *, clock: Clock, on_event: OnEvent, subject: str) -> None:
        if len(sources) > NOTICE_SOURCES_MAX:
            raise invalid("notices", len(sources), "are too many", remedy=f"Name at most {NOTICE_SOURCES_MAX}.")
        self._clock, self._on_event, self._subject = clock, on_event, subject
        self._https: list[_Http] = []
        self._sources: list[Source] = [one for text in sources for one in self._made(*notice.check_source(text))]
        self._said: dict[str, list[Announced]] = {}  # by source
        self._told: Announced | None = None
        self._ahead: set[Announced] = set()
        self._known = False

    def _made(self, name: str, address: str) -> list[Source]:
        if name == "file":
            return [File(Path(address))]
        http = _Http(address)
        self._https.append(http)
        if name == "aws":
            return [Aws(http)]
        if name == "azure":
            return [Azure(http, self._clock)]
        return [Gcp(http, what, self._clock) for what in ("preempted", "maintenance-event")]

    async def run(self, tell: Tell) -> None:
        """Until cancelled."""
        self._judge(tell)  # without a source there is nothing, and that is known
        try:
            async with asyncio.TaskGroup() as group:
                for source in self._sources:
                    group.create_task(self._follow(source, tell), name=f"notices {source.name}")
        finally:
            for http in self._https:
                await http.close()

    async def _follow(self, source: Source, tell: Tell) -> None:
        failures, last = 0, ""
        while True:
            try:
                self._said[source.name] = await source.ask()
            except (OSError, aiohttp.ClientError, TimeoutError, ValueError, json.JSONDecodeError) as error:
                failures = min(failures + 1, 16)
                why = str(error) or type(error).__name__
                if why != last and failures == 1:
                    self._on_event("NOTICES_SILENT", self._subject, f"{source.name}: {why}; it is asked again")
                last = why
            else:
                failures, last = 0, ""
            self._judge(tell)
            await asyncio.sleep(min(NOTICE_RETRY_CAP_S, source.pause_s * 2**failures))

    def _judge(self, tell: Tell) -> None:
        now_s = self._clock.wall_s()
        announced = [one for said in self._said.values() for one in said]
        for one in announced:
            if one not in self._ahead and notice.urgent([one], now_s=now_s) is None:
                self._on_event("NOTICE_AHEAD", self._subject, f"announced: {one.text(now_s)}")
        self._ahead = {one for one in announced if notice.urgent([one], now_s=now_s) is None}
        found = notice.urgent(announced, now_s=now_s)
        everybody = len(self._said) == len(self._sources)
        if (found is not None or everybody) and (not self._known or found != self._told):
            self._known, self._told = True, found
            tell(found)


__all__ = ["Notices", "OnEvent", "Tell"]
