"""The OCI spec as a whole (golden) and what must never change in it by accident."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fal_runtime.driver import ContainerSpec, Resources
from fal_runtime.oci.seccomp import profile
from fal_runtime.oci.spec import Bind, DeviceNode, HostLayout, build

GOLDEN = Path(__file__).parents[1] / "data" / "oci_spec.json"
# Denied by docker's default profile to a container without capabilities, as far as amd64 and arm64 have them.
DOCKER_DENIES = {
    *("acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module", "finit_module"),
    *("get_kernel_syms", "init_module", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl"),
    *("lookup_dcookie", "mount", "move_pages", "nfsservctl", "open_by_handle_at", "perf_event_open", "pivot_root"),
    *("process_vm_readv", "process_vm_writev", "ptrace", "query_module", "quotactl", "reboot", "request_key", "setns"),
    *("settimeofday", "stime", "swapon", "swapoff", "sysfs", "_sysctl", "umount", "umount2", "unshare", "uselib"),
    *("userfaultfd", "ustat", "vm86", "vm86old", "fsopen", "fsmount", "fsconfig", "move_mount", "open_tree"),
    *("mount_setattr", "io_uring_setup", "io_uring_enter", "io_uring_register", "fanotify_init", "name_to_handle_at"),
}


def container() -> ContainerSpec:
    return ContainerSpec(
        id="default.digits-7k2m9q4c",
        command=("python3", "-m", "fal_runtime.worker"),
        env={"FAL_APP": "default/digits", "PATH": "/app/bin"},
        resources=Resources(cpu_milli=1500, memory_bytes=2 << 30, pids_max=512),
        socket_dir=Path("/state/sockets/1"),
        models_dir=Path("/state/models/1"),
        gpu_devices=("/dev/nvidia0",),
    )


def host(**changes: object) -> HostLayout:
    values: dict[str, object] = {
        "rootfs": Path("/run/falctl/0a1b2c3d/default.digits-7k2m9q4c/rootfs"),
        "cgroup_path": "/falctl/0a1b2c3d.default.digits-7k2m9q4c",
        "uid_start": 0x7000_0000,
        "uid_count": 65_536,
        "user_namespace": True,
        "cgroup_v2": False,
        "open_files_max": 20_000,
        "env": {"PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        "binds": (Bind(Path("/state/sockets/1"), "/run/fal", ("bind", "rw", "nosuid", "nodev", "noexec")),),
        "devices": (DeviceNode("/dev/nvidia0", "c", 195, 0),),
    }
    return HostLayout(**(values | changes))  # type: ignore[arg-type]


def test_golden() -> None:
    """Set UPDATE_GOLDEN=1 to write the file anew, and read the difference."""
    text = json.dumps(build(container(), host()), indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_the_apps_environment_wins_over_the_images_but_not_over_the_drivers() -> None:
    spec = ContainerSpec(id="a", command=("x",), env={"PATH": "/mine", "FAL_SOCKET_DIR": "/etc"}, socket_dir=Path("/s"))
    env = build(spec, host())["process"]["env"]
    assert "PATH=/mine" in env
    assert "FAL_SOCKET_DIR=/run/fal" in env
    assert "HOME=/tmp" in env


def test_without_a_user_namespace_the_command_is_not_root() -> None:
    made = build(container(), host(user_namespace=False))
    assert made["process"]["user"]["uid"] == 0x7000_0000
    assert "uidMappings" not in made["linux"]
    assert {"type": "user"} not in made["linux"]["namespaces"]


def test_cgroup_v2_has_no_swap_and_dies_as_one() -> None:
    resources = build(container(), host(cgroup_v2=True))["linux"]["resources"]
    assert resources["memory"] == {"limit": 2 << 30, "swap": 2 << 30}
    assert resources["unified"] == {"memory.oom.group": "1"}


@settings(deadline=None)
@given(
    cpu_milli=st.integers(0, 512_000),
    memory_bytes=st.integers(0, 1 << 42),
    pids_max=st.integers(0, 1 << 20),
    user_namespace=st.booleans(),
    cgroup_v2=st.booleans(),
    network=st.sampled_from(["none", "egress", "host"]),
    netns=st.sampled_from(["", "/run/falctl/net-1/netns/a"]),
)
def test_no_input_weakens_the_walls(
    cpu_milli: int, memory_bytes: int, pids_max: int, user_namespace: bool, cgroup_v2: bool, network: str, netns: str
) -> None:
    spec = ContainerSpec(
        id="a",
        command=("x",),
        resources=Resources(cpu_milli=cpu_milli, memory_bytes=memory_bytes, pids_max=pids_max),
        network=network,  # type: ignore[arg-type]
    )
    netns = netns if network == "egress" else ""
    made = build(spec, host(user_namespace=user_namespace, cgroup_v2=cgroup_v2, devices=(), binds=(), netns=netns))
    process, linux = made["process"], made["linux"]
    assert made["root"]["readonly"] is True
    assert process["noNewPrivileges"] is True
    assert not any(process["capabilities"].values())
    assert process["user"]["uid"] != 0 or user_namespace
    kinds = {namespace["type"] for namespace in linux["namespaces"]}
    assert {"pid", "ipc", "uts", "mount"} <= kinds
    assert ("network" in kinds) == (network != "host")
    assert ("user" in kinds) == user_namespace
    joined = {namespace["type"]: namespace["path"] for namespace in linux["namespaces"] if "path" in namespace}
    assert joined == ({"network": netns} if netns else {})
    assert any(mount["destination"] == "/sys" for mount in made["mounts"]) == (network == "none")
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert linux["seccomp"] == profile()
    assert ("pids" in linux["resources"]) == (pids_max > 0)
    assert linux["resources"].get("memory", {}).get("limit", 0) == memory_bytes
    quota = linux["resources"].get("cpu", {}).get("quota", 0)
    assert quota * 1000 == cpu_milli * 100_000 - (cpu_milli * 100_000) % 1000
    assert all("nosuid" in mount["options"] for mount in made["mounts"])


def test_seccomp_denies_what_docker_denies() -> None:
    rules = profile()["syscalls"]
    denied = {name for rule in rules if "args" not in rule for name in rule["names"]}
    assert denied >= DOCKER_DENIES
    assert all(rule["action"] == "SCMP_ACT_ERRNO" for rule in rules)
    flags = {rule["args"][0]["value"] for rule in rules if rule["names"] == ["clone"]}
    assert 0x10000000 in flags  # CLONE_NEWUSER
    assert len(flags) == 7
