"""CDI edits in a config.json, and whole configs against the runtime's schema."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from fal_contract.errors import Code, FalError
from fal_runtime.cdi.document import parse
from fal_runtime.cdi.model import Edits, HookEdit, MountEdit, NodeEdit, RdtEdit
from fal_runtime.cdi.nvidia import INSIDE, Driver, Gpu, Library, specification
from fal_runtime.cdi.registry import File, make_registry, resolve
from fal_runtime.driver import ContainerSpec, Resources
from fal_runtime.oci.edits import apply
from fal_runtime.oci.spec import Bind, DeviceNode, HostLayout, HostLimits, build

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "oci_spec_gpu.json"
SCHEMA = Draft202012Validator(json.loads((DATA / "oci-schema" / "config-linux.json").read_text()))
UUID = "GPU-0a1b2c3d-0000-4000-8000-000000000000"


def host(**changes: Any) -> HostLayout:
    values: dict[str, Any] = {
        "rootfs": Path("/run/falctl/x/rootfs"), "cgroup_path": "/falctl/x", "uid_start": 0x7000_0000,
        "uid_count": 65_536, "user_namespace": True, "cgroup_v2": False, "open_files_max": 20_000,
        "env": {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/mine"},
        "binds": (Bind(Path("/state/s"), "/run/fal", ("bind", "rw", "nosuid", "nodev", "noexec")),),
    }  # fmt: skip
    return HostLayout(**(values | changes))


def gpu_edits() -> Edits:
    """Of one of two GPUs, completed as on a machine whose driver has major 195."""
    library = Library("/usr/lib/libcuda.so.550.54", ("libcuda.so.1", "libcuda.so.550.54"))
    driver = Driver(("/dev/nvidiactl", "/dev/nvidia-uvm"), (library,), ("/usr/bin/nvidia-smi",))
    document = specification([Gpu((UUID,), ("/dev/nvidia0",)), Gpu(("GPU-2",), ("/dev/nvidia1",))], driver)
    edits = resolve([f"nvidia.com/gpu={UUID}"], make_registry([File("ours", 0, parse(document, source="ours"))]))
    numbers = {"/dev/nvidiactl": (195, 255), "/dev/nvidia-uvm": (510, 0), "/dev/nvidia0": (195, 0)}
    nodes = [NodeEdit(node.path, "", "c", *numbers[node.path], 0o666, node.permissions) for node in edits.nodes]
    mounts = [MountEdit(one.host_path, one.container_path, "bind", one.options) for one in edits.mounts]
    return Edits(edits.env, tuple(nodes), tuple(mounts))


def test_golden_with_a_gpu() -> None:
    """Set UPDATE_GOLDEN=1 to write the file anew, and read the difference."""
    spec = ContainerSpec(
        "default.digits-7k2m9q4c", ("python3", "-m", "worker"), env={"CUDA_VISIBLE_DEVICES": UUID},
        resources=Resources(2000, 8 << 30, 512, shm_bytes=1 << 30, locked_memory_bytes=4 << 30, io_bytes_s=100 << 20),
        cdi=(f"nvidia.com/gpu={UUID}",),
    )  # fmt: skip
    limits = HostLimits(swap=True, disks=((259, 0), (8, 16)))
    made = build(spec, host(edits=gpu_edits(), limits=limits))
    SCHEMA.validate(made)
    text = json.dumps(made, indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert "nvidia1" not in text
    assert "GPU-2" not in text


def config() -> dict[str, Any]:
    return build(ContainerSpec("a", ("x",)), host())


def test_every_kind_of_edit_lands_where_it_belongs() -> None:
    made = apply(
        config(),
        Edits(
            env=("A=1", f"LD_LIBRARY_PATH={INSIDE}/lib", "PATH=/more:/usr/bin"),
            nodes=(NodeEdit("/dev/x", "", "c", 9, 1, 0o640, "rwm", 5, 6), NodeEdit("/dev/pipe", kind="p")),
            mounts=(
                MountEdit("/h/a/b", "/c/a/b", "bind", ("bind", "ro")),
                MountEdit("/h/a", "/c/a", "bind", ("bind",)),
            ),
            hooks=(HookEdit("createContainer", "/bin/h", ("h", "1"), ("E=1",), 3), HookEdit("poststop", "/bin/p")),
            gids=(44, 0, 44),
            rdt=RdtEdit("c", "L3:0=f", "", ("MB:0=5",), ("enableMonitoring",)),
        ),
        user_namespace=False,
    )
    SCHEMA.validate(made)
    env = made["process"]["env"]
    assert {"A=1", f"LD_LIBRARY_PATH=/mine:{INSIDE}/lib", "PATH=/usr/bin:/more"} <= set(env)
    assert made["linux"]["devices"][-2:] == [
        {"path": "/dev/x", "type": "c", "major": 9, "minor": 1, "uid": 5, "gid": 6, "fileMode": 0o640},
        {"path": "/dev/pipe", "type": "p", "uid": 0, "gid": 0},
    ]
    rules = made["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert rules[1:] == [{"allow": True, "type": "c", "major": 9, "minor": 1, "access": "rw"}]
    assert [mount["destination"] for mount in made["mounts"][-2:]] == ["/c/a", "/c/a/b"]
    assert made["hooks"]["createContainer"] == [{"path": "/bin/h", "args": ["h", "1"], "env": ["E=1"], "timeout": 3}]
    assert made["hooks"]["poststop"] == [{"path": "/bin/p"}]
    assert made["process"]["user"]["additionalGids"] == [44]
    assert made["linux"]["intelRdt"] == {
        "closID": "c", "l3CacheSchema": "L3:0=f", "schemata": ["MB:0=5"], "enableMonitoring": True,
    }  # fmt: skip


@pytest.mark.parametrize("target", ["/proc", "/dev", "/dev/shm", "/tmp", "/sys", "/run/fal"])
def test_our_own_mounts_are_not_replaced(target: str) -> None:
    with pytest.raises(FalError) as caught:
        apply(config(), Edits(mounts=(MountEdit("/evil", target, "bind", ("bind",)),)), user_namespace=True)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert target in caught.value.what


def test_a_node_from_elsewhere_is_bound_in_a_user_namespace() -> None:
    """runc binds the host's node of the same path there, whatever numbers the config has."""
    node = NodeEdit("/dev/nvidia0", "/tree/nvidia0", "c", 1, 5, 0o666, "rw")
    inside = apply(config(), Edits(nodes=(node,)), user_namespace=True)
    assert "devices" not in inside["linux"]
    assert inside["mounts"][-1] == {
        "destination": "/dev/nvidia0", "type": "bind", "source": "/tree/nvidia0",
        "options": ["bind", "rw", "nosuid", "noexec"],
    }  # fmt: skip
    outside = apply(config(), Edits(nodes=(node,)), user_namespace=False)
    assert outside["linux"]["devices"][0]["path"] == "/dev/nvidia0"
    for made in (inside, outside):
        assert {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rw"} in made["linux"]["resources"][
            "devices"
        ]


def test_permissions() -> None:
    def rule(permissions: str) -> dict[str, Any]:
        node = NodeEdit("/dev/x", "", "c", 9, 1, 0o666, permissions)
        rules = apply(config(), Edits(nodes=(node,)), user_namespace=True)["linux"]["resources"]["devices"]
        return dict(rules[-1])

    assert rule("")["access"] == "rw"
    assert rule("r")["access"] == "r"
    assert rule("rwm")["access"] == "rw", "no container makes device nodes"
    assert rule("none")["allow"] is False
    assert rule("m")["allow"] is False


PATHS = st.sampled_from(("/dev/a", "/dev/b", "/dev/c/d"))
NODES = st.builds(
    NodeEdit, PATHS, st.sampled_from(("", "/t/x")), st.sampled_from(("c", "b", "p")), st.integers(0, 500),
    st.integers(0, 500), st.sampled_from((None, 0o666)), st.sampled_from(("", "r", "rw", "rwm", "none")),
)  # fmt: skip
EDITS = st.builds(
    Edits,
    env=st.lists(st.sampled_from(("A=1", "PATH=/x", "LD_LIBRARY_PATH=/y", "B=")), max_size=3).map(tuple),
    nodes=st.lists(NODES, max_size=3, unique_by=lambda node: node.path).map(tuple),
    mounts=st.lists(st.builds(MountEdit, st.just("/h"), st.sampled_from(("/m/a", "/m")), st.just("bind")), max_size=2,
                    unique_by=lambda mount: mount.container_path).map(tuple),
    hooks=st.lists(st.sampled_from((HookEdit("prestart", "/h"), HookEdit("poststop", "/h"))), max_size=2).map(tuple),
    gids=st.lists(st.integers(0, 9), max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    edits=EDITS,
    user_namespace=st.booleans(),
    cgroup_v2=st.booleans(),
    network=st.sampled_from(("none", "host", "egress")),
    io_bytes_s=st.sampled_from((0, 1 << 20)),
    locked=st.sampled_from((0, 1 << 30)),
    gids=st.lists(st.integers(1, 9), max_size=2, unique=True).map(tuple),
    privileges=st.sampled_from(((), ("CHOWN", "CAP_FOWNER"))),
)
def test_whatever_is_built_is_an_oci_config(
    edits: Edits, user_namespace: bool, cgroup_v2: bool, network: Any, io_bytes_s: int, locked: int,
    gids: tuple[int, ...], privileges: tuple[str, ...],
) -> None:  # fmt: skip
    spec = ContainerSpec(
        "a", ("x",), network=network,
        resources=Resources(500, 1 << 30, 10, locked_memory_bytes=locked, io_bytes_s=io_bytes_s),
        privileges=privileges, cdi=("v.com/c=a",) if edits else (), socket_dir=Path("/s"), models_dir=Path("/m"),
        secrets={"token": b"x"},
    )  # fmt: skip
    layout = host(
        user_namespace=user_namespace, cgroup_v2=cgroup_v2, edits=edits, gids=gids, uid=33, gid=33, cwd="/srv",
        limits=HostLimits(1 << 20, swap=True, disks=((8, 0),)), devices=(DeviceNode("/dev/z", "c", 1, 1),),
        netns="/run/netns/x" if network == "egress" else "",
    )  # fmt: skip
    if privileges and not user_namespace:
        with pytest.raises(FalError, match="user namespace"):
            build(spec, layout)
        return
    plain = build(spec, host(**{**_fields(layout), "edits": Edits()}))
    before = copy.deepcopy(plain)
    made = build(spec, layout)
    SCHEMA.validate(json.loads(json.dumps(made)))
    assert plain == before
    # What isolates is not touched by any edit.
    assert made["root"] == plain["root"]
    for name in ("noNewPrivileges", "capabilities", "rlimits", "args", "cwd"):
        assert made["process"][name] == plain["process"][name]
    for name in ("namespaces", "seccomp", "maskedPaths", "readonlyPaths", "cgroupsPath"):
        assert made["linux"][name] == plain["linux"][name]
    rules = made["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert all("m" not in rule["access"] for rule in rules[1:])
    assert made["mounts"][: len(plain["mounts"])] == plain["mounts"]
    soft = {one["type"]: one["soft"] for one in made["process"]["rlimits"]}
    assert soft["RLIMIT_MEMLOCK"] == 1 << 20, "never above the agent's own"
    base = 0 if user_namespace else 0x7000_0000
    assert made["process"]["user"]["uid"] == base + 33
    assert made["process"]["user"].get("additionalGids", [])[: len(gids)] == [base + gid for gid in gids]
    assert ("blockIO" in made["linux"]["resources"]) == bool(io_bytes_s)
    assert "FAL_SECRETS_DIR=/run/secrets" in made["process"]["env"]
    assert not any("token" in entry for entry in made["process"]["env"])


def _fields(layout: HostLayout) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in HostLayout.__slots__}
