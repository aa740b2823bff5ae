"""Configuration of `fal-scheduler`: file, then `FAL_SCHEDULER_…` variables, then flags (fal_contract.config)."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field, model_validator

from fal_contract.config import ConfigModel

ENV_PREFIX: Final = "FAL_SCHEDULER"


class Listen(ConfigModel):
    """Where a listener is."""

    host: str = Field(default="127.0.0.1", description="address to bind; 0.0.0.0 for all")
    port: int = Field(default=0, ge=0, le=65535, description="port; 0: any, kept in ports.json over restarts")


class RpcListen(Listen):
    """gRPC with mutual TLS: agents, gateways, operators."""

    port: int = Field(default=7420, ge=0, le=65535, description="port; 0: any, kept in ports.json over restarts")


class JoinListen(Listen):
    """HTTPS for machines that join with a token."""

    port: int = Field(default=7421, ge=0, le=65535, description="port; 0: any, kept in ports.json over restarts")


class MetricsListen(Listen):
    """Plain HTTP with /metrics and /healthz."""

    port: int = Field(default=7422, ge=0, le=65535, description="port; 0: any, kept in ports.json over restarts")


class Etcd(ConfigModel):
    """The etcd cluster, with store = "etcd"."""

    endpoints: list[str] = Field(default_factory=list, description="host:port of the members")
    prefix: str = Field(default="/falctl", description="prefix of every key")
    ca: Path | None = Field(default=None, description="PEM of the CA of etcd's servers; unset: no TLS")
    cert: Path | None = Field(default=None, description="PEM of our certificate, where etcd asks for one")
    key: Path | None = Field(default=None, description="PEM of its key")


class Log(ConfigModel):
    """Logging to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level written")
    format: Literal["auto", "json", "console"] = Field(default="auto", description="auto: console on a terminal")


class Options(ConfigModel):
    """All of it."""

    data_dir: Path = Field(description="folder of store, identity, blobs, events")
    store: Literal["sqlite", "etcd", "memory"] = Field(default="sqlite", description="memory: lost with the process")
    standby: bool = Field(default=False, description="with sqlite: wait while another scheduler has the file")
    hosts: list[str] = Field(
        default_factory=list, description="names and addresses under which machines and people reach this scheduler"
    )
    advertise: list[str] = Field(
        default_factory=list,
        description="host:port under which nodes, gateways and people reach this scheduler; default: hosts, rpc.port",
    )
    seal_key: Path | None = Field(default=None, description="seal key, where it is kept outside the data folder")
    model_roots: list[Path] = Field(
        default_factory=list, description="folders below which file:// models may lie; empty: anywhere"
    )
    credentials_file: Path | None = Field(
        default=None, description="TOML with credentials of origins, mode 0600; the environment counts too"
    )
    rpc: RpcListen = Field(default_factory=RpcListen, description="gRPC listener")
    join: JoinListen = Field(default_factory=JoinListen, description="join listener")
    metrics: MetricsListen = Field(default_factory=MetricsListen, description="metrics listener")
    etcd: Etcd = Field(default_factory=Etcd, description="etcd")
    log: Log = Field(default_factory=Log, description="logs")

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.store == "etcd" and not self.etcd.endpoints:
            raise ValueError("store = 'etcd' needs etcd.endpoints; name host:port of its members")
        if self.store != "etcd" and self.etcd.endpoints:
            raise ValueError(f"etcd.endpoints is set, yet store = {self.store!r}; set store = 'etcd'")
        return self

    @property
    def identity_dir(self) -> Path:
        """The CA's folder."""
        return self.data_dir / "identity"


__all__ = ["ENV_PREFIX", "Options"]
