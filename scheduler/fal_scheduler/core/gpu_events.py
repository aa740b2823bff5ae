"""Commands about single GPUs; part of `core.events.Command`.

Pure. What each does, and refuses, stands in `core.gpu_commands`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuarantineGpu:
    """Take a GPU out by an operator's word. `gpu`: its id, or of instances their device's. NOT_FOUND."""

    node: str
    gpu: str
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class ReleaseGpu:
    """Take that word back; unchanged where there was none."""

    node: str
    gpu: str
    actor: str = ""


GpuCommand = QuarantineGpu | ReleaseGpu

__all__ = ["GpuCommand", "QuarantineGpu", "ReleaseGpu"]
