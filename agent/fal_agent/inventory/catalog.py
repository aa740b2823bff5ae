"""Names of GPU models: from what the driver says to the one word that manifests use. Pure.

`MODEL-<nominal GB>GB`, such as H100-80GB, whatever the form factor: an app that needs NVLink asks for it. Memory
is what the driver reports for the part, in MiB, which is less than the nominal size. A product that is
not listed gets a name made of its own words and its memory, so new parts work before they are known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_MIB: Final = 1 << 20
_VENDOR: Final = re.compile(r"\b(nvidia|tesla|geforce|quadro|graphics device)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A known part. `nvlinks` are links of the SXM form to every other GPU of its node; 0: PCIe only."""

    name: str
    product: str  # as NVML names it, for simulation
    memory_mib: int
    power_idle_w: int
    nvlinks: int = 0
    mig_slices: int = 0

    @property
    def memory_bytes(self) -> int:
        """As the driver reports it."""
        return self.memory_mib * _MIB

    @property
    def chip(self) -> str:
        """The name without its memory."""
        return self.name.rpartition("-")[0]

    @property
    def nominal_gb(self) -> int:
        """The memory in the name."""
        return int(self.name.rpartition("-")[2].removesuffix("GB"))


_MODELS: Final = (
    GpuModel("GB200-186GB", "NVIDIA GB200", 189471, 150, nvlinks=18, mig_slices=7),
    GpuModel("B200-180GB", "NVIDIA B200", 183359, 140, nvlinks=18, mig_slices=7),
    GpuModel("GH200-96GB", "NVIDIA GH200 480GB", 97871, 90, mig_slices=7),
    GpuModel("H200-141GB", "NVIDIA H200", 143771, 75, nvlinks=18, mig_slices=7),
    GpuModel("H100-80GB", "NVIDIA H100 80GB HBM3", 81559, 70, nvlinks=18, mig_slices=7),
    GpuModel("H100-94GB", "NVIDIA H100 NVL", 95830, 60, mig_slices=7),
    GpuModel("H20-96GB", "NVIDIA H20", 97871, 75, nvlinks=18, mig_slices=7),
    GpuModel("A100-80GB", "NVIDIA A100-SXM4-80GB", 81920, 60, nvlinks=12, mig_slices=7),
    GpuModel("A100-40GB", "NVIDIA A100-SXM4-40GB", 40960, 50, nvlinks=12, mig_slices=7),
    GpuModel("A30-24GB", "NVIDIA A30", 24576, 30, mig_slices=4),
    GpuModel("A40-48GB", "NVIDIA A40", 46068, 30),
    GpuModel("A10G-24GB", "NVIDIA A10G", 23028, 15),
    GpuModel("A10-24GB", "NVIDIA A10", 23028, 15),
    GpuModel("L40S-48GB", "NVIDIA L40S", 46068, 35),
    GpuModel("L40-48GB", "NVIDIA L40", 46068, 35),
    GpuModel("L4-24GB", "NVIDIA L4", 23034, 12),
    GpuModel("RTXPRO6000-96GB", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, 30, mig_slices=4),
    GpuModel("RTX6000ADA-48GB", "NVIDIA RTX 6000 Ada Generation", 49140, 20),
    GpuModel("RTXA6000-48GB", "NVIDIA RTX A6000", 49140, 20),
    GpuModel("RTX5090-32GB", "NVIDIA GeForce RTX 5090", 32607, 20),
    GpuModel("RTX4090-24GB", "NVIDIA GeForce RTX 4090", 24564, 15),
    GpuModel("RTX3090-24GB", "NVIDIA GeForce RTX 3090", 24576, 20),
    GpuModel("V100-32GB", "Tesla V100-SXM2-32GB", 32768, 40),
    GpuModel("V100-16GB", "Tesla V100-SXM2-16GB", 16384, 40),
    GpuModel("T4-16GB", "Tesla T4", 15360, 10),
)
CATALOG: Final[dict[str, GpuModel]] = {model.name: model for model in _MODELS}
# How a chip is written in product names; the first that matches wins, so longer words stand first.
_CHIPS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), chip)
    for pattern, chip in (
        (r"\brtx pro 6000\b", "RTXPRO6000"),
        (r"\brtx 6000 ada\b", "RTX6000ADA"),
        (r"\brtx a6000\b", "RTXA6000"),
        (r"\brtx (5090|4090|3090)\b(?! (ti|d|laptop))", "RTX{0}"),
        (r"\b(gb200|gh200|b200|h200|h100|h20|a100|a10g|l40s|v100)\b", "{0}"),
        (r"\b(a30|a40|a10|l40|l4|t4)\b", "{0}"),
    )
)


def normalise(product: str, memory_bytes: int) -> str:
    """The model's name for a product name and total memory as the driver reports them."""
    gib = memory_bytes / (1 << 30)
    for pattern, form in _CHIPS:
        found = pattern.search(product)
        if found is None:
            continue
        chip = form.format(*(found.groups() or ("",))).upper()
        known = [model for model in _MODELS if model.chip == chip]
        nearest = min(known, key=lambda model: abs(model.memory_bytes - memory_bytes), default=None)
        if nearest is not None and abs(nearest.memory_bytes - memory_bytes) <= 0.12 * nearest.memory_bytes:
            return nearest.name
        return f"{chip}-{max(1, round(gib))}GB"
    words = re.findall(r"[A-Za-z0-9]+", _VENDOR.sub(" ", product))
    plain = [word.upper() for word in words if not re.fullmatch(r"\d+GB", word, re.IGNORECASE)]
    return f"{'-'.join(plain) or 'GPU'}-{max(1, round(gib))}GB"


def mig_model(model: str, profile: str) -> str:
    """The model's name of an instance: never that of the whole device, so that no app gets a slice unasked."""
    return f"{model}-MIG-{profile}"
