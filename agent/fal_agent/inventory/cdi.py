"""By which CDI names containers of this node ask for its GPUs; writes the node's own specification where it must.

The own file lies in the agent's run directory and has the lowest priority: where somebody else (nvidia-ctk, an
operator) has written a specification that names a GPU by its UUID, that one counts. It is written anew whenever the
driver's version or the GPUs' device nodes change, so a driver upgrade or another MIG layout reaches the next container.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fal_agent.inventory.model import Snapshot
from fal_contract.telemetry import get_logger
from fal_runtime.cdi.driver_tree import control_nodes, find_driver, write_specification
from fal_runtime.cdi.nvidia import Driver, Gpu, own_nodes, qualified
from fal_runtime.cdi.reader import DIRECTORIES, Reader

UVM: Final = "/dev/nvidia-uvm"
_log = get_logger("fal.inventory")


class GpuNames:
    """See the module's docstring. `own` is the folder of the node's own file."""

    def __init__(
        self,
        own: Path,
        directories: Sequence[Path] = DIRECTORIES,
        *,
        find: Callable[[str], Driver] = find_driver,
    ) -> None:
        self._own = own
        self._find = find
        self._reader = Reader((own, *directories))
        self._written: object = None
        self._problems: tuple[tuple[str, str], ...] = ()

    def refresh(self, snapshot: Snapshot) -> Mapping[str, str]:
        """GPU id → name, of those that have one. A few file looks; a driver's folders are read when it changed."""
        gpus = [
            Gpu(_names(gpu.id, gpu.index, gpu.mig_profile), own_nodes(gpu.device_nodes))
            for gpu in snapshot.gpus
            if gpu.device_nodes and all(os.path.exists(node) for node in own_nodes(gpu.device_nodes))
        ]
        wanted = (snapshot.driver_version, tuple(gpus), control_nodes())
        if wanted != self._written:
            try:
                write_specification(self._own, gpus, self._find(snapshot.driver_version))
                self._written = wanted
                if gpus and UVM not in wanted[2]:
                    _log.warning("no_cuda_in_containers", missing=UVM, remedy="nvidia-modprobe -u -c=0")
            except OSError as error:
                _log.warning("cdi_not_written", folder=str(self._own), why=str(error))
        registry = self._reader.registry()
        if registry.problems != self._problems:
            self._problems = registry.problems
            for path, why in registry.problems:
                _log.warning("cdi_file_refused", path=path, why=why)
        names = {gpu.id: qualified(gpu.id) for gpu in snapshot.gpus}
        return {gpu_id: name for gpu_id, name in names.items() if registry.has(name)}


def _names(gpu_id: str, index: int, mig_profile: str) -> tuple[str, ...]:
    """Its UUID, and for a whole GPU its number, as other tools name it too."""
    return (gpu_id,) if mig_profile else (gpu_id, str(index))
