"""How proxy and probes reach a runner's server: a unix socket, or a port on loopback of its own network namespace.

Where the driver keeps networks apart, the namespace is that of the container's first process, named by pid and start
time, so that no later process with that pid is ever taken for it. Where it does not, all ports are the node's: each
runner is given a free one, kept beside its assignment, and nothing keeps another process from taking it first.
Called by fal_agent.runner.
"""

from __future__ import annotations

import socket
from pathlib import Path

from fal_agent import launch
from fal_agent.core.tasks import Task
from fal_agent.ports import Places
from fal_agent.proxy.messages import RunnerEntry
from fal_agent.tools import Tools
from fal_agent.wire import parse
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import Driver
from fal_runtime.network.reach import HOST, Port
from fal_runtime.process_supervisor import start_ticks

Address = Path | Port


async def address_of(task: Task, tools: Tools) -> Address:
    """Where the runner's server is; its container was started. A container that has ended leads nowhere."""
    spec = parse(task.assignment).spec
    if not spec.port:
        return launch.socket_path(tools.places, task.runner_id, spec.socket)
    if not tools.driver.isolates:
        return Port(kept_port(tools.places, task.runner_id))
    return Port(spec.port, *await _first_process(tools.driver, launch.container_id(task.runner_id)))


async def entry_of(task: Task, tools: Tools) -> RunnerEntry:
    """What the proxy is told of it."""
    address, assignment = await address_of(task, tools), task.assignment
    status = await tools.driver.status(launch.container_id(task.runner_id))
    inside = address if isinstance(address, Port) else Port(0)
    return RunnerEntry(
        runner_id=task.runner_id,
        socket_path=str(address) if isinstance(address, Path) else "",
        max_multiplexing=assignment.max_multiplexing,
        request_timeout_s=assignment.request_timeout_s,
        cgroup=status.cgroup if status else "",
        pid=inside.pid if inside.port else (status.pid if status else None) or 0,
        port=inside.port,
        pid_ticks=inside.ticks,
    )


async def _first_process(driver: Driver, container: str) -> tuple[int, int]:
    """Its pid and start time; the driver's word comes after the look at the clock, so that both are of one process."""
    status = await driver.status(container)
    pid = (status.pid if status else None) or 0
    ticks = start_ticks(pid) if pid else 0
    status = await driver.status(container)
    if status is None or status.pid != pid or not ticks:
        return -1, 0
    return pid, ticks


def port_of(message: agent_pb2.Assignment, driver: Driver, places: Places) -> int:
    """The port on which the runner's server is to listen; 0: a unix socket."""
    if not message.spec.port or driver.isolates:
        return message.spec.port
    if port := kept_port(places, message.runner_id):
        return port
    with socket.create_server((HOST, 0)) as taken:
        port = int(taken.getsockname()[1])
    file = _port_file(places, message.runner_id)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_text(str(port))
    return port


def kept_port(places: Places, runner_id: str) -> int:
    """The node's port that was given to this runner; 0: none."""
    try:
        return int(_port_file(places, runner_id).read_text())
    except (OSError, ValueError):
        return 0


def drop_port(places: Places, runner_id: str) -> None:
    _port_file(places, runner_id).unlink(missing_ok=True)


def _port_file(places: Places, runner_id: str) -> Path:
    return places.runners / f"{launch.container_id(runner_id)}.port"
