"""Lists in pages: together they are the list, whatever comes and goes between them; none is larger than a message."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_contract.limits import LISTED_MAX, LISTED_PAGE
from fal_contract.v1 import cluster_pb2 as pb
from fal_scheduler.api import apps, nodes, runners
from fal_scheduler.api.paging import page
from falctl.context import pages
from scheduler_rig import ACTOR, Agent, app_request, deployed, eventually, join, leading

NAMES = st.text("ab/-.", max_size=3)
KEYS = st.lists(st.tuples(NAMES, NAMES), unique=True, max_size=12).map(sorted)


def view(key: tuple[str, ...]) -> pb.PlacementView:
    return pb.PlacementView(nearest_miss="|".join(key))


@given(keys=KEYS, limit=st.integers(1, 5), bytes_max=st.integers(1, 40))
def test_all_pages_together_are_the_list(keys: list[tuple[str, str]], limit: int, bytes_max: int) -> None:
    found: list[pb.PlacementView] = []
    after, count = "", 0
    while count == 0 or after:
        views, after = page(keys, view, limit=limit, after=after, bytes_max=bytes_max)
        assert len(views) <= limit
        assert sum(one.ByteSize() for one in views[:-1]) < bytes_max, "a page ends with the view that fills it"
        found += views
        count += 1
    assert found == [view(key) for key in keys]
    assert page(keys, view, limit=0, after="") == (found, ""), "without a limit: as before there were pages"


@given(keys=KEYS.filter(lambda keys: len(keys) > 2), data=st.data())
def test_a_list_that_changes_between_pages_shows_nothing_twice_and_misses_nothing_that_stays(
    keys: list[tuple[str, str]], data: st.DataObject
) -> None:
    first, after = page(keys, view, limit=len(keys) // 2, after="")
    left = data.draw(st.lists(st.sampled_from(keys), unique=True).map(sorted))
    rest, end = page(left, view, limit=100, after=after)
    shown = [one.nearest_miss for one in (*first, *rest)]
    assert end == ""
    assert len(set(shown)) == len(shown)
    assert {"|".join(key) for key in left} <= set(shown)


def test_too_long_a_page_is_refused() -> None:
    with pytest.raises(FalError, match="limit") as caught:
        page([], view, limit=LISTED_MAX + 1, after="")
    assert caught.value.code is Code.INVALID


def test_nodes_apps_and_runners_come_in_pages(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            for name in ("n1", "n2", "n3"):
                await join(leader, name)
            async with Agent(leader, "n1") as agent:
                for name in ("a", "b", "c"):
                    await deployed(leader, name, runners=2)
                listed = nodes.list_nodes(leader, pb.ListNodesRequest(limit=2))
                assert [(one.node.id, one.connected) for one in listed.nodes] == [("n1", True), ("n2", False)]
                assert listed.total == 3
                listed = nodes.list_nodes(leader, pb.ListNodesRequest(limit=2, after=listed.next))
                assert ([one.node.id for one in listed.nodes], listed.next) == (["n3"], "")
                found = apps.list_apps(leader, pb.ListAppsRequest(team="t", limit=2))
                assert ([one.app.id for one in found.apps], found.total) == (["t/a", "t/b"], 3)
                found = apps.list_apps(leader, pb.ListAppsRequest(team="t", limit=2, after=found.next))
                assert ([one.app.id for one in found.apps], found.next) == (["t/c"], "")
                whole = runners.list_runners(leader, pb.ListRunnersRequest())
                assert whole.total == len(whole.runners) == 6
                assert not runners.list_runners(leader, pb.ListRunnersRequest(team="u")).runners
                parts: list[pb.RunnerView] = []
                after = ""
                while len(parts) < 6:
                    part = runners.list_runners(leader, pb.ListRunnersRequest(limit=4, after=after))
                    parts, after = [*parts, *part.runners], part.next
                assert parts == list(whole.runners)
                assert after == ""
            await eventually(lambda: not nodes.list_nodes(leader, pb.ListNodesRequest(node="n1")).nodes[0].connected)
            assert agent.held

    asyncio.run(body())


def test_an_apply_explains_only_where_somebody_waits(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            async with Agent(leader, "n1", gpus=2):
                reply = await apps.apply_app(leader, app_request("a", runners=1), ACTOR)
                assert not reply.HasField("placement")
                assert not reply.warnings
                reply = await apps.apply_app(leader, app_request("b", runners=2), ACTOR)
                assert reply.placement.refused
                assert "no runner can be placed now" in reply.warnings[0]
                assert apps.plan_app(leader, app_request("c", runners=1)).HasField("placement")

    asyncio.run(body())


def test_falctl_follows_pages_and_takes_what_a_release_without_them_gives() -> None:
    every = [pb.AppView(wanted=number) for number in range(5)]
    asked: list[tuple[int, str]] = []

    class Paged:
        async def ListApps(self, request: pb.ListAppsRequest, timeout: float) -> pb.ListAppsReply:
            asked.append((request.limit, request.after))
            start = int(request.after or 0)
            return pb.ListAppsReply(apps=every[start : start + 2], next=str(start + 2) if start < 4 else "")

    assert asyncio.run(pages(Paged(), "ListApps", pb.ListAppsRequest(), "apps")) == every
    assert asked == [(LISTED_PAGE, ""), (LISTED_PAGE, "2"), (LISTED_PAGE, "4")]

    async def whole(request: Any, timeout: float) -> pb.ListAppsReply:
        return pb.ListAppsReply(apps=every)

    assert asyncio.run(pages(SimpleNamespace(ListApps=whole), "ListApps", pb.ListAppsRequest(), "apps")) == every
