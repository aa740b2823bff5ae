"""What a proxy that was killed knows when it comes back, without an agent: runners, terms, gateways, its port.

Written whole at every change and renamed into place, so that a reader finds the old or the new one. Not synced: a
crash of the machine ends the runners too, and the agent tells everything again anyway. A file that is damaged or of
another version is therefore ignored, with a warning.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack

from fal_agent.proxy.messages import (
    GatewayEntry,
    RunnerEntry,
    decode,
    gateway_from_wire,
    gateway_to_wire,
    revoked_from_wire,
    revoked_to_wire,
    runner_from_wire,
    runner_to_wire,
    take,
)
from fal_contract.errors import FalError
from fal_contract.revocation import RevokedPeer
from fal_contract.telemetry import get_logger

VERSION: Final = 1
_log = get_logger("proxy.state")


@dataclass(frozen=True, slots=True)
class ProxyState:
    """The content of the file."""

    runners: tuple[RunnerEntry, ...] = ()
    terms: tuple[int, int] = (0, 0)
    gateways: tuple[GatewayEntry, ...] = ()
    port: int = 0  # that was listened on; 0: none yet
    revoked: tuple[RevokedPeer, ...] = ()


def save(path: Path, state: ProxyState) -> None:
    """Replace the file. Raises OSError when the disk does not take it."""
    body = msgpack.packb(
        {
            "t": "state",
            "version": VERSION,
            "runners": [runner_to_wire(entry) for entry in state.runners],
            "terms": list(state.terms),
            "gateways": [gateway_to_wire(entry) for entry in state.gateways],
            "port": state.port,
            "revoked": [revoked_to_wire(peer) for peer in state.revoked],
        }
    )
    scratch = path.with_name(f".{path.name}.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(zlib.crc32(body).to_bytes(4, "big") + body)
    scratch.replace(path)


def load(path: Path) -> ProxyState:
    """What was saved; empty without a file, or with one that cannot be used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ProxyState()
    checksum, body = content[:4], content[4:]
    try:
        if zlib.crc32(body).to_bytes(4, "big") != checksum:
            raise ValueError("its checksum is wrong")
        raw = decode(body)
        if take(raw, "version", int) != VERSION:
            raise ValueError(f"it is of version {raw['version']}, this is {VERSION}")
        newest, before = take(raw, "terms", list)
        return ProxyState(
            runners=tuple(runner_from_wire(entry) for entry in take(raw, "runners", list)),
            terms=(int(newest), int(before)),
            gateways=tuple(gateway_from_wire(entry) for entry in take(raw, "gateways", list)),
            port=take(raw, "port", int),
            revoked=tuple(revoked_from_wire(peer) for peer in take(raw, "revoked", list, default=[])),
        )
    except (ValueError, FalError, TypeError, AttributeError) as exc:
        _log.warning("state file ignored; the agent will tell the runners again", path=str(path), why=str(exc))
        return ProxyState()
