"""Settings of fal-agent: flags, then FAL_AGENT_* variables, then the file."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from fal_agent.core.notice import check_source
from fal_agent.reboot import check_command
from fal_contract.config import ConfigModel
from fal_contract.errors import invalid
from fal_contract.ids import check_name
from fal_contract.own_addresses import check_schedulers, parse_address
from fal_contract.telemetry import LogLevel
from fal_runtime.network.egress import Settings as EgressSettings
from fal_runtime.network.egress import settings_of

ENV_PREFIX: Final = "FAL_AGENT"
_STATE_PATH_BYTES_MAX: Final = 70  # sockets lie below it, and their paths are bounded
DriverName = Literal["auto", "oci", "process"]


def host_name() -> str:
    """This machine's name as a legal node name."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in socket.gethostname().split(".")[0].lower())
    return name.strip("-")[:63] or "node"


class AgentOptions(ConfigModel):
    """What an agent needs to know at its start."""

    state_dir: Path = Field(description="folder for identity, journal and everything of this node")
    schedulers: list[str] = Field(description="rpc addresses of the schedulers, host:port")
    join_url: str = Field("", description="join address of a scheduler, https://host:port; for the first start")
    join_token: str = Field("", description="join token; better in a file")
    join_token_file: Path | None = Field(None, description="file with the join token")
    node_name: str = Field(default_factory=host_name, description="name of this machine, for operators")
    driver: DriverName = Field("auto", description="container driver; auto: oci where it works, else process")
    sim_gpus: str = Field("", description="simulated GPUs instead of real ones, such as 8xH100-80GB")
    proxy_host: str = Field("0.0.0.0", description="address on which the proxy listens")
    proxy_port: int = Field(0, ge=0, le=65535, description="port of the proxy; 0: any, the same at each start")
    addresses: list[str] = Field(
        default_factory=list,
        description="where gateways reach the proxy, NETWORK=HOST[:PORT]; default: the address towards the scheduler",
    )
    fsd_socket: Path | None = Field(None, description="socket of the node's fal-fsd; default: one of its own")
    fsd_config: Path | None = Field(None, description="TOML file with settings of fal-fsd, such as bulk_port")
    prepared_containers: int = Field(
        1, ge=0, le=16, description="containers kept ready for each of the last kinds started here; 0: none"
    )
    warm_workers: int | None = Field(
        None, ge=0, le=16, description="of our worker's: with its libraries loaded; default: 1, with simulated GPUs 0"
    )
    allow_host_network: bool = Field(True, description='false: no app with network "host", whatever its pool allows')
    gpu_reset: bool = Field(True, description="false: never reset a GPU, whatever its fault asks for")
    notices: list[str] = Field(
        default_factory=list, description="who announces what is done to this machine: aws, gcp, azure, file:/PATH"
    )
    reboot_command: str = Field("", description="reboots the machine, such as `systemctl reboot`; none: it may not")
    egress_subnet: str = Field("10.222.0.0/16", description='addresses of containers with network "egress"')
    cni_plugin_dir: str = Field("/usr/lib/cni:/opt/cni/bin", description="folders with CNI plugins, first match wins")
    cdi_dirs: str = Field(
        "/etc/cdi:/var/run/cdi",
        description="folders with CDI specifications, the later wins; ours comes last",
    )
    registry_auth_file: Path | None = Field(
        None, description="credentials of image registries, as `skopeo login` writes them; a secret of the image wins"
    )
    registry_ca_file: Path | None = Field(None, description="PEM file of the authority that image registries are of")
    metrics_host: str = Field("127.0.0.1", description="address for /metrics and /healthz")
    metrics_port: int = Field(0, ge=0, le=65535, description="port for /metrics and /healthz; 0: any")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")

    def egress(self) -> EgressSettings:
        """The settings of network "egress". Raises FalError(INVALID)."""
        try:
            return settings_of(self.egress_subnet, self.cni_plugin_dir)
        except ValueError as error:
            raise invalid(
                "egress_subnet", self.egress_subnet, f"cannot be used: {error}", remedy="Write it like 10.222.0.0/16."
            ) from None

    def warm(self) -> int:
        """How many warm workers to keep for each kind."""
        if self.warm_workers is None:
            return 0 if self.sim_gpus else 1
        return self.warm_workers

    def cdi_folders(self) -> tuple[Path, ...]:
        """`cdi_dirs` as paths."""
        return tuple(Path(part) for part in self.cdi_dirs.split(":") if part)


def check(options: AgentOptions) -> AgentOptions:
    """What the types cannot say. Raises FalError(INVALID)."""
    check_name(options.node_name, field="node_name")
    if len(str(options.state_dir.absolute()).encode()) > _STATE_PATH_BYTES_MAX:
        raise invalid(
            "state_dir",
            str(options.state_dir.absolute()),
            f"is longer than {_STATE_PATH_BYTES_MAX} bytes",
            remedy="Unix sockets lie below it; use a shorter path.",
        )
    if not options.schedulers:
        raise invalid("schedulers", [], "is empty", remedy="Give --schedulers HOST:PORT.")
    check_schedulers(options.schedulers)
    options.egress()
    check_command(options.reboot_command)
    for text in options.notices:
        check_source(text)
    for text in options.addresses:
        parse_address(text)
    return options
