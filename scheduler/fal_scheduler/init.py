"""Making a cluster, and certificates for people and gateways, on the machine that holds the CA.

`init` makes the identity folder (seal key, CA), a first admin's identity and a small config.toml; it never changes
what is there. `issue` makes further identities. Both are offline: no scheduler need run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom
from typing import Final

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import Role, check_peer_name, new_cluster_id, write_durably
from fal_scheduler.ca import CertificateAuthority

PERSON_TTL_S: Final = 365 * 86400.0
ISSUED: Final = (Role.VIEWER, Role.OPERATOR, Role.ADMIN, Role.SERVING)


def init(data_dir: Path, *, hosts: Sequence[str], clock: Clock, seal_key: Path | None = None) -> str:
    """Make a cluster; returns its id. Raises ALREADY_EXISTS where there is one."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    now_s = clock.wall_s()
    cluster_id = new_cluster_id(SystemRandom())
    ca = CertificateAuthority.create(data_dir / "identity", cluster_id=cluster_id, now_s=now_s, seal_key=seal_key)
    ca.new_identity(role=Role.ADMIN, name="admin", now_s=now_s, ttl_s=PERSON_TTL_S).save(data_dir / "operator")
    config = data_dir / "config.toml"
    if hosts and not config.exists():
        about = "# Written by init. Names and addresses in the scheduler's certificate."
        text = f"{about}\nhosts = {json.dumps(list(hosts))}\n"
        write_durably(config, text.encode(), mode=0o644)
    return ca.cluster_id


def issue(
    data_dir: Path, *, role: str, name: str, out: Path, ttl_s: float, clock: Clock, seal_key: Path | None = None
) -> None:
    """Make an identity for a person or a gateway: one PEM file `out`, which must not exist."""
    if role not in {str(one) for one in ISSUED}:
        remedy = f"Use one of {', '.join(ISSUED)}; nodes join with a token."
        raise invalid("role", role, "is not issued here", remedy=remedy)
    check_peer_name(name)
    if not 60.0 <= ttl_s <= PERSON_TTL_S:
        raise invalid("ttl", ttl_s, "is out of bounds", remedy=f"Use 60 to {PERSON_TTL_S:.0f} seconds.")
    if out.exists():
        raise FalError(Code.ALREADY_EXISTS, f"{out} exists", remedy="Name another file, or remove it.")
    ca = CertificateAuthority.open(data_dir / "identity", seal_key=seal_key)
    ca.new_identity(role=Role(role), name=name, now_s=clock.wall_s(), ttl_s=ttl_s).save(out)


__all__ = ["init", "issue"]
