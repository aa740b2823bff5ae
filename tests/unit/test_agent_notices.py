"""What clouds announce: the vendors' answers read, and their endpoints watched, by stand-ins with the real shapes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from fal_agent.core import notice
from fal_agent.core.notice import AHEAD_S, NOTICE, SPOT, Announced
from fal_agent.notices import Aws, Azure, File, Gcp, Notices
from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError
from fal_contract.limits import NOTICE_BYTES_MAX

NOW_S = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC).timestamp()
AWS_EVENT = {
    "NotBefore": "21 Jan 2019 09:00:43 GMT",
    "Code": "system-reboot",
    "Description": "scheduled reboot",
    "EventId": "instance-event-0d59937288b749b32",
    "NotAfter": "21 Jan 2019 09:17:23 GMT",
    "State": "active",
}
AZURE_EVENT = {
    "EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123",
    "EventStatus": "Scheduled",
    "EventType": "Preempt",
    "ResourceType": "VirtualMachine",
    "Resources": ["gpu-7", "gpu-8"],
    "NotBefore": "Mon, 11 Apr 2022 22:26:58 GMT",
    "Description": "Host server is undergoing maintenance.",
    "EventSource": "Platform",
    "DurationInSeconds": 15,
}


def unix_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def azure(*events: dict[str, object]) -> str:
    return json.dumps({"DocumentIncarnation": 2, "Events": events})


# --- read -----------------------------------------------------------------------------------------------------------


def test_aws_tells_when_it_takes_a_spot_machine_back() -> None:
    found = notice.aws_action('{"action": "terminate", "time": "2017-09-18T08:22:00Z"}')
    assert found == Announced(SPOT, unix_s("2017-09-18T08:22:00+00:00"), "AWS: spot interruption (terminate)")


def test_aws_recommends_without_a_date() -> None:
    found = notice.aws_rebalance('{"noticeTime": "2020-10-27T08:22:00Z"}')
    assert found is not None
    assert (found.kind, found.at_s) == (SPOT, None)


@pytest.mark.parametrize(
    ("events", "codes"),
    [
        ([], ""),
        ([AWS_EVENT], "system-reboot"),
        ([AWS_EVENT | {"State": "completed", "Description": "[Completed] scheduled reboot"}], ""),
        ([AWS_EVENT | {"Description": "[Canceled] scheduled reboot"}], ""),
        ([AWS_EVENT, AWS_EVENT | {"Code": "instance-stop", "NotBefore": "20 Jan 2019 09:00:43 GMT"}], "instance-stop"),
    ],
)
def test_aws_events_that_are_over_count_nothing_and_the_earliest_counts(
    events: list[dict[str, object]], codes: str
) -> None:
    found = notice.aws_events(json.dumps(events))
    assert (found is not None) == bool(codes)
    if found is not None:
        assert found.kind == NOTICE
        assert codes in found.reason
        day = "20" if codes == "instance-stop" else "21"
        assert found.at_s == unix_s(f"2019-01-{day}T09:00:43+00:00")


def test_google_gives_half_a_minute_or_an_hour() -> None:
    assert notice.gcp_preempted("FALSE\n", now_s=NOW_S) is None
    preempted = notice.gcp_preempted("TRUE", now_s=NOW_S)
    assert preempted is not None
    assert (preempted.kind, preempted.at_s) == (SPOT, NOW_S + 30.0)
    for nothing in ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"):
        assert notice.gcp_maintenance(nothing, now_s=NOW_S) is None
    ended = notice.gcp_maintenance("TERMINATE_ON_HOST_MAINTENANCE", now_s=NOW_S)
    assert ended is not None
    assert (ended.kind, ended.at_s) == (NOTICE, NOW_S + 3600.0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, SPOT),
        ({"EventType": "Terminate"}, SPOT),
        ({"EventType": "Reboot"}, NOTICE),
        ({"EventType": "Redeploy"}, NOTICE),
        ({"EventType": "Freeze"}, ""),
        ({"Resources": ["gpu-8"]}, ""),
        ({"Resources": ["GPU-7"]}, SPOT),
        ({"EventStatus": "Completed"}, ""),
    ],
)
def test_azure_events_of_this_machine_count(change: dict[str, object], kind: str) -> None:
    found = notice.azure_events(azure(AZURE_EVENT | change), name="gpu-7", now_s=NOW_S)
    assert (found.kind if found is not None else "") == kind
    if found is not None:
        assert found.at_s == unix_s("2022-04-11T22:26:58+00:00")


def test_an_azure_event_that_has_started_is_now_and_the_loss_of_the_machine_comes_first() -> None:
    started = AZURE_EVENT | {"EventType": "Reboot", "EventStatus": "Started", "NotBefore": ""}
    found = notice.azure_events(azure(started), name="gpu-7", now_s=NOW_S)
    assert found is not None
    assert found.at_s == NOW_S
    later = AZURE_EVENT | {"NotBefore": "Mon, 11 Apr 2032 22:26:58 GMT"}
    both = notice.azure_events(azure(started, later), name="gpu-7", now_s=NOW_S)
    assert both is not None
    assert both.kind == SPOT
    assert notice.azure_events(azure(), name="gpu-7", now_s=NOW_S) is None


def test_a_file_names_seconds_since_it_was_written_or_a_time() -> None:
    found = notice.file_notice('{"kind": "spot", "in_s": 90, "reason": "power"}', written_s=NOW_S)
    assert found == Announced(SPOT, NOW_S + 90.0, "power")
    dated = notice.file_notice('{"kind": "notice", "at": "2026-03-04T05:06:07Z"}', written_s=0.0)
    assert dated is not None
    assert dated.at_s == NOW_S
    undated = notice.file_notice('{"kind": "notice"}', written_s=0.0)
    assert undated is not None
    assert undated.at_s is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "Expecting value"),
        ("[]", "no JSON object"),
        ('{"kind": "bang"}', "neither spot nor notice"),
        ('{"kind": "spot", "in_s": "soon"}', "no number"),
        ('{"kind": "spot", "in_s": -1}', "no number"),
        ('{"kind": "spot", "in_s": true}', "no number"),
        ('{"kind": "spot", "in_s": 1, "at": "2026-03-04T05:06:07Z"}', "exclude"),
        ('{"kind": "spot", "at": "tomorrow"}', "tomorrow"),
        ('{"kind": "spot", "when": 3}', "when is not known"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(body: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        notice.file_notice(body, written_s=0.0)


READERS: list[Callable[[str], Announced | None]] = [
    notice.aws_action,
    notice.aws_rebalance,
    notice.aws_events,
    lambda body: notice.gcp_preempted(body, now_s=NOW_S),
    lambda body: notice.gcp_maintenance(body, now_s=NOW_S),
    lambda body: notice.azure_events(body, name="gpu-7", now_s=NOW_S),
    lambda body: notice.file_notice(body, written_s=NOW_S),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Events", "action", "time", "Resources", "NotBefore", "kind", "at", "EventType", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.text(max_size=40) | JSON.map(json.dumps))
def test_readers_refuse_garbage_with_a_value_error_only(body: str) -> None:
    for read in READERS:
        try:
            found = read(body)
        except ValueError:
            continue
        assert found is None or found.kind in (SPOT, NOTICE)


def test_the_loss_of_the_machine_is_more_urgent_and_what_is_far_ahead_waits() -> None:
    far = Announced(NOTICE, NOW_S + AHEAD_S + 1.0, "next week")
    assert notice.urgent([far], now_s=NOW_S) is None
    assert notice.urgent([far], now_s=NOW_S + 1.0) == far
    near, undated, spot = (
        Announced(NOTICE, NOW_S + 60.0, "near"),
        Announced(NOTICE, None, "some time"),
        Announced(SPOT, NOW_S + 7200.0, "lost"),
    )
    assert notice.urgent([far, undated, near], now_s=NOW_S) == near
    assert notice.urgent([near, spot, undated], now_s=NOW_S) == spot
    assert notice.urgent([], now_s=NOW_S) is None


@pytest.mark.parametrize("text", ["", "oracle", "aws=ftp://x", "file:relative", "file:", "aws:x"])
def test_a_source_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FalError) as refused:
        notice.check_source(text)
    assert (refused.value.code, refused.value.field) == (Code.INVALID, "notices")


# --- watched --------------------------------------------------------------------------------------------------------


class Cloud:
    """One endpoint. `answers`: path -> status, body, ETag; `seen`: every request."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.seen: list[web.Request] = []
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.changed = asyncio.Condition()
        self.token = "t-1"
        self.needs_token = False
        self.base = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        self.asked.put_nowait(request.path)
        if request.path == "/latest/api/token":
            assert request.method == "PUT"
            assert request.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            return web.Response(text=self.token)
        if self.needs_token and request.headers.get("X-aws-ec2-metadata-token") != self.token:
            return web.Response(status=401)
        if request.query.get("wait_for_change") == "true":
            async with self.changed:
                await self.changed.wait_for(lambda: self.answers[request.path][2] != request.query["last_etag"])
        status, body, etag = self.answers.get(request.path, (404, "", ""))
        return web.Response(status=status, text=body, headers={"ETag": etag} if etag else {})

    async def say(self, path: str, body: str, etag: str = "", status: int = 200) -> None:
        async with self.changed:
            self.answers[path] = (status, body, etag)
            self.changed.notify_all()

    async def __aenter__(self) -> Cloud:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.base = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


class Watch:
    """Notices that run; what they tell comes out of `told`, their events out of `events`."""

    def __init__(self, *sources: str) -> None:
        self.told: asyncio.Queue[Announced | None] = asyncio.Queue()
        self.events: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()
        self._notices = Notices(
            sources, clock=SystemClock(), on_event=lambda *event: self.events.put_nowait(event), subject="rack1"
        )

    async def next(self) -> Announced | None:
        async with asyncio.timeout(20.0):
            return await self.told.get()

    async def event(self) -> tuple[str, str, str]:
        async with asyncio.timeout(20.0):
            return await self.events.get()

    async def __aenter__(self) -> Watch:
        self._job = asyncio.create_task(self._notices.run(self.told.put_nowait))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._job.cancel()
        await asyncio.gather(self._job, return_exceptions=True)


Play = Callable[[Cloud], Awaitable[None]]


@pytest.fixture(autouse=True)
def _asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (Aws, Azure, Gcp, File):
        monkeypatch.setattr(source, "pause_s", 0.01)


@pytest.fixture
def play() -> Callable[[Play], None]:
    """Run against a stand-in."""

    def run(scenario: Play) -> None:
        async def main() -> None:
            async with Cloud() as cloud:
                await scenario(cloud)

        asyncio.run(main())

    return run


ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


def test_aws_is_asked_with_a_token_that_is_renewed(play: Callable[[Play], None]) -> None:
    async def scenario(cloud: Cloud) -> None:
        cloud.needs_token = True
        async with Watch(f"aws={cloud.base}") as watch:
            assert await watch.next() is None, "404 is nothing"
            await cloud.say(REBALANCE, '{"noticeTime": "2020-10-27T08:22:00Z"}')
            risky = await watch.next()
            assert risky is not None
            assert risky.at_s is None
            cloud.token = "t-2"
            await cloud.say(ACTION, '{"action": "stop", "time": "2017-09-18T08:22:00Z"}')
            sure = await watch.next()
            assert sure is not None
            assert sure.at_s == unix_s("2017-09-18T08:22:00+00:00")
            await cloud.say(ACTION, "", status=404)
            await cloud.say(REBALANCE, "", status=404)
            while (left := await watch.next()) is not None:
                assert left.at_s is None, "only the recommendation, for a moment"
            assert watch.events.empty()

    play(scenario)


def test_google_holds_the_question_until_something_changes(play: Callable[[Play], None]) -> None:
    preempted, maintenance = (f"/computeMetadata/v1/instance/{what}" for what in ("preempted", "maintenance-event"))

    async def scenario(cloud: Cloud) -> None:
        await cloud.say(preempted, "FALSE", "e1")
        await cloud.say(maintenance, "NONE", "e1")
        async with Watch(f"gcp={cloud.base}") as watch:
            assert await watch.next() is None
            await cloud.say(maintenance, "TERMINATE_ON_HOST_MAINTENANCE", "e2")
            maintained = await watch.next()
            assert maintained is not None
            assert maintained.kind == NOTICE
            await cloud.say(preempted, "TRUE", "e2")
            lost = await watch.next()
            assert lost is not None
            assert lost.kind == SPOT
        assert all(request.headers["Metadata-Flavor"] == "Google" for request in cloud.seen)
        assert len(cloud.seen) <= 8, "held, not polled"
        assert any(request.query.get("last_etag") == "e1" for request in cloud.seen)

    play(scenario)


def test_azure_is_asked_for_this_machines_name_first(play: Callable[[Play], None]) -> None:
    async def scenario(cloud: Cloud) -> None:
        await cloud.say("/metadata/instance/compute/name", "gpu-7")
        await cloud.say("/metadata/scheduledevents", azure(AZURE_EVENT | {"Resources": ["gpu-8"]}))
        async with Watch(f"azure={cloud.base}") as watch:
            assert await watch.next() is None, "another machine's"
            await cloud.say("/metadata/scheduledevents", azure(AZURE_EVENT))
            lost = await watch.next()
            assert lost is not None
            assert lost.kind == SPOT
            await cloud.say("/metadata/scheduledevents", azure())
            assert await watch.next() is None
        assert all(request.headers["Metadata"] == "true" and request.query["api-version"] for request in cloud.seen)

    play(scenario)


def test_a_silent_or_raving_endpoint_withdraws_nothing_and_is_said_once(play: Callable[[Play], None]) -> None:
    async def scenario(cloud: Cloud) -> None:
        await cloud.say(ACTION, '{"action": "stop", "time": "2017-09-18T08:22:00Z"}')
        async with Watch(f"aws={cloud.base}") as watch:
            assert await watch.next() is not None
            for body, status in (("x" * (NOTICE_BYTES_MAX + 1), 200), ("{", 200), ("no", 500)):
                await cloud.say(ACTION, body, status=status)
            assert (await watch.event())[0] == "NOTICES_SILENT"
            while not cloud.asked.empty():
                cloud.asked.get_nowait()
            async with asyncio.timeout(20.0):
                for _ in range(3):
                    await cloud.asked.get()
            assert watch.told.empty()
            assert watch.events.empty()

    play(scenario)


def test_an_endpoint_that_is_not_there_is_said_once_and_nothing_is_known(play: Callable[[Play], None]) -> None:
    async def scenario(cloud: Cloud) -> None:
        async with Watch("aws=http://127.0.0.1:9") as watch:
            kind, subject, message = await watch.event()
            assert (kind, subject) == ("NOTICES_SILENT", "rack1")
            assert message.startswith("aws: ")
            assert watch.told.empty()

    play(scenario)


def test_a_file_comes_changes_and_goes(tmp_path: Path) -> None:
    async def go() -> None:
        path = tmp_path / "notice"
        async with Watch(f"file:{path}") as watch:
            assert await watch.next() is None
            _write(path, '{"kind": "notice", "in_s": 600}')
            first = await watch.next()
            assert first is not None
            assert first.kind == NOTICE
            _write(path, "{")
            assert (await watch.event())[0] == "NOTICES_SILENT"
            _write(path, '{"kind": "spot", "in_s": 60, "reason": "power"}')
            second = await watch.next()
            assert second is not None
            assert (second.kind, second.reason) == (SPOT, "power")
            path.unlink()
            assert await watch.next() is None

    asyncio.run(go())


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def test_what_is_announced_for_next_week_is_an_event_only(tmp_path: Path) -> None:
    async def go() -> None:
        path = tmp_path / "notice"
        _write(path, '{"kind": "notice", "in_s": 600000, "reason": "new switches"}')
        async with Watch(f"file:{path}") as watch:
            kind, _, message = await watch.event()
            assert kind == "NOTICE_AHEAD"
            assert "new switches" in message
            assert await watch.next() is None

    asyncio.run(go())


def test_without_a_source_it_is_known_that_there_is_nothing() -> None:
    async def go() -> None:
        async with Watch() as watch:
            assert await watch.next() is None

    asyncio.run(go())
