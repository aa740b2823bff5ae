"""One GPU's health: what it is suspected of, since when, what is owed next. Pure.

    OK -> SUSPECT -> QUARANTINED(fault, reason, since) -> DIAGNOSING -> OK, or back to QUARANTINED

Invariants: a GPU that is not OK gets no new runner; it leaves QUARANTINED only by a diagnose that passed or by an
operator's word; one that is DEAD is never diagnosed by itself; diagnoses by itself are bounded and wait longer each
time. What lasts (heat, slowness, a foreign process) counts after a time only: a moment's reading moves no runner.
Called by fal_agent.gpu_care, which looks, diagnoses and keeps this over restarts. Times: `now_s` monotonic, `wall_s`
Unix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from typing import Any, Final

from fal_agent.core.xids import XidClass, xid_of
from fal_contract.limits import (
    GPU_APPLICATION_RUNNERS_MAX,
    GPU_APPLICATION_WINDOW_S,
    GPU_COOL_C,
    GPU_DIAGNOSE_WAIT_MAX_S,
    GPU_DIAGNOSE_WAIT_S,
    GPU_DIAGNOSES_MAX,
    GPU_FOREIGN_S,
    GPU_GONE_S,
    GPU_HOT_C,
    GPU_HOT_S,
    GPU_IDLE_MEMORY_BYTES_MAX,
    GPU_LOAD_PERCENT,
    GPU_SLOW_CLOCK_PERCENT,
    GPU_SLOW_S,
)

_XIDS_KEPT: Final = 16
_FELLOWS_MIN: Final = 2  # at work, of the same model: below that there is nothing to compare with


class Stage(StrEnum):
    """Where a GPU is. The words are the wire's."""

    OK = ""
    SUSPECT = "suspect"  # no new runner; what runs goes on; diagnosed once it is idle
    QUARANTINED = "quarantined"  # its runners go elsewhere
    DIAGNOSING = "diagnosing"


class Fault(StrEnum):
    """What it is accused of. The words are the wire's."""

    SUSPECT = "suspect"
    SLOW = "slow"
    FOREIGN = "foreign"
    MEMORY = "memory"
    STUCK = "stuck"
    RESET = "reset"
    DEAD = "dead"


_WEIGHT: Final = {fault: weight for weight, fault in enumerate(Fault)}


@dataclass(frozen=True, slots=True)
class Look:
    """One GPU at one look. -1: the device does not tell. `strangers`: processes that are not its holder's.

    `stuck`: why its holder's container cannot be killed; a wait for weights or a disk is never one (pitfall 8).
    """

    gpu_id: str
    device_id: str = ""  # of a MIG instance: the device's; else its own
    model: str = ""
    present: bool = True
    holders: tuple[str, ...] = ()  # runner ids; several where they share it
    pids: tuple[int, ...] = ()
    strangers: tuple[int, ...] = ()
    memory_used_bytes: int = 0
    stuck: str = ""
    uncorrected: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    temperature_c: int = -1
    utilisation_percent: int = -1
    throttled: tuple[str, ...] = ()  # by the hardware or for heat; a power cap is none
    clock_mhz: int = -1
    fellows_clock_mhz: int = -1  # median of others of its model at work
    pcie_width: int = -1
    pcie_width_max: int = -1
    nvlinks: int = 0

    @property
    def holder(self) -> str:
        """Who holds it, for operators; empty: nobody."""
        return ", ".join(self.holders)


@dataclass(frozen=True, slots=True)
class SeenXid:
    """An XID that came; `runner` held the GPU."""

    code: int
    wall_s: float
    runner: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """One GPU. `signs`: what is seen now, and since when (monotonic) without a gap."""

    gpu_id: str
    stage: Stage = Stage.OK
    fault: Fault | None = None
    reason: str = ""
    since_s: float = 0.0  # Unix
    tries: int = 0  # diagnoses by itself for this fault
    next_try_s: float = 0.0  # monotonic
    reset_done: bool = False  # the machine was started anew since
    spoiled: bool = False  # something came while it was diagnosed
    verdict: str = ""  # of the last diagnose
    verified_s: float = 0.0  # Unix; when it was last given back
    nvlinks: int = 0  # the most that were seen
    xids: tuple[SeenXid, ...] = ()
    signs: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it may be given to new runners, as far as this goes."""
        return self.stage is Stage.OK

    @property
    def quarantined(self) -> bool:
        """Whether runners that hold it should go elsewhere."""
        return self.stage in (Stage.QUARANTINED, Stage.DIAGNOSING) and self.fault not in (None, Fault.SUSPECT)

    @property
    def wants_reset(self) -> bool:
        """Whether it must be reset before it can pass."""
        return self.fault is Fault.RESET and not self.reset_done

    @property
    def text(self) -> str:
        """The reason with what the last diagnose found, for operators."""
        return f"{self.reason}; diagnosed: {self.verdict}" if self.reason and self.verdict else self.reason


# Sign → what it is evidence of, and after how many seconds without a gap.
_SIGNS: Final[Mapping[str, tuple[Fault, float]]] = {
    "gone": (Fault.DEAD, GPU_GONE_S),
    "ecc": (Fault.RESET, 0.0),
    "nvlink": (Fault.RESET, GPU_SLOW_S),
    "stuck": (Fault.STUCK, 0.0),
    "memory": (Fault.MEMORY, GPU_FOREIGN_S),
    "foreign": (Fault.FOREIGN, GPU_FOREIGN_S),
    "hot": (Fault.SLOW, GPU_HOT_S),
    "throttled": (Fault.SLOW, GPU_SLOW_S),
    "slow": (Fault.SLOW, GPU_SLOW_S),
    "pcie": (Fault.SLOW, GPU_SLOW_S),
}


def see(health: Health, look: Look, *, now_s: float, wall_s: float) -> Health:
    """After one look."""
    found = _signs(look, health)
    signs = {name: health.signs.get(name, now_s) for name in found}
    health = replace(health, signs=signs, nvlinks=max(health.nvlinks, look.nvlinks))
    if health.stage is Stage.DIAGNOSING:
        return health  # the check itself is a process with memory; the look after it decides
    for name, why in found.items():
        fault, after_s = _SIGNS[name]
        if now_s - signs[name] >= after_s:
            health = _accuse(health, fault, why, now_s=now_s, wall_s=wall_s)
    return health


def _signs(look: Look, health: Health) -> dict[str, str]:
    """What is seen, each with a sentence for an operator."""
    if not look.present:
        return {"gone": "the driver does not list it any more: it has fallen off the bus"}
    found: dict[str, str] = {}
    if fault := memory_fault(look):
        found["ecc"] = fault
    if look.nvlinks < health.nvlinks:
        found["nvlink"] = f"{look.nvlinks} of {health.nvlinks} NVLinks are up"
    if look.stuck:
        found["stuck"] = look.stuck
    if look.holder:
        if look.strangers:
            found["foreign"] = f"process {_pids(look.strangers)} uses it beside runner {look.holder}"
    elif look.pids:
        found["foreign"] = f"process {_pids(look.pids)} uses it, and no runner holds it"
    elif look.memory_used_bytes > GPU_IDLE_MEMORY_BYTES_MAX:
        found["memory"] = f"{look.memory_used_bytes >> 20} MiB of its memory are in use, and no runner holds it"
    if look.temperature_c >= (GPU_COOL_C if "hot" in health.signs else GPU_HOT_C):
        found["hot"] = f"{GPU_HOT_C} °C or more; check its cooling"
    if look.utilisation_percent >= GPU_LOAD_PERCENT:
        found |= _slowness(look)
    return found


def _slowness(look: Look) -> dict[str, str]:
    """Of a GPU at work."""
    found: dict[str, str] = {}
    if look.throttled:
        found["throttled"] = f"slowed down by its hardware ({', '.join(look.throttled)}); check cooling and power"
    if look.fellows_clock_mhz > 0 and 0 <= look.clock_mhz * 100 < look.fellows_clock_mhz * GPU_SLOW_CLOCK_PERCENT:
        found["slow"] = f"far slower at work than its fellows (less than {GPU_SLOW_CLOCK_PERCENT} % of their clock)"
    if 0 < look.pcie_width < look.pcie_width_max:
        found["pcie"] = f"its PCIe link has {look.pcie_width} of {look.pcie_width_max} lanes"
    return found


def memory_fault(look: Look) -> str:
    """What its ECC counters say against it; empty: nothing."""
    if look.remap_failed:
        return "its memory has no spare rows left; replace it"
    if look.remap_pending:
        return "a memory row waits to be remapped; reset it"
    if look.uncorrected > 0:
        return f"{look.uncorrected} uncorrected memory errors since the last reset; reset it"
    return ""


def fellows_clock_mhz(look: Look, looks: Iterable[Look]) -> int:
    """The median clock of other GPUs of its model at work; -1 where too few are."""
    clocks = [
        other.clock_mhz
        for other in looks
        if other.gpu_id != look.gpu_id
        and other.device_id != look.device_id
        and other.model == look.model
        and other.clock_mhz > 0
        and other.utilisation_percent >= GPU_LOAD_PERCENT
    ]
    return int(median(clocks)) if len(clocks) >= _FELLOWS_MIN else -1


def xid(health: Health, code: int, *, runner: str, now_s: float, wall_s: float) -> Health:
    """The driver told of an XID; `runner` holds the GPU now."""
    known = xid_of(code)
    health = replace(health, xids=(*health.xids, SeenXid(code, wall_s, runner))[-_XIDS_KEPT:])
    why = f"XID {code}: {known.text}"
    match known.kind:
        case XidClass.NOTE:
            return health
        case XidClass.APPLICATION:
            return _application(health, now_s=now_s, wall_s=wall_s)
        case XidClass.SUSPECT:
            return _accuse(health, Fault.SUSPECT, why, now_s=now_s, wall_s=wall_s)
        case XidClass.RESET:
            return _accuse(health, Fault.RESET, why, now_s=now_s, wall_s=wall_s)
        case XidClass.DEAD:
            return _accuse(health, Fault.DEAD, why, now_s=now_s, wall_s=wall_s)


def _application(health: Health, *, now_s: float, wall_s: float) -> Health:
    """A program's fault, unless one runner after the other has it."""
    since_s = max(wall_s - GPU_APPLICATION_WINDOW_S, health.verified_s)
    blamed = dict.fromkeys(
        seen.runner
        for seen in health.xids
        if seen.runner and seen.wall_s >= since_s and xid_of(seen.code).kind is XidClass.APPLICATION
    )
    if len(blamed) < GPU_APPLICATION_RUNNERS_MAX:
        return health
    why = f"programs of {len(blamed)} runners in a row failed on it ({', '.join(blamed)})"
    return _accuse(health, Fault.SUSPECT, why, now_s=now_s, wall_s=wall_s)


def _accuse(health: Health, fault: Fault, why: str, *, now_s: float, wall_s: float) -> Health:
    """The worst fault stands, with its first reason."""
    if health.stage is Stage.DIAGNOSING:
        health = replace(health, spoiled=True)
    if health.fault is not None and _WEIGHT[fault] <= _WEIGHT[health.fault]:
        return health
    stage = health.stage
    if stage is not Stage.DIAGNOSING:
        stage = Stage.SUSPECT if fault is Fault.SUSPECT else Stage.QUARANTINED
    return replace(
        health,
        stage=stage,
        fault=fault,
        reason=why,
        since_s=health.since_s or wall_s,
        tries=0,
        next_try_s=now_s,
        reset_done=False,
        verdict="",
    )


def blocked(health: Health, look: Look) -> str:
    """Why it cannot be diagnosed now; empty: it can."""
    if look.holder:
        return f"runner {look.holder} holds it"
    if not look.present:
        return "the driver does not list it"
    if look.pids:
        return f"process {_pids(look.pids)} uses it"
    if look.memory_used_bytes > GPU_IDLE_MEMORY_BYTES_MAX:
        return f"{look.memory_used_bytes >> 20} MiB of its memory are in use"
    if "hot" in health.signs:
        return f"it has {look.temperature_c} °C"
    return ""


def due(health: Health, look: Look, *, now_s: float) -> bool:
    """Whether it should be diagnosed now, by itself."""
    return (
        health.stage in (Stage.SUSPECT, Stage.QUARANTINED)
        and health.fault is not Fault.DEAD
        and health.tries < GPU_DIAGNOSES_MAX
        and now_s >= health.next_try_s
        and not blocked(health, look)
    )


def begin(health: Health, *, asked: bool = False) -> Health:
    """A diagnose begins; `asked`: by an operator, so that earlier ones do not count."""
    why = health.reason or "an operator asked that it be looked at"
    return replace(health, stage=Stage.DIAGNOSING, reason=why, spoiled=False, tries=0 if asked else health.tries + 1)


def finish(health: Health, *, passed: bool, verdict: str, now_s: float, wall_s: float) -> Health:
    """It has ended. One that passed, and in which nothing came meanwhile, is given back."""
    if health.stage is not Stage.DIAGNOSING:
        return health
    if passed and not health.spoiled:
        return Health(
            health.gpu_id, verdict=verdict, verified_s=wall_s, nvlinks=health.nvlinks, xids=health.xids, signs={}
        )
    why = health.reason if passed else verdict
    wait_s = min(GPU_DIAGNOSE_WAIT_S * 2.0 ** max(0, health.tries - 1), GPU_DIAGNOSE_WAIT_MAX_S)
    since_s = health.since_s or wall_s
    health = replace(
        health, stage=Stage.QUARANTINED, verdict=why, since_s=since_s, next_try_s=now_s + wait_s, spoiled=False
    )
    # What was only suspected, or not even that, has been seen now.
    return replace(health, fault=Fault.RESET) if health.fault in (None, Fault.SUSPECT) else health


def clear(health: Health, *, wall_s: float) -> Health:
    """An operator gives it back unseen."""
    return Health(health.gpu_id, verified_s=wall_s, nvlinks=0, xids=health.xids, verdict="given back by an operator")


def _pids(pids: tuple[int, ...]) -> str:
    return ", ".join(map(str, pids[:8])) + (" …" if len(pids) > 8 else "")


# ---- over a restart of the agent


def keep(health: Health) -> dict[str, Any]:
    """What of it must survive, as plain values."""
    stage, reason = health.stage, health.reason
    if stage is Stage.DIAGNOSING:
        stage = Stage.QUARANTINED
        if health.fault is None:  # one that was well, and was looked at for an operator
            stage, reason = Stage.OK, ""
    return {
        "stage": str(stage),
        "fault": str(health.fault or ""),
        "reason": reason,
        "since_s": health.since_s,
        "tries": health.tries,
        "reset_done": health.reset_done,
        "verdict": health.verdict,
        "verified_s": health.verified_s,
        "nvlinks": health.nvlinks,
        "xids": [[seen.code, seen.wall_s, seen.runner] for seen in health.xids],
    }


def restore(gpu_id: str, kept: Mapping[str, Any], *, now_s: float, same_boot: bool) -> Health:
    """The inverse. Another boot of the machine was a reset. Raises ValueError, KeyError, TypeError for nonsense."""
    fault = Fault(kept["fault"]) if kept["fault"] else None
    tries = int(kept["tries"]) if same_boot else 0
    wait_s = min(GPU_DIAGNOSE_WAIT_S * 2.0 ** max(0, tries - 1), GPU_DIAGNOSE_WAIT_MAX_S) if tries else 0.0
    if not math.isfinite(float(kept["since_s"])):
        raise ValueError("since_s is no time")
    return Health(
        gpu_id,
        stage=Stage(kept["stage"]),
        fault=fault,
        reason=str(kept["reason"]),
        since_s=float(kept["since_s"]),
        tries=tries,
        next_try_s=now_s + wait_s,
        reset_done=bool(kept["reset_done"]) or not same_boot,
        verdict=str(kept["verdict"]),
        verified_s=float(kept["verified_s"]),
        nvlinks=int(kept["nvlinks"]) if same_boot else 0,
        xids=tuple(SeenXid(int(code), float(at_s), str(runner)) for code, at_s, runner in kept["xids"])[-_XIDS_KEPT:],
    )


__all__ = [
    "Fault",
    "Health",
    "Look",
    "SeenXid",
    "Stage",
    "begin",
    "blocked",
    "clear",
    "due",
    "fellows_clock_mhz",
    "finish",
    "keep",
    "memory_fault",
    "restore",
    "see",
    "xid",
]
