"""How the node's fal-fsd is started: the operator's settings of it and what only the agent knows, in one file.

Invariants: what the agent decides (folder, socket, schedulers, identity) cannot be set by the operator's file; the file
is written whole before fsd starts, so that one which is started again after a crash finds the same settings. Called by
fal_agent.agent.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fal_agent.layout import Layout
from fal_agent.options import AgentOptions
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import write_durably
from fal_contract.limits import CONFIG_BYTES_MAX

_OURS: Final = ("state_dir", "socket", "schedulers", "identity")
_HEAD: Final = "# Written by fal-agent at each start; change the file named by fsd_config instead.\n"


def command(options: AgentOptions, layout: Layout, socket: Path) -> Sequence[str]:
    """The command of this node's fal-fsd; its settings are written. Raises INVALID, NOT_FOUND."""
    folder = layout.fsd_socket.parent
    settings = _operator_settings(options.fsd_config) if options.fsd_config else {}
    settings |= {
        "state_dir": str(folder),
        "socket": str(socket),
        "schedulers": options.schedulers,
        "identity": str(layout.identity),
    }
    file = folder / "fsd.toml"
    lines = (f"{name} = {_toml(name, value)}\n" for name, value in settings.items())
    write_durably(file, (_HEAD + "".join(lines)).encode())
    return [sys.executable, "-m", "fal_fsd.main", "run", "--config", str(file)]


def _operator_settings(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
        if len(raw) > CONFIG_BYTES_MAX:
            raise invalid("fsd_config", str(file), "is too large", remedy=f"At most {CONFIG_BYTES_MAX} bytes.")
        settings = tomllib.loads(raw.decode())
    except OSError as exc:
        raise FalError(
            Code.NOT_FOUND,
            f"fsd_config {file} cannot be read: {exc.strerror}",
            remedy="Name a readable file.",
            field="fsd_config",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise invalid("fsd_config", str(file), f"is no TOML: {exc}", remedy="Correct that line.") from None
    for name in _OURS:
        if name in settings:
            raise invalid(f"fsd_config: {name}", settings[name], "is the agent's to set", remedy="Take it out.")
    return settings


def _toml(name: str, value: Any) -> str:
    """JSON's strings, numbers, truth values and lists of them are TOML's."""
    if isinstance(value, (str, int, float)) or (isinstance(value, list) and all(isinstance(x, str) for x in value)):
        return json.dumps(value, ensure_ascii=False)
    raise invalid(f"fsd_config: {name}", value, "is no plain value", remedy="fal-fsd takes text, numbers and lists.")
