"""A worker that waits, with its libraries loaded, to hear whose it is.

It runs in a container that the driver made ahead (`fal_runtime.oci.prepared`): no model, no device context, nothing of
any team. The message is a file, one JSON object, {"env": {NAME: VALUE}, "argv": [WORD]}; a FIFO beside it is the bell.
The file is there before the bell rings, and we look for it after we began to listen: whoever writes need not wait for
us, may be killed in between and may ring again. From the message on it is like a worker that was started with that
environment and those words. Called by `__main__` for `--warm`.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fal_runtime.driver import MESSAGE_FIFO_INSIDE, message_beside
from fal_runtime.worker import log
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
_MODULES: Final = ("safetensors.torch", "PIL.PngImagePlugin", "fal_runtime.worker.main")


def wait(fifo: Path = Path(MESSAGE_FIFO_INSIDE), load: Callable[[], Any] | None = None) -> list[str]:
    """Load the libraries, wait for the message, become who it says; returns the arguments of the worker."""
    torch = (load or libraries)()
    said = listen(fifo)
    log.begin()
    env, argv = dict(said["env"]), list(said["argv"])
    os.environ.clear()
    os.environ.update(env)
    # OpenMP read its variable when it was loaded.
    if (threads := env.get("OMP_NUM_THREADS", "")).isdigit() and int(threads):
        torch.set_num_threads(int(threads))
    return argv[argv.index(MODULE) + 1 :] if MODULE in argv else argv[1:]


def libraries() -> Any:
    """Import what a worker needs before it reads its model; returns torch."""
    quiet_environment()
    os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir()) / "hf"))
    torch = importlib.import_module("torch")
    for module, name in _CLASSES:
        getattr(importlib.import_module(module), name, None)
    for module in _MODULES:
        importlib.import_module(module)
    return torch


def listen(fifo: Path) -> dict[str, Any]:
    """What the message says; blocks until there is one."""
    message = message_beside(fifo)
    while True:
        try:
            # Opened anew after each ring: a FIFO whose writer has closed it is ready for ever.
            fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:  # the bell goes when it has rung
            return _read(message)
        try:
            if message.exists():
                return _read(message)
            bell = select.poll()
            bell.register(fd, select.POLLIN)
            bell.poll()
        finally:
            os.close(fd)


def _read(message: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(message.read_bytes())
    return said
