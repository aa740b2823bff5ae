"""App and pool manifests: what an operator writes, checked before anything changes.

falctl reads a TOML or YAML file into these models; the scheduler builds them again from the message and so applies
the very same checks (`AppManifest.from_proto`). Unknown keys are refused. Every field's `description` is its
documentation (`falctl init` writes it, ops/docs/manifest.md is made from it). No I/O but `read_manifest`.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from fal_contract import limits
from fal_contract.config import pydantic_error
from fal_contract.errors import invalid
from fal_contract.ids import DEFAULT_TEAM, qualify
from fal_contract.manifest_parts import (
    GIB,
    Labels,
    Name,
    Network,
    OwnedName,
    PlacementManifest,
    ProbeManifest,
    ResourcesManifest,
    RolloutManifest,
    Table,
    Text,
    Version,
)
from fal_contract.units import parse_bytes
from fal_contract.v1 import state_pb2


class AppManifest(Table):
    """One app. Scaling knobs keep fal's names, defaults and rules."""

    name: Name = Field(description="name of the app, unique in its team")
    team: Name = Field(default=DEFAULT_TEAM, description="tenant that owns it")
    image: OwnedName = Field(
        default="host",
        description='an image (`falctl image add`); "host": the node\'s own system, read-only, with the worker in it',
    )
    command: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=4096)]], Field(max_length=256)
    ] = Field(default_factory=list, description="command and arguments; empty: our diffusers worker")
    env: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)],
            Annotated[str, StringConstraints(max_length=8192)],
        ],
        Field(max_length=limits.ENV_VARS_MAX),
    ] = Field(default_factory=dict, description="environment of the container; no secrets here")
    model: OwnedName | Literal[""] = Field(default="", description="model that is mounted and loaded")
    loras: Annotated[list[OwnedName], Field(max_length=64)] = Field(
        default_factory=list, description="LoRAs that requests may name"
    )
    machine_type: Annotated[list[Text], Field(max_length=32)] = Field(
        default_factory=list,
        description='GPU models that will do, the preferred first, such as "H100-80GB"; empty: any',
    )
    num_gpus: int = Field(
        default=1, ge=0, le=limits.GPUS_PER_RUNNER_MAX, description="whole GPUs of one node for each runner"
    )
    gpu_fraction: float = Field(
        default=1.0,
        ge=0.001,
        le=1,
        description="share of its one GPU and that GPU's memory; below 1 it shares the GPU with apps of its team",
    )
    mig_profile: Annotated[str, StringConstraints(pattern=r"^([1-7]g\.[0-9]{1,3}gb(\+[a-z.]+)?)?$")] = Field(
        default="", description='MIG profile that will do, such as "1g.10gb"; empty: whole devices'
    )
    priority: int = Field(default=0, ge=-100, le=100, description="what waits with a higher number is placed first")
    placement: PlacementManifest = Field(
        default_factory=PlacementManifest, description="where its runners should and should not be"
    )
    rollout: RolloutManifest = Field(default_factory=RolloutManifest, description="how a new revision takes over")
    gpu_memory_gib_min: float = Field(default=0.0, ge=0, le=4096, description="least memory of each GPU in GiB")
    resources: ResourcesManifest = Field(default_factory=ResourcesManifest, description="CPU, memory, processes")
    pools: Annotated[list[Name], Field(max_length=64)] = Field(
        default_factory=list, description="pools that will do; empty: any"
    )
    labels: Labels = Field(default_factory=dict, description="labels that the node must carry")
    network: Literal["none", "egress", "host"] = Field(
        default="none", description="network of the container; requests come over a socket, so none is needed to serve"
    )
    keep_alive: float = Field(default=60.0, ge=0, le=604800, description="seconds an idle runner is kept")
    min_concurrency: int = Field(
        default=0, ge=0, le=limits.RUNNERS_PER_APP_MAX, description="runners that are always there"
    )
    max_concurrency: int = Field(
        default=2, ge=0, le=limits.RUNNERS_PER_APP_MAX, description="runners that are never exceeded"
    )
    concurrency_buffer: int = Field(
        default=0, ge=0, le=limits.RUNNERS_PER_APP_MAX, description="spare runners above demand"
    )
    concurrency_buffer_perc: int = Field(default=0, ge=0, le=1000, description="spare runners in percent of demand")
    forecast_concurrency: int = Field(
        default=0, ge=0, le=limits.RUNNERS_PER_APP_MAX, description="runners that the forecast may start ahead of need"
    )
    scaling_delay: float = Field(default=0.0, ge=0, le=3600, description="seconds to wait before scaling up")
    max_multiplexing: int = Field(default=1, ge=1, le=1024, description="requests that one runner handles at once")
    request_timeout: float = Field(
        default=limits.REQUEST_TIMEOUT_S, gt=0, le=86400, description="seconds one request may take"
    )
    startup_timeout: float = Field(
        default=limits.STARTUP_TIMEOUT_S, gt=0, le=86400, description="seconds from start to ready"
    )
    termination_grace_period: float = Field(
        default=limits.TERMINATION_GRACE_S, ge=0, le=3600, description="seconds between SIGTERM and SIGKILL"
    )
    health_check: ProbeManifest = Field(default_factory=ProbeManifest, description="probes of the worker")
    share_group: Name | Literal[""] = Field(
        default="", description="apps of one team and one group may share runners; empty: the app alone"
    )
    stream_weights: bool = Field(
        default=False, description="start while weights still arrive; reads of what is not there yet wait for it"
    )
    allow_provisional: bool = Field(
        default=False, description="such reads may also see bytes that nobody has attested yet"
    )

    compile_caches: Annotated[
        list[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]],
        Field(max_length=limits.CACHE_KEYS_PER_APP_MAX),
    ] = Field(
        default_factory=list,
        description="keys of compile caches that its containers get where they exist (`falctl cache list`)",
    )
    port: int = Field(
        default=0, ge=0, le=65535, description="TCP port on which its server listens on 127.0.0.1; 0: a unix socket"
    )
    socket: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,31}$")] | Literal[""] = Field(
        default="", description='name of its unix socket in $FAL_SOCKET_DIR; empty: "worker.sock"'
    )
    driver_version_min: Version = Field(default="", description='least GPU driver, such as "550.54"; empty: any')
    cuda_version_min: Version = Field(default="", description='least CUDA of the driver, such as "12.4"; empty: any')
    egress_allow: Annotated[list[Network], Field(max_length=64)] = Field(
        default_factory=list, description='for network "egress": networks it may reach; empty: all public ones'
    )
    egress_deny: Annotated[list[Network], Field(max_length=64)] = Field(
        default_factory=list, description='for network "egress": networks it may not reach; wins over egress_allow'
    )
    secrets: Annotated[list[Name], Field(max_length=limits.SECRETS_PER_APP_MAX)] = Field(
        default_factory=list, description="secrets of its team, each a file in $FAL_SECRETS_DIR (`falctl secret set`)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> AppManifest:
        if self.min_concurrency > self.max_concurrency:
            raise ValueError(
                f"min_concurrency = {self.min_concurrency} is above max_concurrency = {self.max_concurrency}; "
                "raise max_concurrency"
            )
        for field, named in (("model", [self.model] if self.model else []), ("loras", self.loras)):
            for one in named:
                if "/" in one and one.split("/", 1)[0] != self.team:
                    raise ValueError(f"{field} = {one!r} belongs to another team; register it in team {self.team!r}")
        if not self.command and not self.model and self.image == "host":
            raise ValueError("model is missing: without a command the app is our worker, which needs a model")
        if self.allow_provisional and not self.stream_weights:
            raise ValueError(
                "allow_provisional = true means nothing without stream_weights; set stream_weights = true as well"
            )
        if len(set(self.compile_caches)) != len(self.compile_caches):
            raise ValueError("compile_caches names a key twice; name each once")
        for field, networks in (("egress_allow", self.egress_allow), ("egress_deny", self.egress_deny)):
            if networks and self.network != "egress":
                raise ValueError(f'{field} means nothing with network = {self.network!r}; set network = "egress"')
        if self.port and self.socket:
            raise ValueError(f"port = {self.port} and socket = {self.socket!r} exclude each other; give one")
        if self.port and self.network == "host":
            raise ValueError(f'port = {self.port} needs a network namespace of its own; set network = "none"')
        if len(set(self.secrets)) != len(self.secrets):
            raise ValueError("secrets names one twice; name each once")
        if self.gpu_fraction < 1 and (self.num_gpus != 1 or self.mig_profile):
            raise ValueError(
                f"gpu_fraction = {self.gpu_fraction} is a share of one whole GPU; "
                "set num_gpus = 1 and no mig_profile, or gpu_fraction = 1"
            )
        if "/" in self.image and self.image.split("/", 1)[0] != self.team:
            raise ValueError(f"image = {self.image!r} belongs to another team; add it in team {self.team!r}")
        if len(set(self.machine_type)) != len(self.machine_type):
            raise ValueError("machine_type names a GPU model twice; name each once")
        beside, apart = (
            {qualify(one, team=self.team, field="placement") for one in apps}
            for apps in (self.placement.affinity, self.placement.anti_affinity)
        )
        if both := beside & apart:
            raise ValueError(f"placement.affinity and placement.anti_affinity both name {min(both)!r}; name it in one")
        if beside == {self.id}:
            raise ValueError(
                f"placement.affinity names {self.id!r} alone, so its first runner has no place; name others"
            )
        return self

    @property
    def id(self) -> str:
        """`team/name`."""
        return f"{self.team}/{self.name}"

    def to_proto(self) -> state_pb2.AppSpec:
        """The message that travels and is stored."""
        return state_pb2.AppSpec(
            image=self.image if self.image == "host" else qualify(self.image, team=self.team, field="image"),
            command=self.command,
            env=self.env,
            model=qualify(self.model, team=self.team, field="model") if self.model else "",
            loras=[qualify(one, team=self.team, field="loras") for one in self.loras],
            machine_type=self.machine_type,
            num_gpus=self.num_gpus,
            gpu_memory_bytes_min=round(self.gpu_memory_gib_min * GIB),
            resources=self.resources.to_proto(),
            pools=self.pools,
            labels=self.labels,
            network=self.network,
            scaling=state_pb2.Scaling(
                keep_alive_s=self.keep_alive,
                min_concurrency=self.min_concurrency,
                max_concurrency=self.max_concurrency,
                concurrency_buffer=self.concurrency_buffer,
                concurrency_buffer_perc=self.concurrency_buffer_perc,
                scaling_delay_s=self.scaling_delay,
                max_multiplexing=self.max_multiplexing,
                request_timeout_s=self.request_timeout,
                startup_timeout_s=self.startup_timeout,
                forecast_concurrency=self.forecast_concurrency,
            ),
            probe=self.health_check.to_proto(),
            termination_grace_s=self.termination_grace_period,
            share_group=self.share_group,
            stream_weights=self.stream_weights,
            allow_provisional=self.allow_provisional,
            compile_caches=self.compile_caches,
            port=self.port,
            socket=self.socket,
            driver_version_min=self.driver_version_min,
            cuda_version_min=self.cuda_version_min,
            egress_allow=self.egress_allow,
            egress_deny=self.egress_deny,
            secrets=self.secrets,
            gpu_milli=0 if self.gpu_fraction == 1 else max(1, round(self.gpu_fraction * 1000)),
            mig_profile=self.mig_profile,
            priority=self.priority,
            placement=self.placement.to_proto(lambda one: qualify(one, team=self.team, field="placement")),
            rollout=self.rollout.to_proto(),
        )

    @classmethod
    def from_proto(cls, app: str, spec: state_pb2.AppSpec) -> AppManifest:
        """Check a message as strictly as a file. Raises FalError(INVALID) naming field, value and remedy."""
        team, _, name = app.partition("/")
        scaling = spec.scaling
        return _validated(
            cls,
            {
                "name": name,
                "team": team,
                "image": spec.image,
                "command": list(spec.command),
                "env": dict(spec.env),
                "model": spec.model,
                "loras": list(spec.loras),
                "machine_type": list(spec.machine_type),
                "num_gpus": spec.num_gpus,
                "gpu_memory_gib_min": spec.gpu_memory_bytes_min / GIB,
                "resources": ResourcesManifest.values(spec.resources),
                "pools": list(spec.pools),
                "labels": dict(spec.labels),
                "network": spec.network,
                "keep_alive": scaling.keep_alive_s,
                "min_concurrency": scaling.min_concurrency,
                "max_concurrency": scaling.max_concurrency,
                "concurrency_buffer": scaling.concurrency_buffer,
                "concurrency_buffer_perc": scaling.concurrency_buffer_perc,
                "scaling_delay": scaling.scaling_delay_s,
                "max_multiplexing": scaling.max_multiplexing,
                "request_timeout": scaling.request_timeout_s,
                "startup_timeout": scaling.startup_timeout_s,
                "forecast_concurrency": scaling.forecast_concurrency,
                "termination_grace_period": spec.termination_grace_s,
                "health_check": ProbeManifest.values(spec.probe),
                "share_group": spec.share_group,
                "stream_weights": spec.stream_weights,
                "allow_provisional": spec.allow_provisional,
                "compile_caches": list(spec.compile_caches),
                "port": spec.port,
                "socket": spec.socket,
                "driver_version_min": spec.driver_version_min,
                "cuda_version_min": spec.cuda_version_min,
                "egress_allow": list(spec.egress_allow),
                "egress_deny": list(spec.egress_deny),
                "secrets": list(spec.secrets),
                "gpu_fraction": spec.gpu_milli / 1000 if spec.gpu_milli else 1.0,
                "mig_profile": spec.mig_profile,
                "priority": spec.priority,
                "placement": PlacementManifest.values(spec.placement),
                "rollout": RolloutManifest.values(spec.rollout),
            },
            source=f"app {app}",
        )


class PoolManifest(Table):
    """A group of nodes with one answer to: which cloud, region, failure domain, price, networks."""

    name: Name = Field(description="name of the pool")
    cloud: Text = Field(default="metal", description='cloud or machine room, such as "aws", "gcp", "metal"')
    region: Annotated[str, StringConstraints(max_length=limits.LABEL_CHARS_MAX)] = Field(
        default="", description="region of the cloud"
    )
    zone: Annotated[str, StringConstraints(max_length=limits.LABEL_CHARS_MAX)] = Field(
        default="", description="failure domain; empty: the pool itself"
    )
    gpu_hour_price: float = Field(default=0.0, ge=0, le=100_000, description="US dollars for one GPU for one hour")
    egress_gib_price: float = Field(default=0.0, ge=0, le=1000, description="US dollars for one GiB that leaves")
    networks: Annotated[list[Name], Field(max_length=16)] = Field(
        default_factory=list, description="networks on which its nodes have an address"
    )
    spot: bool = Field(default=False, description="the cloud may take nodes back at short notice")
    reclaim_per_hour: float = Field(
        default=0.0, ge=0, le=1, description="chance that the cloud takes a node back within an hour"
    )
    cache_size: str | int = Field(
        default=0, description='weight cache of each node, such as "2TiB"; 0: its own setting'
    )
    trusted_network: bool = Field(default=False, description="weights may travel in clear text inside the pool")
    labels: Labels = Field(default_factory=dict, description="labels that every node of the pool carries")
    allow_host_network: bool = Field(
        default=False, description='apps with network "host" may run on its nodes; they reach what the node reaches'
    )

    @model_validator(mode="after")
    def _sizes(self) -> PoolManifest:
        parse_bytes(self.cache_size)
        return self

    def to_proto(self) -> state_pb2.Pool:
        """The message that travels and is stored."""
        return state_pb2.Pool(
            name=self.name,
            cloud=self.cloud,
            region=self.region,
            zone=self.zone,
            gpu_hour_price_micros=round(self.gpu_hour_price * 1_000_000),
            egress_gib_price_micros=round(self.egress_gib_price * 1_000_000),
            networks=self.networks,
            spot=self.spot,
            reclaim_per_hour_ppm=round(self.reclaim_per_hour * 1_000_000),
            cache_bytes=parse_bytes(self.cache_size),
            trusted_network=self.trusted_network,
            labels=self.labels,
            allow_host_network=self.allow_host_network,
        )

    @classmethod
    def from_proto(cls, pool: state_pb2.Pool) -> PoolManifest:
        """Check a message as strictly as a file. Raises FalError(INVALID)."""
        return _validated(
            cls,
            {
                "name": pool.name,
                "cloud": pool.cloud,
                "region": pool.region,
                "zone": pool.zone,
                "gpu_hour_price": pool.gpu_hour_price_micros / 1_000_000,
                "egress_gib_price": pool.egress_gib_price_micros / 1_000_000,
                "networks": list(pool.networks),
                "spot": pool.spot,
                "reclaim_per_hour": pool.reclaim_per_hour_ppm / 1_000_000,
                "cache_size": pool.cache_bytes,
                "trusted_network": pool.trusted_network,
                "labels": dict(pool.labels),
                "allow_host_network": pool.allow_host_network,
            },
            source=f"pool {pool.name}",
        )


ManifestT = TypeVar("ManifestT", bound=Table)


def _validated(cls: type[ManifestT], data: Mapping[str, Any], *, source: str) -> ManifestT:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise pydantic_error(error, source, model=cls) from None


def parse_manifest(cls: type[ManifestT], text: str, *, source: str, yaml_syntax: bool) -> ManifestT:
    """Read one manifest from TOML or YAML text. Raises FalError(INVALID) naming `source`, field, value, remedy."""
    if len(text) > limits.MANIFEST_BYTES_MAX:
        raise invalid(
            "file", source, "is too large", remedy=f"A manifest has at most {limits.MANIFEST_BYTES_MAX} bytes."
        )
    try:
        data = yaml.safe_load(text) if yaml_syntax else tomllib.loads(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        detail = " ".join(str(error).split())
        raise invalid("file", source, f"cannot be parsed: {detail}", remedy="Correct the syntax.") from None
    if not isinstance(data, dict):
        raise invalid("file", source, "holds no table", remedy="Write `key = value` lines; see `falctl init NAME`.")
    return _validated(cls, data, source=source)


def read_manifest(cls: type[ManifestT], path: Path) -> ManifestT:
    """Read a manifest file: `.toml`, `.yaml` or `.yml`."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise invalid("file", str(path), "is neither TOML nor YAML", remedy="Name it .toml, .yaml or .yml.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("file", str(path), f"cannot be read: {error}", remedy="Name a readable UTF-8 file.") from None
    return parse_manifest(cls, text, source=str(path), yaml_syntax=suffix != ".toml")


def spec_digest(spec: state_pb2.AppSpec) -> str:
    """SHA-256 of the spec's canonical form, hexadecimal. Equal specs have equal digests whatever order maps came in."""
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()
