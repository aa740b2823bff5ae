"""From an assignment to a container: names, paths, environment. Pure but for protobuf.

Invariant: what the agent sets (FAL_…, devices) wins over what an app sets, so that an app cannot point its worker at
another runner's socket. Called by fal_agent.runner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fal_agent.ports import MachineView, Places
from fal_contract.ids import path_of
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.driver import (
    MODELS_DIR_INSIDE,
    SOCKET_DIR_INSIDE,
    ContainerSpec,
    Driver,
    Egress,
    Mount,
    Network,
    Resources,
)

SOCKET_NAME: Final = "worker.sock"
OUTPUT_DIR_INSIDE: Final = "/output"
SCRATCH_BYTES_DEFAULT: Final = 1 << 30
_ID_CHARS_MAX: Final = 64  # container runtimes put it into paths of unix sockets
_NETWORKS: Final[dict[str, Network]] = {"none": "none", "egress": "egress", "host": "host"}


def container_id(runner_id: str) -> str:
    """The container's name; long ones are cut and made unique by a hash."""
    path = path_of(runner_id)
    if len(path) <= _ID_CHARS_MAX:
        return path
    return f"{path[: _ID_CHARS_MAX - 17]}-{_hash(runner_id)}"


def socket_dir(places: Places, runner_id: str) -> Path:
    """Host folder of the worker's socket; hashed, because the path of a unix socket is bounded."""
    return places.sockets / _hash(runner_id)


def socket_path(places: Places, runner_id: str, name: str = "") -> Path:
    """The worker's socket on this host; `name` as the app says, empty: the usual one."""
    return socket_dir(places, runner_id) / (name or SOCKET_NAME)


def model_name(model: str) -> str:
    """Name of a model's folder inside the container."""
    return path_of(model)


@dataclass(frozen=True, slots=True)
class Devices:
    """How a container gets its GPUs: by CDI names, or where this node has none, by plain device nodes."""

    nodes: tuple[str, ...] = ()
    cdi: tuple[str, ...] = ()


NO_DEVICES: Final = Devices()


def devices(gpus: Sequence[str], view: MachineView) -> Devices:
    """The devices of these GPUs (ids) on this machine."""
    names = tuple(view.cdi[gpu] for gpu in gpus if gpu in view.cdi)
    if len(names) == len(gpus):
        return Devices(cdi=names)
    return Devices(nodes=tuple(dict.fromkeys(node for gpu in gpus for node in view.devices.get(gpu, ()))))


def container_spec(
    message: agent_pb2.Assignment, driver: Driver, places: Places, devices: Devices = NO_DEVICES, port: int = 0
) -> ContainerSpec:
    """The container of this assignment. Models are attached apart (Driver.attach_model).

    `port`: where its server is to listen; 0: on a unix socket.
    """
    app, limits = message.spec, message.spec.resources
    real = app.image not in ("", "host")  # it brings its own programs
    bare = ContainerSpec(
        id=container_id(message.runner_id),
        command=tuple(app.command) or (() if real else places.worker_command),
        resources=Resources(
            cpu_milli=limits.cpu_milli,
            memory_bytes=limits.memory_bytes,
            pids_max=limits.pids_max,
            shm_bytes=limits.shm_bytes or Resources().shm_bytes,
            open_files_max=limits.open_files_max or Resources().open_files_max,
            locked_memory_bytes=limits.locked_memory_bytes,
            io_bytes_s=limits.io_bytes_s,
            scratch_bytes=limits.scratch_bytes if limits.HasField("scratch_bytes") else SCRATCH_BYTES_DEFAULT,
        ),
        network=_NETWORKS[app.network or "none"],
        socket_dir=socket_dir(places, message.runner_id),
        models_dir=places.models / container_id(message.runner_id),
        gpu_devices=devices.nodes,
        cdi=devices.cdi,
        mounts=_output_mount(message, places),
        egress=Egress(tuple(app.egress_allow), tuple(app.egress_deny)),
        warm_command=(*places.worker_command, "--warm") if _may_be_warm(app) else (),
    )
    return replace(
        bare,
        env={
            **({} if real else places.worker_env),
            **_env(message, driver, bare),
            **_listens(message, driver, bare, port),
        },
    )


def _may_be_warm(app: state_pb2.AppSpec) -> bool:
    """Is it our worker, and nothing in its environment that the libraries read while they are imported?"""
    own = {name for name in app.env if not name.startswith("FAL_")} - {"OMP_NUM_THREADS"}
    return app.image in ("", "host") and not app.command and not own


def _output_mount(message: agent_pb2.Assignment, places: Places) -> tuple[Mount, ...]:
    """A build task's only writable folder besides /tmp; what it leaves there is kept."""
    if not message.spec.HasField("build"):
        return ()
    return (Mount(output_folder(places, message.runner_id), OUTPUT_DIR_INSIDE, read_only=False),)


def output_folder(places: Places, runner_id: str) -> Path:
    """Host folder that a build task fills (`fal_agent.build_output`)."""
    return places.runners / f"{container_id(runner_id)}.output"


def keep_assignment(places: Places, message: agent_pb2.Assignment) -> None:
    """Leave the assignment beside the container, so that a lost journal still finds out what a container holds."""
    file = _assignment_file(places, message.runner_id)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = file.with_suffix(".new")
    beside.write_bytes(message.SerializeToString())
    beside.rename(file)


def drop_assignment(places: Places, runner_id: str) -> None:
    _assignment_file(places, runner_id).unlink(missing_ok=True)


def find_assignment(places: Places, container: str) -> agent_pb2.Assignment | None:
    """What was kept for this container, or None when nothing readable is there."""
    try:
        return agent_pb2.Assignment.FromString((places.runners / f"{container}.assignment").read_bytes())
    except (OSError, DecodeError):
        return None


def _assignment_file(places: Places, runner_id: str) -> Path:
    return places.runners / f"{container_id(runner_id)}.assignment"


def _listens(message: agent_pb2.Assignment, driver: Driver, spec: ContainerSpec, port: int) -> dict[str, str]:
    """Where the server is to listen. $PORT is what many servers read by themselves."""
    if port:
        return {"PORT": str(port), "FAL_PORT": str(port)}
    return {"FAL_SOCKET": driver.inside(spec, f"{SOCKET_DIR_INSIDE}/{message.spec.socket or SOCKET_NAME}")}


def _env(message: agent_pb2.Assignment, driver: Driver, spec: ContainerSpec) -> dict[str, str]:
    def models(kind: str) -> list[tuple[str, str]]:
        names = [model_name(artifact.model) for artifact in message.artifacts if (artifact.kind or "model") == kind]
        return [(name, driver.inside(spec, f"{MODELS_DIR_INSIDE}/{name}")) for name in names]

    env: dict[str, str] = {}
    if message.spec.resources.cpu_milli:
        # Math libraries start a thread for each core of the machine; more than the container may use is very slow.
        env["OMP_NUM_THREADS"] = str(max(1, message.spec.resources.cpu_milli // 1000))
    if message.gpu_milli:  # nothing but the program itself can keep to it
        env["FAL_GPU_MEMORY_FRACTION"] = f"{message.gpu_milli / 1000:g}"
    env |= dict(message.spec.env)
    env |= {
        "FAL_RUNNER_ID": message.runner_id,
        "FAL_APP": message.app,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(message.gpus),
        "NVIDIA_VISIBLE_DEVICES": "void",  # images set it; whoever else still reads it is to add nothing
    }
    # The worker's own bounds are the app's: it queues what the proxy admits, and drains for as long as it is given.
    scaling = message.spec.scaling
    for name, bound in (
        ("FAL_MAX_MULTIPLEXING", scaling.max_multiplexing),
        ("FAL_REQUEST_TIMEOUT", scaling.request_timeout_s),
        ("FAL_GRACE", message.spec.termination_grace_s),
    ):
        if bound:
            env[name] = f"{bound:g}"
    if any(artifact.stream and artifact.kind != "image" for artifact in message.artifacts):
        env["FAL_STREAM_WEIGHTS"] = "1"  # files may still be arriving: to be read, not mapped
    if message.spec.HasField("build"):
        env["FAL_BUILD_OUTPUT"] = driver.inside(spec, OUTPUT_DIR_INSIDE)
    # An entry that did not come is not there; the worker then compiles for itself.
    entries = [(one.cache_key, model_name(one.model)) for one in message.artifacts if one.kind == "cache"]
    if entries:
        env["FAL_COMPILE_CACHE"] = ",".join(
            f"{key}={driver.inside(spec, f'{MODELS_DIR_INSIDE}/{name}')}" for key, name in entries
        )
    if checkpoints := models("model"):
        env["FAL_MODEL_DIR"] = checkpoints[0][1]
        if message.residencies:  # others may come beside it: requests say which they mean
            env["FAL_MODEL"] = next(one.model for one in message.artifacts if (one.kind or "model") == "model")
    if loras := models("lora"):
        # A request names a LoRA of the app's team without the team.
        env["FAL_LORAS"] = ",".join(f"{name.partition('.')[2]}={path}" for name, path in loras)
    return env


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
