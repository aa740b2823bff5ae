"""Faults of simulated GPUs, and the file in which a demonstration or a test sets them for a running agent.

STATE/sim-gpu-faults.json: an object by GPU id, or index, with fields of `Fault`, `ecc` an object with those of `Ecc`,
and `xids`, a list of codes. A list that has grown since the file was read last tells of the codes that were added;
those that were there when the agent started are old news. No file: no faults.

    {"0": {"temperature_c": 97}, "GPU-…": {"xids": [79], "gone": true}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from fal_agent.inventory.model import Ecc
from fal_contract.telemetry import get_logger

FAULT_FILE: Final = "sim-gpu-faults.json"
_BYTES_MAX: Final = 1 << 20
_log = get_logger("fal.inventory")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one GPU. -1 and empty: nothing."""

    temperature_c: int | None = None
    ecc: Ecc | None = None
    memory_used_bytes: int = 0
    pids: tuple[int, ...] = ()
    gone: bool = False
    utilisation_percent: int = -1
    throttled: tuple[str, ...] = ()
    clock_mhz: int = -1
    pcie_width: int = -1
    nvlinks: int = -1  # up, to each peer
    check: str = ""  # what the check finds
    no_reset: bool = False


class FaultFile:
    """The file, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: object = ()
        self._told: dict[str, int] | None = None  # how many XIDs of each were told

    def read(self, names: Mapping[str, str]) -> tuple[dict[str, Fault], list[tuple[str, int]]] | None:
        """Faults by GPU id, and XIDs that are new; None: nothing has changed. `names`: what a GPU may be called."""
        try:
            stat = self._path.stat()
            seen: object = (stat.st_mtime_ns, stat.st_size, stat.st_ino, tuple(names))
        except FileNotFoundError:
            seen = None
        if seen == self._seen:
            return None
        first, self._seen = self._told is None, seen
        told = self._told or {}
        try:
            given = json.loads(self._path.read_bytes()[:_BYTES_MAX]) if seen is not None else {}
            faults = {names[name]: _fault_of(one) for name, one in given.items() if name in names}
            xids = {
                names[name]: [int(code) for code in one.get("xids", ())] for name, one in given.items() if name in names
            }
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            _log.warning("faults_not_understood", file=str(self._path), why=str(exc))
            return None
        self._told = {gpu_id: len(codes) for gpu_id, codes in xids.items()}
        new = [(gpu_id, code) for gpu_id, codes in xids.items() for code in codes[told.get(gpu_id, 0) :]]
        return faults, [] if first else new


def _fault_of(given: Mapping[str, Any]) -> Fault:
    """Raises TypeError and ValueError for what is no fault."""
    known = {field.name for field in fields(Fault)}
    values = {name: value for name, value in given.items() if name != "xids"}
    if unknown := values.keys() - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    if values.get("ecc") is not None:
        values["ecc"] = Ecc(**values["ecc"])
    for name in ("pids", "throttled"):
        if name in values:
            values[name] = tuple(values[name])
    return Fault(**values)


__all__ = ["FAULT_FILE", "Fault", "FaultFile"]
