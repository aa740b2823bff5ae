"""Settings of fal-proxy: flags, then FAL_PROXY_* variables, then the file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from fal_contract.config import ConfigModel
from fal_contract.errors import invalid
from fal_contract.telemetry import LogLevel

ENV_PREFIX: Final = "FAL_PROXY"
CONTROL_PATH_BYTES_MAX: Final = 90  # a unix socket's name has 108, and a scratch name is longer


class ProxyOptions(ConfigModel):
    """What a proxy needs to know at its start."""

    state_dir: Path = Field(description="folder for the state file")
    control: Path | None = Field(None, description="control socket; default STATE_DIR/proxy.sock")
    host: str = Field("0.0.0.0", description="address to listen on for gateways")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0: the one from before, else any free one")
    identity: Path | None = Field(None, description="the node's identity file, as the agent saved it")
    insecure: bool = Field(False, description="listen without TLS and admit anyone; for benchmarks only")
    node_id: str = Field("", description="the node's id when insecure; else the certificate says it")
    idle_timeout_s: float = Field(30.0, gt=0, description="seconds a connection may be idle between requests")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return self.control or self.state_dir / "proxy.sock"

    @property
    def state_file(self) -> Path:
        """Where the state file is."""
        return self.state_dir / "proxy.state"


def check(options: ProxyOptions) -> ProxyOptions:
    """What the types cannot say. Raises FalError(INVALID)."""
    if options.identity is None and not options.insecure:
        raise invalid("identity", "", "is missing", remedy="Give --identity FILE, or --insecure for a benchmark.")
    if options.insecure and not options.node_id:
        raise invalid("node_id", "", "is missing", remedy="Give --node-id with --insecure.")
    if len(str(options.control_path).encode()) > CONTROL_PATH_BYTES_MAX:
        raise invalid(
            "control",
            str(options.control_path),
            f"is longer than {CONTROL_PATH_BYTES_MAX} bytes",
            remedy="Give a shorter --control or --state-dir.",
        )
    return options
