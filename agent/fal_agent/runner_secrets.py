"""The secrets of one runner, from the scheduler to the driver; kept here only until its container was made.

The scheduler is asked when a container is to be made and names secrets. One that is away is asked again like
everything that may pass (`fal_agent.runner`). Nothing here is journaled or logged. Called by fal_agent.runner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fal_agent import launch
from fal_contract.v1 import agent_pb2
from fal_runtime.driver import Driver

AskSecrets = Callable[[str], Awaitable[Mapping[str, bytes]]]  # runner id → values by name


class RunnerSecrets:
    """Of one runner."""

    def __init__(self, runner_id: str, ask: AskSecrets, driver: Driver) -> None:
        self._runner_id = runner_id
        self._ask = ask
        self._driver = driver
        self._values: Mapping[str, bytes] | None = None

    async def of(self, message: agent_pb2.Assignment) -> Mapping[str, bytes]:
        """Values by name for a container that is still to be made; else nothing. Raises what the scheduler says."""
        spec = message.spec
        if not spec.secrets and not (spec.HasField("build") and spec.build.auth_secret):
            return {}
        if self._values is None:
            if await self._driver.status(launch.container_id(self._runner_id)) is not None:
                return {}  # it was made, with them
            self._values = await self._ask(self._runner_id)
        return self._values

    def forget(self) -> None:
        """The container has them."""
        self._values = None
