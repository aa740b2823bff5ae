"""What names an entry of the compile cache, and who may read it. Pure.

A key is SHA-256 over everything that decides what a compiler makes, and over nothing else: **not the weights**, so that
every fine-tune of an architecture finds what the first one compiled. The text that is hashed:

    fal-cache-key 1\\n, then for each fact in order of name: NAME SPACE BYTES \\n VALUE \\n   (BYTES: length in UTF-8)

The length keeps two facts from being taken for one. Every fact must be given; one that does not apply is "none".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from fal_contract.errors import FalError, invalid
from fal_contract.ids import SYSTEM_TEAM, check_name
from fal_contract.limits import CACHE_FACT_BYTES_MAX
from fal_contract.model_manifest import check_digest

FACTS: Final[Mapping[str, str]] = {
    "engine_image": "digest of the image that compiles and runs; the release, where it is the node's own system",
    "torch": "version of PyTorch",
    "cuda": "version of CUDA that PyTorch was built for",
    "triton": "version of Triton",
    "driver": "version of the GPU driver",
    "gpu_name": "GPU model as the driver tells it",
    "gpu_capability": "compute capability, such as 9.0",
    "component_class": "class that is compiled, with its module",
    "component_config": "SHA-256 of its config.json, hexadecimal",
    "dtype": "bfloat16 …",
    "compile_options": "mode, dynamic shapes …, in one canonical text",
    "lora_slot": "shape of the LoRA slot that is compiled in",
}
CLUSTER: Final = "cluster"
OUTPUT_URI: Final = "push://ingest"  # of what a node took in: no origin, only nodes have it
_TEAM_PREFIX: Final = "team/"
_PRINTABLE: Final = re.compile(r"[ -~]+")


def cache_key(facts: Mapping[str, str]) -> str:
    """The key of exactly these facts, 64 hexadecimal digits. INVALID, naming the facts that are unknown or missing."""
    unknown, missing = sorted(facts.keys() - FACTS.keys()), sorted(FACTS.keys() - facts.keys())
    if unknown:
        raise invalid("facts", ", ".join(unknown)[:200], "decide nothing", remedy=f"Give only {', '.join(FACTS)}.")
    if missing:
        raise invalid("facts", ", ".join(missing), "are missing", remedy='Give all; write "none" where one is none.')
    hasher = hashlib.sha256(b"fal-cache-key 1\n")
    for name in sorted(facts):
        value = _checked(name, facts[name])
        hasher.update(f"{name} {len(value)}\n".encode() + value + b"\n")
    return hasher.hexdigest()


def _checked(name: str, value: str) -> bytes:
    raw = value.encode(errors="surrogatepass")
    if len(raw) > CACHE_FACT_BYTES_MAX or not _PRINTABLE.fullmatch(value):
        remedy = f'1 to {CACHE_FACT_BYTES_MAX} printable ASCII characters; "none" where it is none.'
        raise invalid(f"facts.{name}", value[:80], "is no fact", remedy=remedy)
    if name == "component_config":
        check_digest(value, field=f"facts.{name}")
    return raw


def check_key(key: str) -> str:
    """Return `key` when it could be one, else raise INVALID."""
    return check_digest(key, field="key")


def check_namespace(namespace: str) -> str:
    """Return "cluster" or "team/NAME" when it is one, else raise INVALID naming `namespace`."""
    if namespace == CLUSTER:
        return namespace
    try:
        team = namespace.removeprefix(_TEAM_PREFIX)
        if namespace.startswith(_TEAM_PREFIX) and check_name(team, field="namespace") != SYSTEM_TEAM:
            return namespace
    except FalError:
        pass
    raise invalid("namespace", namespace[:80], "is no namespace", remedy="Use cluster or team/NAME.")


def namespace_of(team: str) -> str:
    """A team's own namespace."""
    return f"{_TEAM_PREFIX}{team}"


def may_read(namespace: str, team: str) -> bool:
    """Whether runners of `team` may see entries of `namespace`."""
    return namespace == CLUSTER or (team != "" and namespace == namespace_of(team))


def entry_model(namespace: str, key: str) -> str:
    """`team/name` under which an entry's files are staged; one a namespace and key, of no customer's team."""
    digest = hashlib.sha256(f"{namespace}\n{key}\n".encode()).hexdigest()
    return f"{SYSTEM_TEAM}/cache-{digest[:40]}"


__all__ = [
    "CLUSTER",
    "FACTS",
    "OUTPUT_URI",
    "cache_key",
    "check_key",
    "check_namespace",
    "entry_model",
    "may_read",
    "namespace_of",
]
