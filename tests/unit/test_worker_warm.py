"""A warm worker becomes whoever the message says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fal_runtime.driver import message_beside

pytest.importorskip("torch")

PROGRAM = """
import json, os, sys
from pathlib import Path
from fal_runtime.worker import warm
arguments = warm.wait(Path(sys.argv[1]))
import torch
print(json.dumps([arguments, dict(os.environ), torch.get_num_threads(), "diffusers" in sys.modules]))
"""


def test_it_takes_environment_arguments_and_threads_from_the_message(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    env = {"FAL_SOCKET": "/x", "OMP_NUM_THREADS": "3", "TEXT": "ä\nb"}
    message = {"env": env, "argv": ["/usr/bin/python3", "-m", "fal_runtime.worker", "--dtype", "float32"]}
    worker = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fifo)],
        stdout=subprocess.PIPE,
        env={**os.environ, "WAITING": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        with fifo.open("w"):  # opens once the worker listens, its libraries loaded
            pass  # nobody is told anything
        message_beside(fifo).write_text(json.dumps(message))
        with fifo.open("w"):
            pass
        out, _ = worker.communicate(timeout=60)
    finally:
        worker.kill()
        worker.wait()
    arguments, environment, threads, loaded = json.loads(out)
    assert arguments == ["--dtype", "float32"]
    assert {name: environment.get(name) for name in env} == env
    assert "WAITING" not in environment
    assert (threads, loaded) == (3, True)
