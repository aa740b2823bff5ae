"""Settings of fal-fsd: flags, then FAL_FSD_* variables, then the file."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from fal_contract.config import ConfigModel
from fal_contract.errors import invalid
from fal_contract.limits import READ_TIMEOUT_S
from fal_contract.own_addresses import check_schedulers, parse_address
from fal_contract.telemetry import LogLevel

ENV_PREFIX: Final = "FAL_FSD"
_SOCKET_PATH_BYTES_MAX: Final = 100


class FsdOptions(ConfigModel):
    """What fal-fsd needs to know at its start."""

    state_dir: Path = Field(description="folder for models, parts and pins")
    socket: Path | None = Field(None, description="unix socket to serve on; default STATE_DIR/fsd.sock")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")

    schedulers: list[str] = Field(default_factory=list, description="rpc addresses of the schedulers; none: alone")
    identity: Path | None = Field(None, description="the node's certificate and key, which its agent renews")
    bulk_host: str = Field("0.0.0.0", description="address on which peers are served")
    bulk_port: int = Field(0, ge=0, le=65535, description="port for peers; 0: any, the same at each start")
    addresses: list[str] = Field(
        default_factory=list,
        description="where peers reach the bulk port, NETWORK=HOST[:PORT]; default: the address towards the scheduler",
    )
    tls: Literal["auto", "always", "never"] = Field(
        "auto", description="TLS between caches; auto: as the scheduler says for each pair"
    )

    disk_bytes_max: int = Field(0, ge=0, description="bytes that artifacts may take; 0: what the disk holds")
    memory_bytes_max: int = Field(0, ge=0, description="bytes that may be locked in memory; 0: none")
    mount: Literal["auto", "off"] = Field("auto", description="mount unfinished artifacts where this works")
    mount_dir: Path | None = Field(None, description="folder for these mounts; default STATE_DIR/mounts")
    read_timeout_s: float = Field(READ_TIMEOUT_S, gt=0, le=3600, description="of a read of an unfinished file")

    node_bytes_s: int = Field(0, ge=0, description="bytes per second sent to peers in all; 0: no limit")
    pool_bytes_s: int = Field(0, ge=0, description="of these, to the own pool; 0: no limit")
    region_bytes_s: int = Field(0, ge=0, description="of these, to other pools of the region; 0: no limit")
    cross_region_bytes_s: int = Field(0, ge=0, description="of these, to other regions; 0: no limit")
    origin_bytes_s: int = Field(0, ge=0, description="bytes per second read from origins; 0: no limit")

    credentials_file: Path | None = Field(None, description="TOML file with credentials of origins, mode 0600")
    metrics_host: str = Field("127.0.0.1", description="address for /metrics and /healthz")
    metrics_port: int = Field(0, ge=0, le=65535, description="port for /metrics and /healthz; 0: any")

    @property
    def socket_path(self) -> Path:
        """Where the socket is."""
        return self.socket or self.state_dir / "fsd.sock"


def check(options: FsdOptions) -> FsdOptions:
    """What the types cannot say. Raises FalError(INVALID)."""
    if len(str(options.socket_path).encode()) > _SOCKET_PATH_BYTES_MAX:
        raise invalid(
            "socket",
            str(options.socket_path),
            f"has more than {_SOCKET_PATH_BYTES_MAX} bytes",
            remedy="Use a shorter path.",
        )
    check_schedulers(options.schedulers)
    if options.schedulers and options.identity is None:
        raise invalid("identity", "", "is missing", remedy="Give --identity: the file that the node's agent keeps.")
    for text in options.addresses:
        parse_address(text)
    return options


__all__ = ["ENV_PREFIX", "FsdOptions", "check"]
