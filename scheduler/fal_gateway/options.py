"""Settings of fal-gateway: flags, then FAL_GATEWAY_* variables, then the file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from fal_contract.config import ConfigModel
from fal_contract.datapath import Address
from fal_contract.errors import invalid
from fal_contract.telemetry import LogLevel

ENV_PREFIX: Final = "FAL_GATEWAY"


class GatewayOptions(ConfigModel):
    """What a gateway needs to know at its start."""

    schedulers: tuple[str, ...] = Field(description="host:port of every scheduler")
    identity: Path = Field(description="identity file with the role serving")
    host: str = Field("127.0.0.1", description="address for clients; nobody is authenticated here yet")
    port: int = Field(8080, ge=0, le=65535, description="port for clients; 0: any free one")
    ports_file: Path | None = Field(None, description="where to write the ports that were chosen, as JSON")
    tunnel_host: str = Field("0.0.0.0", description="address to take nodes' tunnels on")
    tunnel_port: int | None = Field(None, ge=0, le=65535, description="port to take tunnels on; none: no tunnels")
    tunnel_addresses: tuple[str, ...] = Field((), description="host:port under which nodes reach that port")
    metrics_host: str = Field("127.0.0.1", description="address of /metrics and /healthz")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port of /metrics and /healthz; none: off")
    wait_s: float = Field(60.0, gt=0, description="seconds that a request waits for a free slot")
    body_bytes_max: int = Field(16 << 20, gt=0, description="longest request body")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")


def parse_address(text: str, *, field: str) -> Address:
    """`host:port` or `[host]:port`. FalError(INVALID) naming `field`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise invalid(field, text, "is not host:port", remedy="Write an address such as gateway.example:7443.")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))
