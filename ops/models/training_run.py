"""An interruptible, repeatable run of training phases: step k draws the same random numbers in every run.

Used by `train_digits.py`. Knows nothing of models or data.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

SEED = 20240
SAVE_EVERY_STEPS = 50


@dataclass
class Run:
    """Where a training run keeps its state, and how long its phases took."""

    work: Path
    totals: dict[str, int]  # steps of each phase
    seconds: dict[str, float] = field(default_factory=dict)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: handing it back and faulting it in again costs a third of the time."""
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 1 << 30)):  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(option, value)


def generator_at(phase: str, step: int) -> torch.Generator:
    """The random numbers of one step: the same in every run, also in one that was interrupted before it."""
    return torch.Generator().manual_seed(SEED + 1_000_003 * step + sum(map(ord, phase)))


def train(
    run: Run,
    phase: str,
    modules: dict[str, torch.nn.Module],
    loss_at: Callable[[torch.Generator], torch.Tensor],
    *,
    rate: float,
    average: float = 0.0,
) -> None:
    """Minimise `loss_at` over the parameters that want gradients; ends with their (averaged) values in place.

    `average` is the decay of the exponential moving average of the parameters, 0 for none.
    """
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    averaged = [p.detach().clone() for p in parameters]
    path, first, spent_s, total = run.work / f"{phase}.pt", 0, 0.0, run.totals[phase]
    if path.exists():
        state = torch.load(path, weights_only=True)
        first, spent_s, averaged = state["step"], state["seconds"], state["averaged"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
    began_s = time.monotonic() - spent_s
    for step in range(first, total):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        loss = loss_at(generator_at(phase, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(average, (step + 1) / (step + 10)) if average else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        done = step + 1
        if done % SAVE_EVERY_STEPS == 0 or done == total:
            elapsed_s = time.monotonic() - began_s
            print(f"{phase}: step {done}/{total}, loss {loss.item():.4f}, {elapsed_s:.0f} s", flush=True)
            save(path, done, elapsed_s, parameters, averaged, optimizer)
    with torch.no_grad():
        for parameter, value in zip(parameters, averaged, strict=True):
            parameter.copy_(value)
    run.seconds[phase] = round(time.monotonic() - began_s, 1)


def save(
    path: Path,
    step: int,
    seconds: float,
    parameters: list[torch.Tensor],
    averaged: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a phase's state so that an interruption leaves the old state or the new one."""
    state = {
        "step": step,
        "seconds": seconds,
        "parameters": [p.detach() for p in parameters],
        "averaged": averaged,
        "optimizer": optimizer.state_dict(),
    }
    half = path.with_suffix(".half")
    torch.save(state, half)
    half.replace(path)
