"""Which part of the range for containers belongs to which agent of a machine.

Invariant: no two agents that live hold the same part. A claim is one line of a JSON file below /run, changed under a
lock, so it ends with the boot; one whose owner's folder is gone is free. Called by `egress`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError
from fal_runtime.network.policy import Network, split

AGENTS_MAX: Final = 16


def claim(journal: Path, owner: Path, whole: Network) -> Network:
    """The part of `whole` that `owner` (a folder) holds, now or already. NO_CAPACITY when all are taken."""
    parts = split(whole, AGENTS_MAX)
    with journal.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        claims = {part: held for part, held in _read(journal).items() if Path(held).is_dir() or held == str(owner)}
        mine = next((part for part in parts if claims.get(str(part)) == str(owner)), None)
        if mine is None:
            taken = [ipaddress.IPv4Network(part) for part in claims]
            mine = next((part for part in parts if not any(part.overlaps(other) for other in taken)), None)
            if mine is None:
                raise FalError(
                    Code.NO_CAPACITY,
                    f"all {len(parts)} parts of {whole} are held by other agents of this machine",
                    remedy="Give this agent another --egress-subnet.",
                )
            claims = {part: held for part, held in claims.items() if held != str(owner)} | {str(mine): str(owner)}
            beside = journal.with_suffix(".new")
            beside.write_text(json.dumps(claims))
            beside.rename(journal)
    return mine


def _read(journal: Path) -> dict[str, str]:
    try:
        claims = json.loads(journal.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(part): str(held) for part, held in claims.items()} if isinstance(claims, dict) else {}
