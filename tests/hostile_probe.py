"""A program that tries to leave its container, and reports what the kernel said to each attempt.

Run in a container by tests/integration/test_hostile.py: `python -c SOURCE FACTS GROUPS`, where FACTS is a JSON object
of what it could attack on its node (`host_pid`, `ports`, `sockets`, `paths`, `keys`, `needle`). Each attempt is a line
of JSON, [group, name, what came of it]: "ok" (it worked), the name of its error, or what it got. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
Attempts = dict[str, Callable[[], Any]]
_AMD64 = platform.machine() == "x86_64"


def attempt(work: Callable[[], Any]) -> Any:
    """What came of it."""
    try:
        got = work()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError as error:  # what setrlimit(2) refuses
        return f"EPERM: {error}"
    return "ok" if got is None else got


def call(number: int, *args: int | bytes | None) -> int:
    """A system call by its number, that raises OSError."""
    words = [ctypes.c_char_p(a) if isinstance(a, bytes | None) else ctypes.c_long(a) for a in args]
    got = int(_libc.syscall(ctypes.c_long(number), *words))
    if got < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return got


def libc(name: str, *args: Any) -> None:
    """A function of libc that returns -1 where it fails."""
    if getattr(_libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)


def write(path: str, data: bytes) -> None:
    """Overwrite without making it."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read(path: str) -> int:
    """How many bytes of a file can be read, 64 KiB at most."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return len(os.read(fd, 65536))
    finally:
        os.close(fd)


# --- mounts, nodes, the kernel's files --------------------------------------------------------------------------------


def mounts(facts: dict[str, Any]) -> Attempts:
    """To change what is mounted, or to enter where more is."""
    bind, remount = 4096, 32 | 4096
    return {
        "tmpfs": lambda: libc("mount", b"x", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None),
        "proc": lambda: libc("mount", b"proc", b"/tmp", b"proc", ctypes.c_ulong(0), None),
        "sysfs": lambda: libc("mount", b"sysfs", b"/tmp", b"sysfs", ctypes.c_ulong(0), None),
        "cgroup": lambda: libc("mount", b"cgroup", b"/tmp", b"cgroup", ctypes.c_ulong(0), b"memory"),
        "cgroup2": lambda: libc("mount", b"cgroup2", b"/tmp", b"cgroup2", ctypes.c_ulong(0), None),
        "overlay": lambda: libc(
            "mount", b"o", b"/tmp", b"overlay", ctypes.c_ulong(0), b"lowerdir=/,upperdir=/tmp,workdir=/tmp"
        ),
        "bind": lambda: libc("mount", b"/usr", b"/tmp", None, ctypes.c_ulong(bind), None),
        "remount writable": lambda: libc("mount", None, b"/usr", None, ctypes.c_ulong(remount), None),
        "remount the root": lambda: libc("mount", None, b"/", None, ctypes.c_ulong(remount), None),
        "shared": lambda: libc("mount", None, b"/", None, ctypes.c_ulong(1 << 20), None),
        "umount of a mask": lambda: libc("umount2", b"/proc/keys", 2),
        "umount of /proc": lambda: libc("umount2", b"/proc", 2),
        "pivot_root": lambda: call(155, b"/tmp", b"/tmp"),
        "chroot": lambda: libc("chroot", b"/tmp"),
        "open_tree": lambda: call(428, -100, b"/", 1),
        "move_mount": lambda: call(429, -100, b"/usr", -100, b"/tmp", 0),
        "fsopen": lambda: call(430, b"tmpfs", 0),
        "fspick": lambda: call(433, -100, b"/", 0),
        "mount_setattr": lambda: call(442, -100, b"/usr", 0, b"\0" * 32, 32),
        "unshare user": lambda: libc("unshare", 0x10000000),
        "unshare user and mounts": lambda: libc("unshare", 0x10020000),
        "unshare user and network": lambda: libc("unshare", 0x50000000),
        "unshare cgroup": lambda: libc("unshare", 0x02000000),
        "unshare time": lambda: libc("unshare", 0x00000080),
        "clone user": lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0),
        "clone3 user": lambda: call(435, struct.pack("<11Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88),
        "setns": lambda: libc("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0),
        "setns by pidfd": lambda: libc("setns", os.pidfd_open(1), 0x00020000),
        "open_by_handle_at": lambda: call(304, -100, b"\0" * 64, 0),
        "write below /usr": lambda: os.close(os.open("/usr/bin/hostile", os.O_CREAT | os.O_WRONLY)),
        "chattr of /usr": lambda: _ioctl("/usr", 0x40086602),
        "freeze /usr": lambda: _ioctl("/usr", 0xC0045877),
        "lease of a file of the node": lambda: call(72 if _AMD64 else 25, os.open("/usr/bin/env", 0), 1024, 0),
        "overwrite a program by its mapping": _write_mapped,
        "unshare of a 32-bit program": lambda: _old_call(310, 0x10000000, b"") if _AMD64 else "ENOSYS",
        "any call of a 32-bit program": lambda: _old_call(20, 0, b"") if _AMD64 else "ENOSYS",
        "unshare by a number of x32": lambda: _in_child(_x32, 272, 0x10000000) if _AMD64 else "ENOSYS",
        "any call by a number of x32": lambda: _in_child(_x32, 39, 0) if _AMD64 else "ENOSYS",
    }


def _ioctl(path: str, number: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        call(16, fd, number, b"\0" * 8)
    finally:
        os.close(fd)


def _write_mapped() -> None:
    """/proc/self/mem ignores the protection of a mapping, and must not reach the file behind it."""
    with open(os.path.realpath("/usr/bin/env"), "rb") as program:
        address = _map(program.fileno(), _PROT_READ, _MAP_SHARED)
        with open("/proc/self/mem", "wb", buffering=0) as memory:
            memory.seek(address)
            memory.write(b"hostile")


_PROT_READ, _PROT_ALL, _MAP_SHARED, _MAP_PRIVATE_ANONYMOUS_32BIT = 1, 7, 1, 0x22 | 0x40


def _map(fd: int, protection: int, flags: int) -> int:
    function = _libc.mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return int(function(None, 4096, protection, flags, fd, 0))


_NODES = {
    "sda": (0o060600, 8, 0), "vda": (0o060600, 254, 0), "loop0": (0o060600, 7, 0), "mem": (0o020600, 1, 1),
    "kmsg": (0o020600, 1, 11), "port": (0o020600, 1, 4), "fuse": (0o020600, 10, 229), "kvm": (0o020600, 10, 232),
    "loop-control": (0o020600, 10, 237), "mapper": (0o020600, 10, 236), "nvidia0": (0o020600, 195, 0),
    "nvidiactl": (0o020600, 195, 255), "nvidia-uvm": (0o020600, 511, 0), "tun": (0o020600, 10, 200),
}  # fmt: skip


def nodes(facts: dict[str, Any]) -> Attempts:
    """To make or open device nodes."""
    tries: Attempts = {}
    for name, (mode, major, minor) in _NODES.items():
        for folder in ("/tmp", "/dev", "/dev/shm", "/run/fal"):
            path = f"{folder}/hostile-{name}"
            tries[f"make {name} in {folder}"] = partial(os.mknod, path, mode, os.makedev(major, minor))
        tries[f"open {name}"] = partial(read, f"/dev/{name}")
    return tries


def kernel_files(facts: dict[str, Any]) -> Attempts:
    """To write what steers the kernel, and to read what tells of it."""
    written = (
        *("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hostname"),
        *("/proc/sys/vm/drop_caches", "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max"),
        *("/proc/sys/fs/binfmt_misc/register", "/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/printk"),
        *("/proc/sys/net/ipv4/ip_forward", "/proc/sys/user/max_user_namespaces", "/proc/sysrq-trigger"),
        *("/proc/irq/default_smp_affinity", "/proc/self/attr/current", "/sys/power/state", "/sys/kernel/mm/ksm/run"),
        *("/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/release_agent"),
        *("/sys/class/net/lo/mtu", "/sys/module/printk/parameters/time", "/sys/kernel/uevent_helper"),
        *("/proc/1/oom_score_adj", "/proc/self/uid_map", "/proc/self/gid_map", "/proc/self/setgroups"),
        "/proc/self/timens_offsets",
    )
    reads = (
        *("/proc/kcore", "/proc/kmsg", "/proc/keys", "/proc/kallsyms", "/proc/modules", "/proc/kpagecount"),
        *("/proc/timer_list", "/proc/interrupts", "/proc/sched_debug", "/proc/kpageflags", "/proc/slabinfo"),
        *("/proc/vmallocinfo", "/proc/1/stack", "/proc/pagetypeinfo", "/sys/kernel/debug/x"),
        *("/sys/kernel/vmcoreinfo", "/sys/firmware/acpi/tables/DSDT", "/sys/kernel/tracing/trace"),
    )
    tries: Attempts = {f"write {path}": partial(write, path, b"-1000" if "oom" in path else b"1") for path in written}
    tries.update({f"read {path}": partial(read, path) for path in reads})
    tries["list /sys/fs/cgroup"] = lambda: len(os.listdir("/sys/fs/cgroup"))
    tries["list /sys/kernel"] = lambda: len(os.listdir("/sys/kernel"))
    return tries


# --- processes and privileges -----------------------------------------------------------------------------------------


def processes(facts: dict[str, Any]) -> Attempts:
    """To reach processes that are not its own, or to gain what it lacks."""
    host = facts["host_pid"]
    rlimits = {"open files": resource.RLIMIT_NOFILE, "locked": resource.RLIMIT_MEMLOCK, "core": resource.RLIMIT_CORE}
    tries: Attempts = {
        "signal to a process of the host": lambda: os.kill(host, 0),
        "pidfd of a process of the host": lambda: os.close(os.pidfd_open(host)),
        "/proc of a process of the host": lambda: os.listdir(f"/proc/{host}"),
        "memory of a process of the host": lambda: read(f"/proc/{host}/mem"),
        "root of a process of the host": lambda: os.listdir(f"/proc/{host}/root"),
        "processes seen": lambda: len([name for name in os.listdir("/proc") if name.isdigit()]),
        "ptrace": lambda: call(101, 16, 1, 0, 0),
        "process_vm_readv": lambda: call(310, 1, 0, 0, 0, 0, 0),
        "pidfd_getfd": lambda: call(438, os.pidfd_open(1), 0, 0),
        "kcmp": lambda: call(312, 1, 1, 0, 0, 0),
        "setuid": lambda: os.setuid(4242),
        "setgid": lambda: os.setgid(4242),
        "setgroups": lambda: os.setgroups([0, 4242]),
        "capset": lambda: call(126, struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *[1 << 21] * 3, 0, 0, 0)),
        "ambient": lambda: call(157, 47, 2, 21, 0, 0),
        "no_new_privs off": lambda: call(157, 38, 0, 0, 0, 0),
        "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)),
        "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        "disk first": lambda: call(251, 1, 0, (1 << 13) | 0),
        "not to be killed for memory": lambda: write("/proc/self/oom_score_adj", b"-1000"),
        "clock": lambda: call(227, 0, struct.pack("<2q", 0, 0)),
        "hostname": lambda: call(170, b"x", 1),
        "overwrite its program": lambda: os.close(os.open("/proc/1/exe", os.O_WRONLY)),
    }
    for name, number in rlimits.items():
        tries[f"more {name}"] = partial(resource.setrlimit, number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tries


# --- sockets ----------------------------------------------------------------------------------------------------------

_FAMILIES = range(1, 46)


def sockets(facts: dict[str, Any]) -> Attempts:
    """To reach servers of the node, and parts of the kernel that have sockets."""
    tries: Attempts = {}
    for name, address in facts["ports"].items():
        tries[f"port of {name}"] = partial(_connect, tuple(address))
    for name, path in facts["sockets"].items():
        tries[f"socket of {name}"] = partial(_connect_unix, path.replace("@", "\0"))
    tries["families"] = lambda: [family for family in _FAMILIES if _opens(family) not in _REFUSED]
    # The kernel takes 32 bits of the number, a careless filter looks at 64.
    tries["families, written long"] = lambda: [f for f in _FAMILIES if _opens(f | 1 << 32) not in _REFUSED]
    tries["netfilter"] = lambda: _netlink(12, 0x0A00, 0x0005)
    tries["new interface"] = lambda: _netlink(0, 16, 0x0605)
    tries["raw"] = lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()
    if _AMD64:
        tries["vsock of a 32-bit program"] = lambda: _old_call(102, 1, struct.pack("<3I", 40, 1, 0))
    return tries


def _connect(address: tuple[str, int]) -> None:
    socket.create_connection(address, timeout=2).close()


def _connect_unix(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        client.connect(path)


_REFUSED = (errno.EPERM,)


def _opens(family: int) -> int:
    """0, or why the last kind of socket was not made."""
    code = 0
    for kind in (1, 2, 3, 5):
        try:
            os.close(call(41 if _AMD64 else 198, family, kind, 0))
        except OSError as error:
            code = error.errno or 0
            continue
        return 0
    return code


def _netlink(protocol: int, kind: int, flags: int) -> None:
    """Send one request and raise the kernel's error."""
    body = struct.pack("<BBH", 0, 0, 0) if protocol == 12 else struct.pack("<BxHiII", 0, 0, 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as link:
        link.settimeout(2)
        link.send(struct.pack("<IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        answer = link.recv(4096)
    code = -struct.unpack_from("<i", answer, 16)[0]
    if code:
        raise OSError(code, "netlink")


def _old_call(number: int, first: int, words: bytes) -> str | None:
    """A system call as 32-bit programs make it, by int 0x80; its second argument is the address of `words`."""
    return _in_child(_int80, number, first, words)


def _x32(number: int, first: int) -> int:
    try:
        return call(0x40000000 | number, first)
    except OSError as error:
        return -(error.errno or 0)


def _in_child(work: Callable[..., int], *args: Any) -> str | None:
    """What a system call returned; "ENOSYS" where the child died: the kernel has no such calls, or the filter none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, struct.pack("<i", work(*args)))
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 4)
    os.close(reading)
    os.waitpid(child, 0)
    if not said:
        return "ENOSYS"
    code = struct.unpack("<i", said)[0]
    if code < 0:
        raise OSError(-code, "refused")
    return None


def _int80(number: int, first: int, words: bytes) -> int:
    area = _map(-1, _PROT_ALL, _MAP_PRIVATE_ANONYMOUS_32BIT)
    ctypes.memmove(area + 2048, words, len(words))
    code = (
        b"\x53\xb8"
        + struct.pack("<I", number)
        + b"\xbb"
        + struct.pack("<I", first)
        + b"\xb9"
        + struct.pack("<I", area + 2048)
        + b"\xcd\x80\x5b\xc3"
    )  # push rbx; mov eax, number; mov ebx, first; mov ecx, words; int 0x80; pop rbx; ret
    ctypes.memmove(area, code, len(code))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(area)())


# --- what it was given ------------------------------------------------------------------------------------------------


def given(facts: dict[str, Any]) -> Attempts:
    """What it holds from its start: descriptors, environment, files; nothing is attempted."""
    return {
        "fds of 1": lambda: _fds(1),
        "fds of self": lambda: _fds(os.getpid()),
        "cwd": os.getcwd,
        "status": _status,
        "env of 1": lambda: sorted(name.partition("=")[0] for name in _strings("/proc/1/environ")),
        "secret seen": lambda: sorted(_grep("".join(facts["needle"]))),
        "run": lambda: sorted(str(path) for path in Path("/run").rglob("*")),
        "setuid": _setuid_programs,
        "writable": lambda: sorted(_writable()),
        "limits": lambda: {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in _LIMITS},
    }


_LIMITS = ("CORE", "NPROC", "NOFILE", "MEMLOCK", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO")


def _mounts() -> list[str]:
    with open("/proc/self/mountinfo") as file:
        return [line.strip() for line in file]


def _fds(pid: int) -> dict[str, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # the folder that is being read
    return found


def _status() -> dict[str, str]:
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Uid", "Gid", "Groups")
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return {name: lines[name].strip() for name in names}


def _strings(path: str) -> list[str]:
    with open(path, "rb") as file:
        return [word.decode(errors="replace") for word in file.read().split(b"\0") if word]


def _grep(needle: str) -> Iterator[str]:
    """Files outside /usr and the interpreter that hold these words."""
    for top in ("/etc", "/run", "/tmp", "/dev/shm", "/models", "/mnt", "/var", "/proc/1", "/proc/self"):
        for parent, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name not in ("task", "net", "map_files", "fd")]
            for name in files:
                path = os.path.join(parent, name)
                try:
                    with open(path, "rb") as file:
                        if path.startswith("/proc") and name not in ("environ", "cmdline"):
                            continue
                        if needle.encode() in file.read(1 << 20):
                            yield path
                except OSError:
                    continue


def _setuid_programs() -> list[Any]:
    """Those that there are, and whether they would count."""
    flags = {path: os.statvfs(path).f_flag for path in ("/", "/usr", "/tmp", "/dev/shm", "/run/fal")}
    return [path for path, bits in flags.items() if not bits & os.ST_NOSUID]


def _writable() -> Iterator[str]:
    for line in _mounts():
        point = line.split(" ")[4]
        if os.access(point, os.W_OK) and not os.statvfs(point).f_flag & os.ST_RDONLY:
            yield point


# --- neighbours, and what is for all ----------------------------------------------------------------------------------


def neighbours(facts: dict[str, Any]) -> Attempts:
    """To reach another runner: its paths on the node, its process, its memory; also by links in its own folders."""
    tries: Attempts = {}
    for number, path in enumerate(facts["paths"]):
        tries[f"list {path}"] = partial(os.listdir, path)
        tries[f"read {path}"] = partial(read, path)
        for folder in ("/run/fal", "/tmp"):
            tries[f"link to {path} in {folder}"] = partial(_by_link, path, f"{folder}/link-{number}")
            tries[f"hard link to {path} in {folder}"] = partial(os.link, path, f"{folder}/hard-{number}")
    tries["a model replaced"] = lambda: os.mkdir("/models/mine")
    tries["a secret replaced"] = lambda: os.close(os.open("/run/secrets/mine", os.O_CREAT | os.O_WRONLY))
    tries["the message that starts a runner"] = lambda: os.mkfifo("/run/fal-bind/go")
    tries["shared memory by key"] = lambda: call(29, facts["keys"]["shm"], 4096, 0) if _AMD64 else "ENOENT"
    tries["shared memory by name"] = lambda: read(f"/dev/shm/{facts['keys']['name']}")
    tries["queue by name"] = lambda: read(f"/dev/mqueue/{facts['keys']['name']}")
    return tries


def _by_link(path: str, at: str) -> int:
    os.symlink(path, at)
    return read(at)


def exhaust(facts: dict[str, Any]) -> Attempts:
    """To use up what is for the whole node; each tells how many it got. What it got it holds."""
    held: list[Any] = []
    return {
        "watchers of files": lambda: _until_refused(lambda n: held.append(_made(_libc.inotify_init1(0))), 4096),
        "terminals": lambda: _until_refused(lambda n: held.append(os.open("/dev/ptmx", os.O_RDWR)), 4096),
        "files in /run/fal": lambda: _until_refused(lambda n: _file(f"/run/fal/{n}"), 4096),
        "names in /dev": lambda: _until_refused(lambda n: _file(f"/dev/shm/../{n}", b"x" * 4096), 4096),
        "signals": lambda: _until_refused(_signal_waits, 100_000),
        "processes": lambda: _until_refused(lambda n: held.append(_child()), 4096),
        "open files": lambda: _until_refused(lambda n: held.append(os.dup(0)), 1 << 20),
    }


def _until_refused(work: Callable[[int], None], most: int) -> list[Any]:
    """How often it worked, and the error that ended it."""
    for number in range(most):
        try:
            work(number)
        except OSError as error:
            return [number, errno.errorcode.get(error.errno or 0, str(error))]
    return [most, "ok"]


def _made(fd: int) -> int:
    if fd < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return fd


def _file(path: str, data: bytes = b"") -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _signal_waits(number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    _made(_libc.sigqueue(os.getpid(), int(signal.SIGRTMIN), None))


def _child() -> int:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    return child


GROUPS: dict[str, Callable[[dict[str, Any]], Attempts]] = {
    "mounts": mounts,
    "nodes": nodes,
    "kernel_files": kernel_files,
    "processes": processes,
    "sockets": sockets,
    "given": given,
    "neighbours": neighbours,
    "exhaust": exhaust,
}


def main() -> None:
    facts = json.loads(sys.argv[1])
    for group in sys.argv[2].split(","):
        for name, work in GROUPS[group](facts).items():
            print(json.dumps([group, name, attempt(work)]), flush=True)  # lines of a log are bounded
    print(json.dumps("all was tried"), flush=True)
    if len(sys.argv) > 3:
        signal.pause()  # and holds what it has


if __name__ == "__main__":
    main()
