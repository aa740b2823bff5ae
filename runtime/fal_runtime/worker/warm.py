"""A worker that waits, with its libraries loaded, for the message that says whose it is.

It runs in a container that the driver made ahead (`fal_runtime.oci.prepared`): no model, no device context, nothing of
any team. The message is one JSON object, {"env": {NAME: VALUE}, "argv": [WORD]}; from then on it is like a worker that
was started with that environment and those words. Called by `__main__` for `--warm`.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Final

from fal_runtime.driver import MESSAGE_FIFO_INSIDE
from fal_runtime.worker.diffusers_engine import quiet_environment

MODULE: Final = "fal_runtime.worker"
# What nearly every pipeline needs; a pipeline's own classes are imported with its model.
_CLASSES: Final = (
    ("diffusers", "StableDiffusionPipeline"),
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "UNet2DConditionModel"),
    ("diffusers", "DDIMScheduler"),
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTokenizer"),
)


def wait(fifo: Path = Path(MESSAGE_FIFO_INSIDE)) -> list[str]:
    """Load the libraries, wait for the message, become who it says; returns the arguments of the worker."""
    quiet_environment()
    os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir()) / "hf"))
    torch = importlib.import_module("torch")
    for module, name in _CLASSES:
        getattr(importlib.import_module(module), name, None)
    said = json.loads(fifo.read_text())  # blocks; the driver is the only writer, and writes once
    env, argv = dict(said["env"]), list(said["argv"])
    os.environ.clear()
    os.environ.update(env)
    # OpenMP read its variable when it was loaded.
    if (threads := env.get("OMP_NUM_THREADS", "")).isdigit() and int(threads):
        torch.set_num_threads(int(threads))
    return argv[argv.index(MODULE) + 1 :] if MODULE in argv else argv[1:]
