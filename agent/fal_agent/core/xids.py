"""What NVIDIA's XID codes mean for who may use the GPU. Pure.

Source: NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the Xid Catalog"), column
"Resolution Bucket (Immediate Action)": RESTART_APP becomes APPLICATION, RESET_GPU and the workflows that end in a reset
become RESET, RESTART_BM becomes DEAD, IGNORE becomes NOTE, CONTACT_SUPPORT and what the catalogue does not know become
SUSPECT. Where we are stricter, the entry says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class XidClass(StrEnum):
    """What an XID asks for."""

    NOTE = "note"  # it is only told
    APPLICATION = "application"  # the program's fault: its container may die of it, the GPU is good
    SUSPECT = "suspect"  # the GPU is looked at once nobody uses it
    RESET = "reset"  # nothing more runs on it before a reset
    DEAD = "dead"  # no reset helps


@dataclass(frozen=True, slots=True)
class Xid:
    """One code."""

    code: int
    kind: XidClass
    text: str


_APPLICATION: Final[dict[int, str]] = {
    8: "GPU stopped processing",
    11: "invalid push buffer stream",
    13: "graphics engine exception",
    25: "invalid push buffer stream",
    31: "GPU memory page fault",
    32: "invalid push buffer stream",
    39: "copy engine exception",
    40: "copy engine exception",
    41: "copy engine exception",
    43: "a channel was reset after the program's fault",
    44: "graphics engine fault during a context switch",
    45: "a channel was removed after another fault",
    60: "video processor exception",
    68: "video decoder exception",
    69: "graphics engine class error",
    80: "corrupted data was sent to the GPU",
    94: "contained memory error; only its program is hit",  # the ECC counters decide about the GPU
    **dict.fromkeys((70, 71, 72, 75, 76, 77, 85, *range(126, 136)), "copy engine exception"),
    **dict.fromkeys((82, 83, 84, 86, 88, 89, *range(96, 106), 139), "video or picture engine exception"),
}
_SUSPECT: Final[dict[int, str]] = {
    38: "firmware watchdog timeout",  # the catalogue: ignore
    61: "internal micro-controller breakpoint",
    92: "high rate of corrected memory errors",  # the catalogue: ignore, then support
    121: "chip-to-chip link error",  # the catalogue: ignore, then support
    142: "video encoder error",
    151: "key rotation error",
    157: "a resource could not be retired",
    160: "a channel was retired",
    161: "a channel could not be retired",
    168: "part of its memory was taken out of use",
    **dict.fromkeys((166, 170), "NVLink encryption error"),
}
_RESET: Final[dict[int, str]] = {
    46: "GPU stopped processing",
    48: "uncorrectable memory error",
    62: "internal micro-controller halt",
    63: "a memory page or row is to be retired",  # the catalogue: ignore; it takes effect at a reset
    64: "a memory row could not be remapped",
    74: "NVLink error",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "its system processor does not answer",
    120: "its system processor failed",
    136: "link training failed",
    140: "unrecovered memory error",
    143: "initialisation error",
    **dict.fromkeys(range(144, 151), "NVLink error"),
    154: "the driver asks for a recovery action",  # which one stands in the kernel's log only
    155: "NVLink error",
    156: "a resource is to be retired",
    158: "fatal timeout",
    167: "fatal PCIe timeout",
    169: "internal micro-controller halt",
    171: "uncorrectable memory error (DRAM)",
    172: "uncorrectable memory error (SRAM)",
}
_DEAD: Final = {54: "auxiliary power is not connected", 79: "it has fallen off the bus"}
_NOTE: Final[dict[int, str]] = {
    14: "no error",
    37: "driver firmware error",
    66: "illegal access by the driver",
    67: "illegal access by the driver",
    78: "vGPU start error",
    93: "the InfoROM wears out",
    106: "test message",
    107: "test message",
    108: "remote translation error",
    137: "NVLink access without the right to it",
    141: "CUDA fast path error",
    152: "DLA error",
    153: "DLA timeout",
    159: "coherent link error",
    **dict.fromkeys(range(162, 166), "power smoothing"),
}
_CLASSES: Final = (
    (XidClass.APPLICATION, _APPLICATION),
    (XidClass.SUSPECT, _SUSPECT),
    (XidClass.RESET, _RESET),
    (XidClass.DEAD, _DEAD),
    (XidClass.NOTE, _NOTE),
)
XIDS: Final = {code: Xid(code, kind, text) for kind, texts in _CLASSES for code, text in texts.items()}


def xid_of(code: int) -> Xid:
    """What is known of a code; one that is not known is SUSPECT."""
    return XIDS.get(code) or Xid(code, XidClass.SUSPECT, "not in NVIDIA's catalogue as we know it")


__all__ = ["XIDS", "Xid", "XidClass", "xid_of"]
