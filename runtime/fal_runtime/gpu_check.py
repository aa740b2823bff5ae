"""A short check of one GPU in a process of its own: `python -m fal_runtime.gpu_check`, the GPU by CUDA_VISIBLE_DEVICES.

Memory: most of what is free is filled with a pattern that names each place, and read back. Compute: products of small
whole numbers, which are exact in every precision used, compared with what the CPU finds, and with themselves again and
again. A wrong bit fails it. It prints one JSON object, {"passed", "text"}; its exit code is 0 whatever it finds. Where
torch or CUDA is missing nothing can be tried, and it says so: the caller decides what that is worth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Final

CHUNK_BYTES: Final = 256 << 20
SHARE: Final = 0.9  # of the memory that is free
SIZE: Final = 4096  # of square matrices
ROUNDS: Final = 40
_MODULUS: Final = 251  # a prime: the pattern does not repeat with any power of two


def main(argv: list[str] | None = None) -> int:
    """Prints what it found."""
    parser = argparse.ArgumentParser(prog="gpu_check", description="Check one idle GPU.")
    parser.add_argument("--seconds", type=float, default=60.0, help="do no more than fits into so long")
    seconds = parser.parse_args(argv).seconds
    try:
        import torch
    except ImportError:
        return _tell(True, "memory and compute were not tried: there is no torch beside the agent")
    if not torch.cuda.is_available():
        # The driver lists it, a program cannot use it: with a CUDA build of torch that is a fault.
        if torch.version.cuda is None:
            return _tell(True, "memory and compute were not tried: torch beside the agent has no CUDA")
        return _tell(False, "CUDA cannot use it")
    until_s = time.monotonic() + seconds
    try:
        text = f"{memory(torch, 'cuda', until_s=until_s)}; {compute(torch, 'cuda', until_s=until_s)}"
    except Wrong as wrong:
        return _tell(False, str(wrong))
    except Exception as exc:  # whatever the device answers is what was to be found out
        return _tell(False, f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"[:500])
    return _tell(True, text)


class Wrong(Exception):
    """The device gave a wrong answer."""


def memory(torch: Any, device: str, *, until_s: float, bytes_max: int | None = None) -> str:
    """Fill and read back; raises Wrong naming how much differs. `bytes_max`: for tests."""
    free = bytes_max if bytes_max is not None else int(torch.cuda.mem_get_info()[0] * SHARE)
    step = min(CHUNK_BYTES, max(free, 1 << 20))
    base = torch.arange(_MODULUS, device=device, dtype=torch.uint8).repeat(step // _MODULUS + 1)[:step]
    chunks = []
    for number in range(max(1, free // step - 4)):  # the pattern itself, and what comparing needs
        if time.monotonic() >= until_s:
            break
        chunks.append(base ^ (number % 256))
    for number, chunk in enumerate(chunks):
        if not torch.equal(chunk, base ^ (number % 256)):
            differ = int((chunk != (base ^ (number % 256))).sum())
            raise Wrong(f"{differ} bytes of {step} were read otherwise than they were written, at {number * step}")
    return f"{len(chunks) * step >> 20} MiB written and read"


def compute(torch: Any, device: str, *, until_s: float, size: int = SIZE, rounds: int = ROUNDS) -> str:
    """Multiply; raises Wrong. Entries are at most 3 and sums below 2**24: exact where sums are kept in 32 bits."""
    generator = torch.Generator().manual_seed(7)
    left = torch.randint(-3, 4, (size, size), generator=generator).float()
    right = torch.randint(-3, 4, (size, size), generator=generator).float()
    rows = min(size, 64)
    known = left[:rows].double() @ right.double()
    a, b = left.to(device), right.to(device)
    first = a @ b
    if not torch.equal(first[:rows].cpu().double(), known):
        raise Wrong("a product of matrices differs from what the processor found")
    done = 1
    while done < rounds and time.monotonic() < until_s:
        if not torch.equal(a @ b, first):
            raise Wrong(f"the same product of matrices came out otherwise the {done + 1}th time")
        done += 1
    return f"{done} equal products of {size}×{size}"


def _tell(passed: bool, text: str) -> int:
    print(json.dumps({"passed": passed, "text": text}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
