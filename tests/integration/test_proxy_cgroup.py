"""Who answers on a runner's socket must be in the runner's own cgroup: another container in its place is refused.

With the oci driver as root; one container was prepared before it had an id, the other was not.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from agent_fakes import assignment
from contract.driver_cases import oci_missing
from dataplane import address_of, call, dial, serving, until
from fal_agent import launch
from fal_agent import serving as runner_serving
from fal_agent.core.tasks import Task
from fal_agent.ports import Places
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.tools import Tools
from fal_agent.wire import assignment_of
from fal_contract.clock import SystemClock
from fal_contract.v1 import agent_pb2
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec, Prepared, Resources
from fal_runtime.oci.driver import OciDriver

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
SERVER = """
import os, socket
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["FAL_SOCKET_DIR"] + "/worker.sock")
server.listen()
while True:
    connection, _ = server.accept()
    if connection.recv(65536):
        name = os.uname().nodename.encode()
        head = b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\ncontent-length: %d\\r\\n\\r\\n"
        connection.sendall(head % len(name) + name)
    connection.close()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[OciDriver]:
    made = OciDriver(tmp_path / "state")
    yield made
    asyncio.run(made.prepare(()))
    asyncio.run(made.clean(frozenset()))
    made.close()


class World:
    """Two runners in containers, told to a proxy as the agent does."""

    def __init__(self, driver: OciDriver, folder: Path) -> None:
        self.driver = driver
        places = Places(folder / "s", folder / "m", folder / "r", ())
        nothing = cast(Any, None)  # the entry concerns driver and places only
        self.tools = Tools(
            driver=driver, cache=nothing, proxy=nothing, prober=nothing, machine=nothing, places=places,
            clock=SystemClock(), rng=Random(1), on_event=nothing, save=nothing,
        )  # fmt: skip

    def spec(self, runner: str) -> ContainerSpec:
        places = self.tools.places
        return ContainerSpec(
            id=launch.container_id(runner),
            command=(host_image.this_layout().python, "-c", SERVER),
            resources=Resources(memory_bytes=128 << 20, pids_max=20),
            socket_dir=launch.socket_dir(places, runner),
            models_dir=places.models / launch.container_id(runner),
        )

    async def begin(self, runner: str) -> RunnerEntry:
        """Start it; what the agent tells the proxy of it."""
        spec = self.spec(runner)
        (self.tools.places.models / spec.id).mkdir(parents=True)
        await self.driver.create(spec)
        await self.driver.start(spec.id)
        await until(launch.socket_path(self.tools.places, runner).exists)
        message: agent_pb2.Assignment = assignment(runner)
        return await runner_serving.entry_of(Task(assignment_of(message)), self.tools)


def test_another_containers_process_behind_a_runners_socket_is_refused(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        world = World(driver, tmp_path)
        names = [f"default/{letter}-{os.urandom(4).hex()}" for letter in "ab"]
        await driver.prepare([Prepared(world.spec(names[0]), 1)])
        entries = [await world.begin(name) for name in names]
        # The pool's name for the first, the container's own for the second.
        assert not entries[0].cgroup.endswith(launch.container_id(names[0]))
        assert entries[1].cgroup.endswith("." + launch.container_id(names[1]))
        async with serving(tmp_path / "p") as proxy:
            address = address_of(proxy)

            async def answer(entry: RunnerEntry) -> tuple[int, bytes]:
                proxy.put_runner(entry)
                connection = await dial(address)
                response = await call(connection, "/", runner=entry.runner_id)
                body = await response.read(1 << 16)
                connection.abort()
                return response.status, body

            for entry in entries:
                assert (await answer(entry))[0] == 200
            for mine, other in (entries, reversed(entries)):
                swapped = replace(mine, socket_path=other.socket_path)
                status, why = await answer(swapped)
                assert (status, b"none of its own" in why or b"another cgroup" in why) == (503, True)
                # The cgroup alone is enough, as it is when the first process's pid is not known.
                status, why = await answer(replace(swapped, pid=0))
                assert (status, b"another cgroup" in why) == (503, True)
            outside = asyncio.start_unix_server(lambda _, writer: writer.close(), str(tmp_path / "host"))
            async with await outside:
                status, why = await answer(replace(entries[0], socket_path=str(tmp_path / "host"), pid=0))
                assert (status, b"another cgroup" in why) == (503, True)

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())
