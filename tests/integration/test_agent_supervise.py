"""Daemons that outlive the agent: started when none answers, used when one does, replaced on another release."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from agent_process import alive, until
from fal_agent import supervise
from fal_agent.departure import departed
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.proxy.server import software_version
from fal_agent.proxy_link import ProxyLink, proxy_answers
from fal_agent.supervise import Daemon
from fal_contract.errors import Code, FalError

A, B = "default/digits-00000001", "default/digits-00000002"


def entry(runner: str) -> RunnerEntry:
    return RunnerEntry(runner, "/nowhere/worker.sock", 1, 10.0)


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


class Bench:
    """A proxy daemon in `root` and links to it, as successive agents have them."""

    def __init__(self, root: Path) -> None:
        self.control = root / "proxy.sock"
        argv = [sys.executable, "-m", "fal_agent.proxy.main", "run", "--state-dir", str(root), "--host", "127.0.0.1"]
        argv += ["--control", str(self.control), "--insecure", "--node-id", "n-1"]
        self.daemon = Daemon("fal-proxy", argv, lambda: proxy_answers(self.control), root / "log")
        self.entries: list[RunnerEntry] = []
        self.kept: set[str] = set()
        self.troubles: list[FalError] = []
        self.pids: set[int] = set()

    @contextlib.asynccontextmanager
    async def link(self, software: str = software_version()):  # type: ignore[no-untyped-def]
        link = ProxyLink(
            self.control, self.daemon, software=software, rng=Random(1), entries=lambda: self.entries,
            kept=lambda: self.kept, on_stats=lambda stats: None, on_trouble=self.troubles.append,
        )  # fmt: skip
        job = asyncio.create_task(link.run())
        try:
            async with asyncio.timeout(60):
                await link.connected.wait()
            assert link.info is not None
            self.pids.add(link.info.pid)
            yield link
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    async def held(self, link: ProxyLink) -> list[str]:
        return sorted(entry.runner_id for entry in await link._now().runners())

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemon.reap()


@pytest.fixture
def bench(root: Path):  # type: ignore[no-untyped-def]
    made = Bench(root)
    yield made
    made.close()


def test_a_proxy_is_started_used_again_and_told_everything(bench: Bench) -> None:
    async def main() -> None:
        bench.entries = [entry(A)]
        async with bench.link() as link:
            assert await bench.held(link) == [A]
            await link.put(entry(B))
            await link.drain("default/unknown-00000009")
            await link.remove("default/unknown-00000009")
            assert (await link.usage(A)).served == 0
        with pytest.raises(FalError) as caught:
            await link.put(entry(A))
        assert caught.value.code is Code.UNAVAILABLE
        # Another agent: what it is taking back stays, what it does not know goes.
        bench.entries, bench.kept = [], {B}
        async with bench.link() as link:
            assert await bench.held(link) == [B]
        assert len(bench.pids) == 1
        assert bench.troubles == []

    asyncio.run(main())


def test_a_proxy_of_another_release_is_replaced_by_hand_over(bench: Bench) -> None:
    async def main() -> None:
        bench.entries = [entry(A)]
        async with bench.link() as link:
            port, (old,) = link.info.listen[0][1], bench.pids
        async with bench.link(software="another release") as link:
            assert link.info.pid != old
            assert link.info.listen[0][1] == port
            assert await bench.held(link) == [A]
        bench.daemon.reap()
        await until(lambda: not alive(old))

    asyncio.run(main())


def test_a_killed_proxy_is_started_again(bench: Bench) -> None:
    async def main() -> None:
        bench.entries = [entry(A)]
        async with bench.link() as link:
            (old,) = bench.pids
            os.kill(old, signal.SIGKILL)
            await until(lambda: link.connected.is_set() and link.info.pid != old)
            bench.pids.add(link.info.pid)
            assert await bench.held(link) == [A]

    asyncio.run(main())


def test_a_daemon_that_does_not_come_up_says_its_last_words(root: Path) -> None:
    async def main() -> None:
        async def never() -> bool:
            return False

        argv = [sys.executable, "-c", "import sys; print('error: no disk. Free some.', file=sys.stderr); sys.exit(4)"]
        daemon = Daemon("fal-fsd", argv, never, root / "log")
        with pytest.raises(FalError, match=r"fal-fsd ended with code 4: error: no disk") as caught:
            await daemon.ensure()
        assert caught.value.code is Code.UNAVAILABLE
        troubles: list[FalError] = []
        watching = asyncio.create_task(daemon.watch(Random(1), on_trouble=troubles.append))
        await until(lambda: troubles)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


LISTENER = """
import os, signal, socket, sys
path = sys.argv[1]
if os.path.exists(path): os.unlink(path)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen(16)
while True:
    connection, _ = server.accept()
    try:
        with connection: connection.sendall(str(os.getpid()).encode())
    except OSError: pass
"""


async def pid_behind(path: Path) -> int:
    """Of the listener; 0: nobody."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return 0
    try:
        return int(await reader.read() or b"0")
    except OSError:
        return 0
    finally:
        writer.close()


async def new_pid(path: Path, old: int = 0) -> int:
    """Of the listener, once it is another than `old`."""
    async with asyncio.timeout(60):
        while (pid := await pid_behind(path)) in (0, old):  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.02)
    return pid


def test_a_killed_daemon_is_started_again_without_waiting_for_the_next_look(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times, the first time one that somebody else started. The look itself never comes."""
    monkeypatch.setattr(supervise, "_CHECK_S", 3600.0)
    path = root / "d.sock"
    argv = [sys.executable, "-c", LISTENER, str(path)]

    async def main() -> None:
        async def answers() -> bool:
            return await pid_behind(path) > 0

        first = await asyncio.create_subprocess_exec(*argv)
        await new_pid(path)
        daemon = Daemon("d", argv, answers, root / "log", socket=path)
        watching = asyncio.create_task(daemon.watch(Random(1), on_trouble=lambda _: None))
        seen = [first.pid]
        try:
            for _ in range(3):
                os.kill(seen[-1], signal.SIGKILL)
                seen.append(await new_pid(path, seen[-1]))
            await first.wait()
            assert len(set(seen)) == 4
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(seen[-1], signal.SIGKILL)
            await until(lambda: (daemon.reap(), not alive(seen[-1]))[1])

    asyncio.run(main())


def test_a_departure_is_told_once_it_happens_and_not_before(root: Path) -> None:
    path = root / "d.sock"

    async def main() -> None:
        served = await asyncio.create_subprocess_exec(sys.executable, "-c", LISTENER, str(path))
        try:
            await new_pid(path)
            assert not await departed(path, within_s=0.05)
            waiting = asyncio.create_task(departed(path, within_s=3600.0))
            assert not (await asyncio.wait({waiting}, timeout=0.1))[0]
            served.kill()
            async with asyncio.timeout(60):
                assert await waiting
            assert await departed(path, within_s=3600.0)  # nobody there: at once
        finally:
            with contextlib.suppress(ProcessLookupError):
                served.kill()
            await served.wait()

    asyncio.run(main())
