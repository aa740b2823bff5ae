"""Limits, privileges and the system call filter, tried from inside real containers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import shutil
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.errors import Code, FalError
from fal_runtime import host_image
from fal_runtime.driver import ContainerSpec, Mount, Resources
from fal_runtime.oci import cgroups, limits
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.driver import OciDriver
from fal_runtime.oci.seccomp import DENIED
from fal_runtime.oci.spec import LOCKED_BYTES_DEFAULT

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
PYTHON = host_image.this_layout().python
MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[OciDriver]:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


async def said(driver: OciDriver, program: str, *words: str, **more: Any) -> Any:
    """The JSON that a Python program prints as its last line."""
    spec = ContainerSpec(f"limits-{os.urandom(4).hex()}", (PYTHON, "-c", program, *words), **more)
    await driver.create(spec)
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    lines = [line.text async for line in driver.logs(spec.id, tail_lines=1000, follow=False)]
    assert status.exit_code == 0, (status, lines)
    return json.loads(lines[-1])


def test_shared_and_locked_memory_are_what_was_asked(driver: OciDriver) -> None:
    look = """
import ctypes, json, mmap, os, resource
shm = os.statvfs("/dev/shm")
try:
    with open("/dev/shm/x", "wb") as file:
        for _ in range(16):
            file.write(bytes(1 << 20))
    full = 0
except OSError as error:
    full = error.errno
libc = ctypes.CDLL(None, use_errno=True)
def lock(count):
    memory = mmap.mmap(-1, count)
    where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.get_errno() if libc.mlock(ctypes.c_void_p(where), ctypes.c_size_t(count)) else 0
print(json.dumps([shm.f_frsize * shm.f_blocks, full, resource.getrlimit(8), lock(1 << 19), lock(1 << 21)]))
"""
    asked = Resources(shm_bytes=8 * MIB, locked_memory_bytes=MIB)
    size, full, limit, little, much = run(said(driver, look, resources=asked))
    assert size == 8 * MIB
    assert full == errno.ENOSPC
    assert limit == [MIB, MIB]
    assert (little, much) == (0, errno.ENOMEM)
    plain = run(said(driver, "import json, resource; print(json.dumps(resource.getrlimit(8)))"))
    assert plain == [LOCKED_BYTES_DEFAULT] * 2
    large = run(
        said(
            driver,
            "import json, resource; print(json.dumps(resource.getrlimit(8)))",
            resources=Resources(locked_memory_bytes=64 << 30),
        )
    )
    assert large == [min(64 << 30, limits.read(io=False).locked_memory_max)] * 2


def test_memory_limit_leaves_no_swap(driver: OciDriver) -> None:
    async def main() -> list[int]:
        spec = ContainerSpec(
            f"swap-{os.urandom(4).hex()}", ("/bin/sleep", "60"), resources=Resources(memory_bytes=64 * MIB)
        )
        await driver.create(spec)
        found = []
        for hierarchy in cgroups.hierarchies():
            for directory in hierarchy.glob(f"falctl/*.{spec.id}"):
                for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                    if (directory / name).exists():
                        found.append(int((directory / name).read_text().replace("max", "-1")))
        return found

    found = run(main())
    if not found:
        pytest.skip("this kernel does not count swap")
    assert found in ([64 * MIB], [0])


IO = """
import json, mmap, os, sys, time
block, count = 1 << 20, int(sys.argv[1])
memory = mmap.mmap(-1, block)
memory.write(os.urandom(block))
fd = os.open("/data/file", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
def timed(call):
    began = time.monotonic()
    for at in range(count):
        call(at * block)
    return count * block / (time.monotonic() - began)
print(json.dumps([timed(lambda at: os.pwritev(fd, [memory], at)), timed(lambda at: os.preadv(fd, [memory], at))]))
"""


@pytest.mark.slow
def test_disks_are_not_faster_than_was_asked(driver: OciDriver, tmp_path: Path) -> None:
    """At most twice the rate, which bursts may reach; nothing is said about how slow a busy disk is."""
    number = os.stat(tmp_path).st_dev
    if (os.major(number), os.minor(number)) not in limits.disks() and not limits.disks():
        pytest.skip("no disk whose speed can be bounded")
    data = tmp_path / "data"
    data.mkdir()
    try:
        (data / "probe").touch()
        os.close(os.open(data / "probe", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct reads here")
    rate = 16 * MIB
    mounts = (Mount(data, "/data", read_only=False),)
    bounded = run(said(driver, IO, "16", resources=Resources(io_bytes_s=rate), mounts=mounts))
    assert max(bounded) <= 2 * rate
    free = run(said(driver, IO, "16", mounts=mounts))
    assert max(free) > max(bounded)


def test_disks_are_found_below_partitions_and_not_in_memory(tmp_path: Path) -> None:
    sys_block, devices = tmp_path / "block", tmp_path / "devices"
    sys_block.mkdir()
    for path, number, partition in (
        ("nvme0n1", "259:0", False), ("nvme0n1/nvme0n1p1", "259:1", True), ("loop3", "7:3", False),
        ("zram0", "253:0", False), ("dm-0", "252:0", False),
    ):  # fmt: skip
        folder = devices / path
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        if partition:
            (folder / "partition").write_text("1\n")
        (sys_block / number).symlink_to(folder)
    info = tmp_path / "mountinfo"
    numbers = ("259:1", "7:3", "253:0", "252:0", "0:21", "8:99")
    info.write_text("".join(f"{at} 1 {number} / /m rw - x y z\n" for at, number in enumerate(numbers)))
    assert limits.disks(mountinfo=info, sys_block=sys_block) == ((252, 0), (259, 0))


PRIVILEGES = """
import ctypes, json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
libc = ctypes.CDLL(None, use_errno=True)
open("/tmp/x", "w").close()
def call(work):
    try:
        work()
        return 0
    except OSError as error:
        return error.errno
print(json.dumps({
    "caps": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")],
    "chown": call(lambda: os.chown("/tmp/x", 33, 33)),
    "host": call(lambda: os.chown("/etc/passwd", 33, 33)),
    "mount": ctypes.get_errno() if libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) else 0,
    "mknod": call(lambda: os.mknod("/tmp/node", 0o20600, os.makedev(1, 3))),
    "chroot": call(lambda: os.chroot("/tmp")),
    "nice": call(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
}))
"""


def test_privileges_are_those_that_were_given_and_no_further(driver: OciDriver) -> None:
    async def main() -> tuple[Any, Any]:
        if not (await driver.probe()).user_namespaces:
            pytest.skip("no user namespaces here")
        given = ("CHOWN", "CAP_DAC_OVERRIDE", "SYS_CHROOT", "SYS_ADMIN")
        return await said(driver, PRIVILEGES, privileges=given), await said(driver, PRIVILEGES)

    given, none = run(main())
    mask = 1 << 0 | 1 << 1 | 1 << 18 | 1 << 21
    assert given["caps"] == [mask, mask, mask, mask, 0]
    assert (given["chown"], given["chroot"]) == (0, 0)
    assert given["host"] in (errno.EROFS, errno.EPERM)
    assert given["mount"] == errno.EPERM, "the filter stays"
    assert given["mknod"] == errno.EPERM
    assert given["nice"] == errno.EACCES, "not within the host's"
    assert none["caps"] == [0] * 5
    assert (none["chown"], none["chroot"]) == (errno.EPERM, errno.EPERM)


def test_privileges_without_a_user_namespace_are_refused(tmp_path: Path) -> None:
    runtime = shutil.which("runc") or shutil.which("crun") or ""
    driver = OciDriver(tmp_path / "state", mode=Mode(runtime, False))
    try:
        with pytest.raises(FalError) as caught:
            run(driver.create(ContainerSpec("priv", ("/bin/true",), privileges=("CHOWN",))))
        assert caught.value.code is Code.INVALID
        assert caught.value.field == "privileges"
        assert run(driver.list()) == []
    finally:
        run(driver.clean(frozenset()))
        driver.close()


# Numbers of x86-64 (asm/unistd_64.h); those that the architecture lacks are not here.
CALLS = {
    "acct": 163, "add_key": 248, "adjtimex": 159, "bpf": 321, "chroot": 161, "clock_adjtime": 305, "clock_settime": 227,
    "create_module": 174, "delete_module": 176, "fanotify_init": 300, "finit_module": 313, "fsconfig": 431,
    "fsmount": 432, "fsopen": 430, "fspick": 433, "get_kernel_syms": 177, "init_module": 175, "io_uring_enter": 426,
    "io_uring_register": 427, "io_uring_setup": 425, "ioperm": 173, "iopl": 172, "kcmp": 312, "kexec_file_load": 320,
    "kexec_load": 246, "keyctl": 250, "lookup_dcookie": 212, "migrate_pages": 256, "mknod": 133, "mknodat": 259,
    "mount": 165, "mount_setattr": 442, "move_mount": 429, "move_pages": 279, "name_to_handle_at": 303,
    "nfsservctl": 180, "open_by_handle_at": 304, "open_tree": 428, "perf_event_open": 298, "pidfd_getfd": 438,
    "pivot_root": 155, "process_madvise": 440, "process_vm_readv": 310, "process_vm_writev": 311, "ptrace": 101,
    "query_module": 178, "quotactl": 179, "quotactl_fd": 443, "reboot": 169, "request_key": 249, "setdomainname": 171,
    "sethostname": 170, "setns": 308, "settimeofday": 164, "swapoff": 168, "swapon": 167, "sysfs": 139, "syslog": 103,
    "umount2": 166, "unshare": 272, "uselib": 134, "userfaultfd": 323, "ustat": 136, "vhangup": 153, "_sysctl": 156,
    "afs_syscall": 183,
}  # fmt: skip
TRY = """
import ctypes, json, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    return 0 if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)) >= 0 else ctypes.get_errno()
def opened(family, kind):
    try:
        socket.socket(family, kind).close()
        return 0
    except OSError as error:
        return error.errno
calls = json.loads(sys.argv[1])
flags = {"cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
         "net": 0x40000000, "mount": 0x00020000}
print(json.dumps({
    # Arguments that a call would find wrong for another reason, if it came to look at them.
    "denied": {name: call(number, -1, -1, -1, -1, -1) for name, number in calls.items()},
    "namespaces": {name: call(56, flag | 17, 0, 0, 0, 0) for name, flag in flags.items()},
    "clone3": call(435, 0, 0),
    "sockets": {str(family): opened(family, kind) for family, kind in ((17, 3), (38, 5), (40, 1))},
    "tiocsti": call(16, 0, 0x5412, 0),
    "tiocsti high": call(16, 0, 0x100005412, 0),
    "allowed": {"getpid": call(39), "memfd": call(319, 0, 0), "inet": opened(2, 1), "unix": opened(1, 1)},
}))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are those of x86-64")
def test_each_denied_call_is_refused_from_inside(driver: OciDriver) -> None:
    seen = run(said(driver, TRY, json.dumps(CALLS)))
    assert {name: code for name, code in seen["denied"].items() if code != errno.EPERM} == {}
    assert set(seen["namespaces"].values()) == {errno.EPERM}
    assert seen["clone3"] == errno.ENOSYS
    assert set(seen["sockets"].values()) == {errno.EPERM}
    assert seen["tiocsti"] == seen["tiocsti high"] == errno.EPERM
    assert seen["allowed"]["getpid"] == seen["allowed"]["inet"] == seen["allowed"]["unix"] == 0
    assert seen["allowed"]["memfd"] == errno.EFAULT, "it came to look at its name"
    # What is denied and not tried is not a call of this architecture.
    elsewhere = {"clock_adjtime64", "clock_settime64", "stime", "umount", "vm86", "vm86old", "open_tree_attr"}
    assert set(DENIED) - set(CALLS) == elsewhere
