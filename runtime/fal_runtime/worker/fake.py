"""A scripted engine without torch: for tests of the server and of whatever talks to a worker.

`python -m fal_runtime.worker.fake --socket PATH` serves it as the real worker would; its pictures are plain
colours and its process says so. Never started for an app.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fal_contract.errors import not_found
from fal_runtime.worker.engine import OnStep, Output
from fal_runtime.worker.request import InferRequest, ModelInfo

FAKE_MODEL = ModelInfo(
    pipeline="FakePipeline",
    options=frozenset({"steps", "guidance", "width", "height", "lora"}),
    steps=4,
    guidance=1.0,
    width_px=16,
    height_px=16,
    side_multiple_px=8,
    loras=("neon",),
)


@dataclass(slots=True)
class FakeEngine:
    """Draws plain colours. `before_step(request, step)` may block or raise; `failures` maps prompts to errors.

    Models beside the first are folders; `before_add(folder)` may block or raise, too.
    """

    model: ModelInfo = FAKE_MODEL
    before_step: Callable[[InferRequest, int], None] = lambda request, step: None
    on_load: Callable[[str], None] = lambda phase: None  # called in each of "import", "load" and "warm"
    failures: Mapping[str, Exception] = field(default_factory=dict)
    steps_run: list[tuple[str, int]] = field(default_factory=list)  # (prompt, step), in order
    before_add: Callable[[Path], None] = lambda folder: None
    added: dict[str, ModelInfo] = field(default_factory=dict)

    def load(self, on_phase: Callable[[str], None]) -> ModelInfo:
        for phase in ("import", "load"):
            on_phase(phase)
            self.on_load(phase)
        return self.model

    def warm(self) -> None:
        self.on_load("warm")

    def infer(self, request: InferRequest, on_step: OnStep) -> Output:
        began_s = time.monotonic()
        if request.prompt in self.failures:
            raise self.failures[request.prompt]
        for step in range(1, request.steps + 1):
            self.before_step(request, step)
            self.steps_run.append((request.prompt, step))
            on_step(step, request.steps)
        width, height = request.width_px or self.model.width_px, request.height_px or self.model.height_px
        model = f"{request.model} " if request.model else ""
        colour = zlib.crc32(f"{model}{request.prompt} {request.seed}".encode()) & 0xFFFFFF
        png = plain_png(width, height, colour)
        return Output(png=png, width_px=width, height_px=height, infer_s=time.monotonic() - began_s, encode_s=0.0)

    def add_model(self, model: str, folder: Path) -> ModelInfo:
        self.before_add(folder)
        if not folder.is_dir():
            raise not_found("model folder", str(folder), remedy="Give one that is there.")
        size = sum(one.stat().st_size for one in folder.iterdir() if one.is_file())
        self.added[model] = replace(self.model, loras=(), bytes=size)
        return self.added[model]

    def remove_model(self, model: str) -> None:
        self.added.pop(model, None)

    def add_lora(self, model: str, lora: str, folder: Path) -> ModelInfo:
        self.before_add(folder)
        have = self.added.get(model, self.model)
        self.added[model] = replace(have, loras=(*have.loras, lora))
        return self.added[model]

    def remove_lora(self, model: str, lora: str) -> None:
        have = self.added.get(model, self.model)
        self.added[model] = replace(have, loras=tuple(one for one in have.loras if one != lora))


def plain_png(width_px: int, height_px: int, colour: int) -> bytes:
    """A PNG file of one colour (0xRRGGBB)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + colour.to_bytes(3, "big") * width_px
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * height_px)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _refuse_broken(folder: Path) -> None:
    """A model with a file `broken` does not load, as some do not."""
    if (folder / "broken").exists():
        raise RuntimeError(f"{folder.name} is broken")


def main() -> None:
    from fal_runtime.worker import main as process
    from fal_runtime.worker.log import log

    log("start", pid=os.getpid(), fake=True)
    step_s = float(os.environ.get("FAL_FAKE_STEP_S", "0"))
    engine = FakeEngine(before_step=lambda request, step: time.sleep(step_s), before_add=_refuse_broken)
    process.leave(process.run(engine, process.parse_options(sys.argv[1:], os.environ, model_needed=False)))


if __name__ == "__main__":
    main()
