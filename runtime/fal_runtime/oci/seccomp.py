"""Which system calls a container may not make. Pure: `profile()` is the `linux.seccomp` of an OCI spec.

Denied are the calls that docker's default profile keeps for capabilities that our containers never have, those that
make namespaces, mounts, kernel code or tracing, and those with a history of kernel holes (userfaultfd, keyctl,
io_uring). Everything else runs: a worker's libraries need far more calls than could be listed here. clone3 answers
ENOSYS, as its flags lie in memory that a filter cannot read; libc then uses clone, whose flags are checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

_EPERM: Final = 1
_ENOSYS: Final = 38

DENIED: Final = (
    *("acct", "add_key", "adjtimex", "bpf", "chroot", "clock_adjtime", "clock_adjtime64", "clock_settime"),
    *("clock_settime64", "create_module", "delete_module", "fanotify_init", "finit_module", "fsconfig", "fsmount"),
    *("fsopen", "fspick", "get_kernel_syms", "init_module", "io_uring_enter", "io_uring_register"),
    *("io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl"),
    *("lookup_dcookie", "migrate_pages", "mknod", "mknodat", "mount", "mount_setattr", "move_mount"),
    *("move_pages", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "open_tree", "open_tree_attr"),
    *(
        "perf_event_open",
        "pidfd_getfd",
        "pivot_root",
        "process_madvise",
        "process_vm_readv",
        "process_vm_writev",
        "ptrace",
    ),
    *("query_module", "quotactl", "quotactl_fd", "reboot", "request_key", "setdomainname"),
    *("sethostname", "setns", "settimeofday", "stime", "swapoff", "swapon", "sysfs", "syslog", "umount", "umount2"),
    *("unshare", "uselib", "userfaultfd", "ustat", "vhangup", "vm86", "vm86old", "_sysctl", "afs_syscall"),
)
# Every CLONE_NEW* flag that clone() takes: cgroup, uts, ipc, user, pid, net, mount.
_NAMESPACE_FLAGS: Final = (0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00020000)
# Families of sockets but UNIX (1), INET (2), INET6 (10) and NETLINK (16), as (mask, value) of the family's low 32 bits;
# the kernel looks at no others. Each other one is code that few have read, and is loaded when somebody asks for it
# (vsock reaches the hypervisor's host). Masks of 32 bits: what lies above them the kernel ignores, and the filter must.
_FAMILIES_DENIED: Final = (
    *((0xFFFFFFFF, 3), (0xFFFFFFFC, 4), (0xFFFFFFFE, 8), (0xFFFFFFFF, 11), (0xFFFFFFFC, 12)),
    *((0xFFFFFFFF, 17), (0xFFFFFFFE, 18), (0xFFFFFFFC, 20), (0xFFFFFFF8, 24), (0xFFFFFFE0, 32)),
)
_TERMINAL_REQUESTS_DENIED: Final = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: they write what the terminal's reader types
_SET_LEASE: Final = 1024  # whoever leases a file of the node (a mapped root owns them) holds up its writers for 45 s
# A call of another one ends the thread that makes it: i386 has socketcall(2), whose arguments no filter can read.
_ARCHITECTURES: Final = ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")


# What a capability is for. They are given to the agent's own tasks alone, within their user namespace.
_WITH: Final = {"MKNOD": ("mknod", "mknodat"), "SYS_CHROOT": ("chroot",)}


def profile(privileges: Iterable[str] = ()) -> dict[str, Any]:
    """The filter for a container with these capabilities; a new dict each time."""
    allowed = {call for name in privileges for call in _WITH.get(name.removeprefix("CAP_"), ())}
    denied = [call for call in DENIED if call not in allowed]
    rules: list[dict[str, Any]] = [
        {"names": denied, "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
    ]
    for flag in _NAMESPACE_FLAGS:
        rules.append(_when("clone", 0, flag, "SCMP_CMP_MASKED_EQ", flag))
    for mask, family in _FAMILIES_DENIED:
        rules.append(_when("socket", 0, mask, "SCMP_CMP_MASKED_EQ", family))
    for request in _TERMINAL_REQUESTS_DENIED:
        rules.append(_when("ioctl", 1, 0xFFFFFFFF, "SCMP_CMP_MASKED_EQ", request))
    for name in ("fcntl", "fcntl64"):
        rules.append(_when(name, 1, 0xFFFFFFFF, "SCMP_CMP_MASKED_EQ", _SET_LEASE))
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": list(_ARCHITECTURES), "syscalls": rules}


def _when(name: str, index: int, value: int, op: str, value_two: int = 0) -> dict[str, Any]:
    arg = {"index": index, "value": value, "op": op}
    if value_two:
        arg["valueTwo"] = value_two
    return {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM, "args": [arg]}
