"""What is done to one GPU by a program of its own: the check, and the driver's reset. Each has a time and a bound.

The check is our `fal_runtime.gpu_check` under the agent's interpreter, with that one GPU visible. A reset is
`nvidia-smi --gpu-reset`: NVML has no call for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from fal_agent.inventory.model import Checked
from fal_contract.errors import Code, FalError
from fal_contract.limits import GPU_CHECK_OUTPUT_BYTES_MAX, GPU_CHECK_TIMEOUT_S, GPU_RESET_TIMEOUT_S

CHECK: Final = (sys.executable, "-m", "fal_runtime.gpu_check", "--seconds", "60")
_KILL_TIMEOUT_S: Final = 5.0


async def check(gpu_id: str, *, command: Sequence[str] = CHECK, timeout_s: float = GPU_CHECK_TIMEOUT_S) -> Checked:
    """What the check says of a GPU. It never raises: a check that hangs or dies is a finding."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu_id, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        code, output = await _run(command, timeout_s, env)
    except TimeoutError:
        return Checked(False, f"the check did not end within {timeout_s:g} s")
    except OSError as exc:
        return Checked(False, f"the check could not be run: {exc.strerror}")
    lines = output.strip().splitlines()
    try:
        said = json.loads(lines[-1])
        return Checked(said["passed"] is True, str(said["text"])[:1000])
    except (IndexError, ValueError, KeyError, TypeError):
        last = lines[-1][:500] if lines else "it said nothing"
        return Checked(False, f"the check ended with code {code}: {last}")


async def reset(gpu_id: str, *, program: str = "nvidia-smi", timeout_s: float = GPU_RESET_TIMEOUT_S) -> None:
    """Reset a device that nobody uses. FAILED_PRECONDITION with what the driver says."""
    found = shutil.which(program)
    if found is None:
        raise _not_reset(gpu_id, f"there is no {program} on this machine")
    try:
        code, output = await _run((found, "--gpu-reset", "-i", gpu_id), timeout_s, os.environ)
    except TimeoutError:
        raise _not_reset(gpu_id, f"the driver did not do it within {timeout_s:g} s") from None
    except OSError as exc:
        raise _not_reset(gpu_id, exc.strerror or str(exc)) from None
    if code != 0:
        raise _not_reset(gpu_id, (output.strip().splitlines() or [f"{program} ended with code {code}"])[-1][:500])


def _not_reset(gpu_id: str, why: str) -> FalError:
    what = f"GPU {gpu_id} could not be reset: {why}"
    return FalError(Code.FAILED_PRECONDITION, what, remedy="Restart the machine; that resets it, too.")


async def _run(command: Sequence[str], timeout_s: float, env: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and the end of its output. TimeoutError: it was killed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=env, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    tail = b""
    try:
        async with asyncio.timeout(timeout_s):
            while data := await process.stdout.read(4096):
                tail = (tail + data)[-GPU_CHECK_OUTPUT_BYTES_MAX:]
            return await process.wait(), tail.decode(errors="replace")
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            # One that waits in the driver cannot be killed: it is left to init, not waited for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_TIMEOUT_S):
                    await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # else a child that never ends leaves its pipe to the collector


__all__ = ["CHECK", "check", "reset"]
