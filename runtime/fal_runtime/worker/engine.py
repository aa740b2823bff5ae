"""What the server needs from a model, and how it fails. No torch here.

The server calls an engine from one thread, one call at a time: `load`, then `warm`, then `infer` for ever. Between two
requests it may be asked to load other models beside the first, to let one go, and so with LoRAs (`worker.residents`).
Whatever `infer` raises fails that request only. The server decides what a failure means for the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fal_contract.errors import Code, FalError
from fal_runtime.worker.request import InferRequest, ModelInfo

# Told after each denoising step: (steps done, steps in all). Raises `Stopped` when the request was cancelled.
OnStep = Callable[[int, int], None]


class Stopped(Exception):
    """Raised by `OnStep` through the engine: the request was cancelled; not a failure."""


class OutOfMemory(FalError):
    """One request did not fit into memory; the model is still usable."""

    def __init__(self, what: str) -> None:
        super().__init__(Code.OUT_OF_MEMORY, what, remedy="Ask for a smaller picture, or use a GPU with more memory.")


class DeviceFailed(FalError):
    """The GPU reported an error. Once may be an accident; after the second the process must be replaced."""

    def __init__(self, what: str) -> None:
        super().__init__(Code.RUNNER_FAILED, what, remedy="Try again; the runner is replaced if it happens twice.")


@dataclass(frozen=True, slots=True)
class Output:
    """A finished picture: a PNG file's bytes, and the seconds that denoising and encoding took."""

    png: bytes
    width_px: int
    height_px: int
    infer_s: float
    encode_s: float


class Engine(Protocol):
    """A model that draws pictures."""

    def load(self, on_phase: Callable[[str], None]) -> ModelInfo:
        """Import what is needed and read the weights. Calls `on_phase` with "import", then "load"."""
        ...

    def warm(self) -> None:
        """Run once, so that the first request is not slower than the second."""
        ...

    def infer(self, request: InferRequest, on_step: OnStep) -> Output:
        """Draw, with the model `request.model`. Raises OutOfMemory, DeviceFailed, FalError, or lets `Stopped` pass."""
        ...

    def add_model(self, model: str, folder: Path) -> ModelInfo:
        """Load another model, warm. Raises what `load` does; those that are there stay as they are."""
        ...

    def remove_model(self, model: str) -> None:
        """Give a model's memory back."""
        ...

    def add_lora(self, model: str, lora: str, folder: Path) -> ModelInfo:
        """Load a LoRA into a model that is there; the model as it is now."""
        ...

    def remove_lora(self, model: str, lora: str) -> None:
        """Take it out again."""
        ...
