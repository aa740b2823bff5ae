"""Which cluster falctl talks to, and as whom.

A profile is a TOML file with the scheduler's addresses and the caller's key and certificate. It is found by
`--profile` or `FALCTL_PROFILE` (a name or a path), else `default`, else `dev` (which `falctl dev up` writes).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import DEFAULT_TEAM, check_name

_KEYS: Final = {"servers", "identity", "team"}


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the cluster is and who the caller is."""

    name: str
    servers: tuple[str, ...]  # host:port of schedulers, tried in order
    identity: Path  # PEM file with key, certificate and CA
    team: str


def profiles_dir(env: Mapping[str, str]) -> Path:
    """Where named profiles live."""
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME", "/")) / ".config")
    return Path(base) / "falctl" / "profiles"


def load_profile(chosen: str | None, env: Mapping[str, str] | None = None) -> Profile:
    """The profile in force. Raises FalError when there is none or it is wrong."""
    env = os.environ if env is None else env
    wanted = chosen or env.get("FALCTL_PROFILE")
    folder = profiles_dir(env)
    if wanted is None:
        path = next((p for name in ("default", "dev") if (p := folder / f"{name}.toml").exists()), None)
        if path is None:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"There is no profile in {folder}",
                remedy="Start a cluster with `falctl dev up`, or name a profile with --profile.",
            )
    else:
        path = Path(wanted) if wanted.endswith(".toml") or "/" in wanted else folder / f"{wanted}.toml"
    return _read(path)


def _read(path: Path) -> Profile:
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise invalid(
            "profile", str(path), f"cannot be read: {error.strerror}", remedy="Name an existing profile."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise invalid("profile", str(path), f"is not TOML: {error}", remedy="Correct the line named.") from None
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise invalid("profile", unknown[0], f"is no key of {path}", remedy=f"Use {', '.join(sorted(_KEYS))}.")
    servers = data.get("servers")
    if not isinstance(servers, list) or not servers or not all(isinstance(s, str) and ":" in s for s in servers):
        raise invalid("servers", servers, f"in {path} is not a list of host:port", remedy='Write ["host:7420"].')
    identity = data.get("identity")
    if not isinstance(identity, str):
        raise invalid("identity", identity, f"in {path} is not a path", remedy="Name the identity's PEM file.")
    team = check_name(data.get("team", DEFAULT_TEAM), field="team")
    return Profile(path.stem, tuple(servers), (path.parent / identity).resolve(), team)


def write_profile(name: str, profile: Profile, env: Mapping[str, str] | None = None) -> Path:
    """Write a named profile, replacing it whole."""
    folder = profiles_dir(os.environ if env is None else env)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    servers = ", ".join(f'"{server}"' for server in profile.servers)
    text = f'servers = [{servers}]\nidentity = "{profile.identity}"\nteam = "{profile.team}"\n'
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return path
