"""The worker as a process: options, exit codes, signals, what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_runtime.worker.fake import FakeEngine
from fal_runtime.worker.main import EXIT_FAILED, EXIT_LOAD_FAILED, Options, parse_options, run
from worker_client import connected, is_ready, until

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")


@contextlib.contextmanager
def started(folder: Path, *flags: str, step_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "fal_runtime.worker.fake", "--socket", str(folder / "s"), *flags]
    environment = ENVIRONMENT | {"FAL_FAKE_STEP_S": str(step_s)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout.read().splitlines()]


def test_sigterm_finishes_what_runs_then_exits_0(folder: Path) -> None:
    async def client(process: subprocess.Popen[str]) -> list[str]:
        async with connected(folder / "s") as worker:
            await until(lambda: is_ready(worker), "ready")
            stream = worker.events({"prompt": "a", "steps": 10})
            names = [(await anext(stream))[0], (await anext(stream))[0]]
            process.send_signal(signal.SIGTERM)
            return names + [name async for name, _ in stream]

    with started(folder, "--grace", "20", step_s=0.03) as process:
        names = asyncio.run(client(process))
        assert process.wait(20) == 0
        lines = lines_of(process)
    assert names == ["start", *["step"] * 10, "output", "completed"]
    assert lines[0]["event"] == "start"
    assert [line["phase"] for line in lines if line["event"] == "phase"] == ["start", "import", "load", "warm", "ready"]
    assert [line["event"] for line in lines][-1] == "stopped"
    assert all({"time_s", "up_s"} <= line.keys() for line in lines)


def test_sigterm_waits_no_longer_than_the_grace(folder: Path) -> None:
    async def client(process: subprocess.Popen[str]) -> list[Any]:
        async with connected(folder / "s") as worker:
            await until(lambda: is_ready(worker), "ready")
            stream = worker.events({"prompt": "a", "steps": 200})
            await anext(stream)
            process.send_signal(signal.SIGTERM)
            return [event async for event in stream]

    with started(folder, "--grace", "0.2", step_s=0.1) as process:
        seen = asyncio.run(client(process))
        assert process.wait(20) == 0
    assert seen[-1][0] == "error"
    assert seen[-1][1]["code"] == "CANCELLED"


def test_a_second_sigterm_ends_it_at_once(folder: Path) -> None:
    async def client(process: subprocess.Popen[str]) -> None:
        async with connected(folder / "s") as worker:
            await until(lambda: is_ready(worker), "ready")
            stream = worker.events({"prompt": "a", "steps": 200})
            await anext(stream)
            process.send_signal(signal.SIGTERM)

            async def draining() -> bool:
                return bool((await worker.get("/readyz"))[1]["phase"] == "draining")

            await until(draining, "draining")
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 20)

    with started(folder, "--grace", "600", step_s=0.5) as process:
        asyncio.run(client(process))
        assert process.returncode == 128 + signal.SIGTERM


def test_a_stale_socket_of_a_killed_worker_is_replaced(folder: Path) -> None:
    async def ready() -> None:
        async with connected(folder / "s") as worker:
            await until(lambda: is_ready(worker), "ready")

    for _ in range(2):
        with started(folder) as process:
            asyncio.run(ready())
            process.send_signal(signal.SIGKILL)
            process.wait(20)
        assert (folder / "s").exists()


def test_a_model_that_does_not_load_exits_3_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(phase: str) -> None:
        raise ValueError("header too large\nin file x")

    assert run(FakeEngine(on_load=refuse), Options(socket=folder / "s")) == EXIT_LOAD_FAILED
    error = capsys.readouterr().err
    assert error == "error: the model does not load: ValueError: header too large in file x\n"


def test_a_socket_that_cannot_be_made_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = Path("/proc/self/nowhere/s")
    assert run(FakeEngine(), Options(socket=socket)) == EXIT_FAILED
    assert capsys.readouterr().err.startswith(f"error: cannot serve on socket {socket}: ")


def test_flags_win_over_the_environment() -> None:
    environ = {
        "FAL_MODEL_DIR": "/m",
        "FAL_SOCKET": "/s",
        "FAL_LORAS": "a=/a,b=/b",
        "FAL_THREADS": "2",
        "FAL_GRACE": "9",
    }
    from_environment = parse_options([], environ)
    assert from_environment == Options(
        socket=Path("/s"), model=Path("/m"), loras=(("a", Path("/a")), ("b", Path("/b"))), threads=2, grace_s=9.0
    )
    flags = ["--model", "/n", "--lora", "t/c=/c", "--threads", "1", "--max-multiplexing", "3", "--dtype", "float16"]
    both = parse_options(flags, environ)
    assert (both.model, both.socket, both.loras, both.threads) == (Path("/n"), Path("/s"), (("t/c", Path("/c")),), 1)
    assert (both.max_multiplexing, both.dtype) == (3, "float16")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--model", "/m"], "socket"),
        (["--socket", "/s"], "model"),
        (["--model", "/m", "--socket", "/" + "s" * 107], "socket"),
        (["--model", "/m", "--socket", "/s", "--lora", "neon"], "lora"),
        (["--model", "/m", "--socket", "/s", "--dtype", "int4"], "dtype"),
        (["--model", "/m", "--socket", "/s", "--max-multiplexing", "0"], "max_multiplexing"),
        (["--model", "/m", "--socket", "/s", "--grace", "-1"], "grace"),
    ],
)
def test_bad_options_are_refused_by_name(flags: list[str], field: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_options(flags, {})
    assert (caught.value.code, caught.value.field) == (Code.INVALID, field)


def test_a_bad_number_in_the_environment_is_refused_by_name() -> None:
    with pytest.raises(FalError, match="request_timeout = 'soon'"):
        parse_options([], {"FAL_MODEL_DIR": "/m", "FAL_SOCKET": "/s", "FAL_REQUEST_TIMEOUT": "soon"})


def test_help_needs_no_torch_and_the_first_line_comes_before_it() -> None:
    code = (
        "import sys, runpy; sys.argv = ['worker', '--help']\n"
        "try: runpy.run_module('fal_runtime.worker', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--socket PATH" in done.stdout
