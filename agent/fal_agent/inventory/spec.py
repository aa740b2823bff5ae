"""Reads `--sim-gpus`. Pure.

8xH100-80GB                       eight of one model
4xL40S-48GB,2xT4-16GB             several groups
2xA100-80GB:mig=1g.10gb*7         each device cut into seven instances
1xH100-80GB:mig=3g.40gb*1+1g.10gb*4
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fal_agent.inventory.catalog import CATALOG, GpuModel
from fal_contract.config import nearest
from fal_contract.errors import FalError, invalid

GPUS_MAX: Final = 64
_GROUP: Final = re.compile(r"(?P<count>\d+)\s*[xX×]\s*(?P<model>[A-Za-z0-9-]+)(?P<options>:.*)?")
_PROFILE: Final = re.compile(r"(?P<slices>[12347])g\.(?P<gb>\d{1,3})gb(\*(?P<count>\d{1,2}))?")
_FORM: Final = "Write COUNTxMODEL, such as 8xH100-80GB, or 2xA100-80GB:mig=1g.10gb*7; groups are separated by commas."


@dataclass(frozen=True, slots=True)
class Instance:
    """One MIG instance of a device."""

    profile: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """`count` equal devices; `instances` of each when it is cut by MIG."""

    count: int
    model: GpuModel
    instances: tuple[Instance, ...] = ()


def parse_sim_gpus(text: str, *, field: str = "sim_gpus") -> tuple[Group, ...]:
    """The groups of a specification. Raises INVALID naming field, value and remedy."""
    groups = tuple(_group(part.strip(), field) for part in text.split(","))
    total = sum(group.count for group in groups)
    if total > GPUS_MAX:
        raise invalid(field, text, f"asks for {total} GPUs", remedy=f"Use at most {GPUS_MAX}.")
    return groups


def _group(text: str, field: str) -> Group:
    match = _GROUP.fullmatch(text)
    if match is None:
        raise invalid(field, text, "is not a GPU specification", remedy=_FORM)
    count = int(match["count"])
    if not 1 <= count <= GPUS_MAX:
        raise invalid(field, text, f"asks for {count} GPUs", remedy=f"Use 1 to {GPUS_MAX}.")
    name = match["model"].upper()
    model = CATALOG.get(name)
    if model is None:
        same_chip = sorted(known for known in CATALOG if known.rpartition("-")[0] == name)
        near = " or ".join(same_chip) or nearest(name, sorted(CATALOG))
        remedy = f"Did you mean {near}?" if near else f"Known: {', '.join(sorted(CATALOG))}."
        raise invalid(field, text, f"names the unknown GPU model {match['model']!r}", remedy=remedy)
    options = (match["options"] or "").removeprefix(":")
    if not options:
        return Group(count, model)
    key, equals, value = options.partition("=")
    if key != "mig" or not equals:
        raise invalid(field, text, f"has the unknown option {options!r}", remedy=_FORM)
    return Group(count, model, _instances(value, model, text, field))


def cut(layout: str, model: GpuModel, *, field: str) -> tuple[Instance, ...]:
    """The instances of a layout such as 1g.10gb*3+2g.20gb on one device. Raises INVALID."""
    return _instances(layout, model, layout, field)


def _instances(value: str, model: GpuModel, text: str, field: str) -> tuple[Instance, ...]:
    def bad(why: str, remedy: str) -> FalError:
        return invalid(field, text, why, remedy=remedy)

    if model.mig_slices == 0:
        raise bad(f"cuts {model.name} by MIG, which it cannot", "Leave out :mig=….")
    instances: list[Instance] = []
    slices = gigabytes = 0
    for part in value.split("+"):
        match = _PROFILE.fullmatch(part.strip())
        count = int(match["count"] or 1) if match else 0
        if match is None or count < 1:
            raise bad(f"has the MIG profile {part!r}", "Write it as nvidia-smi does: 1g.10gb, or 1g.10gb*7.")
        slices += int(match["slices"]) * count
        gigabytes += int(match["gb"]) * count
        # Instances report a little less than their name; 10^9 a gigabyte comes near.
        size = Instance(f"{match['slices']}g.{match['gb']}gb", int(match["gb"]) * 10**9)
        instances += [size] * count
    if slices > model.mig_slices:
        raise bad(f"uses {slices} slices of {model.mig_slices} a device", "Use fewer or smaller instances.")
    if gigabytes > model.nominal_gb:
        raise bad(f"uses {gigabytes} GB of {model.nominal_gb} GB a device", "Use fewer or smaller instances.")
    return tuple(instances)
