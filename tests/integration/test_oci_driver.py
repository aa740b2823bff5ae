"""The oci driver on a real runtime: isolation, limits, survival, and what it leaves behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.errors import Code, FalError
from fal_runtime import host_image, socket_dir
from fal_runtime.driver import ContainerSpec, ContainerStatus, Mount, Phase, Resources
from fal_runtime.oci import cgroups, kernel_messages, mounts
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.driver import RUN_DIR, OciDriver
from fal_runtime.oci.record import EndUnread
from fal_runtime.uid_ranges import RANGE_IDS, UidRanges

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
PYTHON = host_image.this_layout().python
MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def id_of(name: str) -> str:
    return f"{name}-{os.urandom(4).hex()}"


async def finished(driver: OciDriver, spec: ContainerSpec) -> tuple[ContainerStatus, list[str]]:
    """Run to its end; what it said."""
    await driver.create(spec)
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    return status, [line.text async for line in driver.logs(spec.id, tail_lines=10_000, follow=False)]


async def up(driver: OciDriver, spec: ContainerSpec) -> str:
    """Start it and return its first line."""
    await driver.create(spec)
    await driver.start(spec.id)
    async with aclosing(driver.logs(spec.id, tail_lines=1, follow=True)) as lines:
        async for line in lines:
            return line.text
    raise AssertionError(f"{spec.id} ended without a word: {await driver.status(spec.id)}")


def python(program: str, *words: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(id=id_of("t"), command=(PYTHON, "-c", program, *words), **more)


async def said(driver: OciDriver, program: str, **more: Any) -> Any:
    """The JSON that a Python program prints as its last line."""
    status, lines = await finished(driver, python(program, **more))
    assert status.exit_code == 0, (status, lines)
    return json.loads(lines[-1])


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (other processes cannot set an event)
            await asyncio.sleep(0.01)
    assert condition(), what


def test_the_probe_finds_a_working_runtime(driver: OciDriver) -> None:
    found = run(driver.probe())
    assert found.isolates
    assert found.runtime.split()[0] in ("runc", "crun")
    assert found.cgroup == cgroups.mode()
    assert found.seccomp
    assert "works" in found.details.values()
    assert run(driver.list()) == []


def test_a_probe_without_runtimes_says_why(driver: OciDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("conmon", "unshare", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "bin" / "runc").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FalError) as caught:
        run(driver.probe())
    assert caught.value.code is Code.DRIVER_FAILED
    assert "runc" in caught.value.what
    assert "crun: not installed" in caught.value.what
    assert run(driver.list()) == []


def test_out_of_memory_is_told(driver: OciDriver) -> None:
    bomb = "import sys\nprint('eating', flush=True)\nblocks = [bytearray(1 << 20) for _ in range(512)]\nprint('ate')"
    spec = python(bomb, resources=Resources(memory_bytes=64 * MIB, pids_max=32))
    status, lines = run(finished(driver, spec))
    assert status.oom_killed
    assert status.exit_code == 137
    assert "memory" in status.reason
    assert lines == ["eating"]
    assert run(OciDriver(driver._containers.parent).status(spec.id)) == status


def test_pids_are_bounded(driver: OciDriver) -> None:
    bomb = """
import json, os, time
count = 0
try:
    while count < 1000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError as error:
    print(json.dumps([count, error.errno]), flush=True)
"""
    count, error = run(said(driver, bomb, resources=Resources(pids_max=20)))
    assert error == errno.EAGAIN
    assert 10 <= count < 20


def test_cpu_limit_is_in_force(driver: OciDriver) -> None:
    spin = """
import json, time
cpu, wall = time.process_time(), time.monotonic()
while time.monotonic() - wall < 1.0:
    pass
print(json.dumps((time.process_time() - cpu) / (time.monotonic() - wall)))
"""
    assert run(said(driver, spin, resources=Resources(cpu_milli=200))) < 0.4


def test_runners_weigh_more_than_one_process(driver: OciDriver) -> None:
    """All of them lie in one cgroup: with its default weight they would share the portion of a single process."""
    run(driver.probe())
    found = [
        int(path.read_text())
        for hierarchy in cgroups.hierarchies()
        for path in (hierarchy / "falctl" / "cpu.shares", hierarchy / "falctl" / "cpu.weight")
        if path.exists()
    ]
    cpus = os.cpu_count() or 1
    assert found in ([min(1024 * cpus, 262_144)], [min(100 * cpus, 10_000)])


def test_there_is_no_network(driver: OciDriver) -> None:
    look = """
import json, os, socket
def reach(address):
    try:
        socket.create_connection(address, timeout=2).close()
        return "connected"
    except OSError as error:
        return error.errno
print(json.dumps([os.listdir("/sys/class/net"), reach(("192.0.2.1", 80)), reach(("127.0.0.1", PORT))]))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        interfaces, outside, host = run(said(driver, look.replace("PORT", str(port))))
    assert interfaces == ["lo"]
    assert outside == errno.ENETUNREACH
    assert host == errno.ECONNREFUSED  # its own loopback, not ours


def test_host_network_is_the_hosts(driver: OciDriver) -> None:
    look = """
import json, socket
socket.create_connection(("127.0.0.1", PORT), timeout=5).close()
print(json.dumps("reached"))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(said(driver, look.replace("PORT", str(port)), network="host")) == "reached"


def test_privileges_are_gone(driver: OciDriver) -> None:
    look = """
import ctypes, json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    return ctypes.get_errno() if getattr(libc, name)(*args) < 0 else 0
def write(path):
    try:
        open(path, "w").close()
        return 0
    except OSError as error:
        return error.errno
print(json.dumps({
    "caps": [status[k].strip() for k in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(),
    "mount": call("mount", b"x", b"/tmp", b"tmpfs", 0, None),
    "unshare": call("unshare", 0x10000000),
    "ptrace": call("ptrace", 0, 0, 0, 0),
    "keyctl": (ctypes.set_errno(0), libc.syscall(250, 0, -3, 0), ctypes.get_errno())[2],
    "bpf": (ctypes.set_errno(0), libc.syscall(321, 0, 0, 0), ctypes.get_errno())[2],
    "root": write("/x"), "usr": write("/usr/x"), "etc": write("/etc/x"), "sys": write("/proc/sys/kernel/hostname"),
    "tmp": write("/tmp/x"),
    "keys": open("/proc/keys").read(),
    "devices": sorted(os.listdir("/dev")),
    "files": __import__("resource").getrlimit(7)[0],
}))
"""
    seen = run(said(driver, look, resources=Resources(open_files_max=1234)))
    assert set(seen["caps"]) == {"0" * 16}
    assert seen["no_new_privs"] == "1"
    assert seen["seccomp"] == "2"
    for name in ("mount", "unshare", "ptrace", "keyctl", "bpf"):
        assert seen[name] == errno.EPERM, name
    for name in ("root", "usr", "etc", "sys"):
        assert seen[name] in (errno.EROFS, errno.EACCES, errno.EPERM), name
    assert seen["tmp"] == 0
    assert seen["keys"] == ""  # masked by /dev/null
    assert not {"sda", "vda", "mem", "kmsg", "fuse", "kvm", "loop0"} & set(seen["devices"])
    assert seen["files"] == 1234


def test_the_host_image_hides_keys_state_and_homes(driver: OciDriver, tmp_path: Path) -> None:
    marker = f"planted-{os.urandom(8).hex()}"
    private = Path("/etc/ssl/private")
    made = [tmp_path / "state" / marker, Path.home() / marker, private / marker]
    walk = """
import json, os, sys
def names(top):
    for parent, directories, files in os.walk(top, onerror=lambda e: None):
        if parent in ("/proc", "/sys"):
            directories.clear()
        yield parent, directories + files
found, count = [], 0
for parent, children in names("/"):
    count += len(children)
    found += [f"{parent}/{c}" for c in children if sys.argv[1] in c]
paths = ["/etc/shadow", "/etc/gshadow", "/etc/ssl/private", "/etc/ssh", "/root", "/home", "/var/lib/dpkg", "/boot"]
there = [path for path in paths if os.path.exists(path)]
print(json.dumps([found, count, there, sorted(os.listdir("/")), open("/etc/passwd").read()]))
"""
    present = [path for path in made if path.parent.is_dir()]
    try:
        for path in present:
            path.write_text("secret")
        spec = ContainerSpec(id=id_of("walk"), command=(PYTHON, "-c", walk, marker))
        status, lines = run(finished(driver, spec))
    finally:
        for path in present:
            path.unlink(missing_ok=True)
    assert status.exit_code == 0, lines
    found, count, paths, root, passwd = json.loads(lines[-1])
    assert len(present) >= 2
    assert found == []
    assert count > 10_000  # it did walk /usr
    assert paths == []
    assert set(root) <= {
        *("bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "mnt", "models", "opt", "proc", "run", "sbin", "sys"),
        *("tmp", "usr", "var"),
    }
    assert passwd.count("\n") == 2


def test_the_workers_packages_are_there_and_nothing_else_of_the_checkout(driver: OciDriver) -> None:
    look = """
import json, os, sys
import aiohttp, fal_contract.errors, fal_runtime.driver
print(json.dumps([fal_runtime.driver.__file__, aiohttp.__file__, sorted(os.listdir("/opt/falctl/src"))]))
"""
    ours, theirs, source = run(said(driver, look))
    assert ours == "/opt/falctl/src/fal_runtime/driver.py"
    assert theirs.startswith("/opt/falctl/env/")
    assert source == ["fal_contract", "fal_runtime"]


def test_user_ids_are_mapped_and_differ_between_runners(driver: OciDriver, tmp_path: Path) -> None:
    look = """
import json, os, sys, time
print(json.dumps([os.getuid(), os.stat("/usr/bin").st_uid, os.stat("/etc/passwd").st_uid, os.stat("/tmp").st_uid]),
      flush=True)
time.sleep(60)
"""

    async def main() -> None:
        if not (await driver.probe()).user_namespaces:
            pytest.skip("no user namespaces here")
        host_uids = []
        for _ in range(2):
            spec = python(look)
            assert json.loads(await up(driver, spec)) == [0, 0, 0, 0]
            status = await driver.status(spec.id)
            assert status is not None
            host_uids.append(os.stat(f"/proc/{status.pid}").st_uid)
        first, second = host_uids
        assert abs(first - second) >= RANGE_IDS
        assert {first, second} <= UidRanges(RUN_DIR / "uid_ranges.json").owners().keys()
        assert len(await driver.clean(frozenset())) >= 2
        owners = UidRanges(RUN_DIR / "uid_ranges.json").owners()  # of the whole machine: others may have taken them
        assert not [owner for owner in owners.values() if str(owner).startswith(f"{tmp_path}/")]

    run(main())


def test_without_user_namespaces_it_still_is_not_root(tmp_path: Path) -> None:
    async def main() -> None:
        probe = OciDriver(tmp_path / "probe")
        program = (await probe.probe()).runtime.split()[0]
        probe.close()
        driver = OciDriver(tmp_path / "state", mode=Mode(shutil.which(program) or program, False))
        try:
            look = "import json, os; print(json.dumps([os.getuid(), open('/tmp/x', 'w').write('x')]))"
            uid, written = await said(driver, look)
            assert uid >= RANGE_IDS
            assert written == 1
        finally:
            await driver.clean(frozenset())
            await probe.clean(frozenset())

    run(main())


def test_a_socket_replaced_by_a_link_is_refused(driver: OciDriver, tmp_path: Path) -> None:
    program = """
import os, socket, time
directory = os.environ["FAL_SOCKET_DIR"]
server = socket.socket(socket.AF_UNIX)
server.bind(directory + "/worker.sock")
server.listen()
os.symlink("/host.sock", directory + "/link.sock")
print("ready", flush=True)
time.sleep(60)
"""

    async def main() -> None:
        directory = tmp_path / "s"
        spec = python(program, socket_dir=directory)
        assert await up(driver, spec) == "ready"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(directory / "worker.sock"))
            pid = socket_dir.peer_pid(client)
            status = await driver.status(spec.id)
            assert status is not None
            assert socket_dir.peer_in_cgroup(pid, status.cgroup)
            assert not socket_dir.peer_in_cgroup(pid, spec.id), "another agent's container may have this id"
            assert not socket_dir.peer_in_cgroup(pid, "")
        assert not socket_dir.peer_in_cgroup(os.getpid(), status.cgroup)
        # The host's own socket, to which the container's link points.
        os.unlink(directory / "link.sock")
        with socket.socket(socket.AF_UNIX) as host, socket.socket(socket.AF_UNIX) as client:
            host.bind(str(tmp_path / "h.sock"))
            host.listen()
            (directory / "link.sock").symlink_to(tmp_path / "h.sock")
            with pytest.raises(OSError) as caught:
                client.connect(str(directory / "link.sock"))
            assert caught.value.errno == errno.ELOOP
        with pytest.raises(OSError) as full:
            (directory / "big").write_bytes(bytes(socket_dir.SIZE_BYTES * 2))
        assert full.value.errno == errno.ENOSPC

    run(main())


def test_models_reach_a_live_container_read_only(driver: OciDriver, tmp_path: Path) -> None:
    look = ("/bin/sh", "-c", "echo ready; while sleep 0.02; do cat /models/m/* 2>/dev/null; ls /models; done")

    async def main() -> None:
        spec = ContainerSpec(id=id_of("live"), command=look, models_dir=tmp_path / "m1")
        other = ContainerSpec(id=id_of("other"), command=look, models_dir=tmp_path / "m2")
        for one in (spec, other):
            assert await up(driver, one) == "ready"
        status = await driver.status(spec.id)
        assert status is not None
        inside = Path(f"/proc/{status.pid}/root/models")
        stranger = await driver.status(other.id)
        assert stranger is not None
        for version in ("one", "two", "three"):
            source = tmp_path / version
            source.mkdir()
            (source / "file").write_text(version)
            (source / "file").chmod(0o600)
            assert await driver.attach_model(spec.id, "m", source) == "/models/m"
            assert (inside / "m" / "file").read_text() == version
            async with aclosing(driver.logs(spec.id, tail_lines=0, follow=True)) as lines:
                async for line in lines:
                    if version in line.text:  # the container itself can read it, mode 0600
                        break
            with pytest.raises(OSError) as caught:
                (inside / "m" / "new").write_text("x")
            assert caught.value.errno == errno.EROFS
            if version == "one":
                kept = (inside / "m" / "file").open()
        assert kept.read() == "one"
        kept.close()
        assert sum(point == (tmp_path / "m1" / "m") for point in mounts.mount_points()) == 1
        assert os.listdir(f"/proc/{stranger.pid}/root/models") == []
        await driver.detach_model(spec.id, "m")
        assert not (inside / "m").exists()

    run(main())


def test_mounts_are_as_the_spec_says(driver: OciDriver, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "rw").mkdir()
    (tmp_path / "file").write_text("text")
    look = """
import json, os
def write(path):
    try:
        open(path, "w").write("x")
        return 0
    except OSError as error:
        return error.errno
print(json.dumps([write("/data/ro/x"), write("/data/rw/x"), open("/etc/../data/file").read()]))
"""
    seen = run(
        said(
            driver,
            look,
            mounts=(
                Mount(tmp_path / "ro", "/data/ro"),
                Mount(tmp_path / "rw", "/data/rw", read_only=False),
                Mount(tmp_path / "file", "/data/file"),
            ),
        )
    )
    assert seen == [errno.EROFS, 0, "text"]
    assert (tmp_path / "rw" / "x").stat().st_uid == 0  # written through the id map


AGENT = """
import asyncio, sys
from pathlib import Path
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci.driver import OciDriver
async def main():
    driver = OciDriver(Path(sys.argv[1]))
    script = "echo before; while [ ! -e /run/fal/go ]; do sleep 0.02; done; echo after; exit 9"
    spec = ContainerSpec(id=sys.argv[2], command=("/bin/sh", "-c", script), socket_dir=Path(sys.argv[3]))
    await driver.create(spec)
    await driver.start(spec.id)
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_every_process_of_the_agents_cgroup_is_killed_and_nothing_is_lost(driver: OciDriver, tmp_path: Path) -> None:
    """As systemd's KillMode=control-group would: each pid in the agent's cgroup, in each hierarchy."""
    name = f"/falctl-test-{os.urandom(4).hex()}"
    id = id_of("survivor")
    go = tmp_path / "s"
    agent = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.readline()\n" + AGENT, str(tmp_path / "state"), id, str(go)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    try:
        cgroups.enter(agent.pid, name)
        agent.stdin.write("go\n")
        agent.stdin.close()
        assert agent.stdout.readline() == "up\n"
        created = json.loads((tmp_path / "state/containers" / id / "created.json").read_text())
        lines = cgroups.of_process(agent.pid)
        assert lines
        assert not lines & cgroups.of_process(created["conmon"])
        assert not lines & cgroups.of_process(created["pid"])
        cgroups.remove(name)  # kills whatever is in it
        assert agent.wait(10) == -signal.SIGKILL
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
        cgroups.remove(name)

    async def main() -> None:
        running = await driver.status(id)
        assert running is not None
        assert running.phase is Phase.RUNNING
        assert running.reason == ""
        (go / "go").touch()
        assert (await driver.wait(id)).exit_code == 9
        assert [line.text async for line in driver.logs(id, tail_lines=9, follow=False)] == ["before", "after"]

    run(main())


def test_the_kernels_messages_are_read_beside_the_loop(driver: OciDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[threading.Thread] = []

    def recent() -> str:
        readers.append(threading.current_thread())
        return ""

    monkeypatch.setattr(kernel_messages, "recent", recent)
    monkeypatch.setattr(cgroups, "oom_kills", lambda _path: 1)

    async def main() -> None:
        spec = ContainerSpec(id=id_of("oom"), command=("/bin/sh", "-c", "echo up; sleep 600"))
        await up(driver, spec)
        waiting = [asyncio.create_task(driver.wait(spec.id)) for _ in range(3)]
        ended = await driver.kill(spec.id)
        assert ended.oom_killed
        assert [await one for one in waiting] == [ended] * 3
        assert [one for one in await driver.list() if one.id == spec.id] == [ended]

    run(main())
    assert readers
    assert threading.main_thread() not in readers


def test_an_end_that_comes_during_a_look_is_not_read_on_the_loop(driver: OciDriver) -> None:
    async def main() -> None:
        spec = ContainerSpec(id=id_of("end"), command=("/bin/sh", "-c", "echo up; sleep 600"))
        await up(driver, spec)
        files = driver._files(spec.id)
        (files.paths().exits / files.runtime_id).write_text("7")  # as conmon does it, at any moment
        with pytest.raises(EndUnread):
            files.status(driver._place.runtime_root, may_end=False)
        ended = await driver.status(spec.id)
        assert ended is not None
        assert ended.exit_code == 7

    run(main())


def test_a_dead_conmon_is_told(driver: OciDriver) -> None:
    async def main() -> None:
        spec = ContainerSpec(id=id_of("orphan"), command=("/bin/sh", "-c", "echo up; sleep 600"))
        await up(driver, spec)
        created = json.loads((driver._containers / spec.id / "created.json").read_text())
        os.kill(created["conmon"], signal.SIGKILL)

        def told() -> bool:
            status = driver._files(spec.id).status(driver._place.runtime_root)
            return status is not None and "conmon died" in status.reason

        await until(told, "conmon's death is in the reason")
        ended = await driver.kill(spec.id)
        assert ended.phase is Phase.EXITED
        assert ended.exit_code is None
        assert "lost" in ended.reason

    run(main())


def test_logs_are_bounded(driver: OciDriver) -> None:
    spec = ContainerSpec(
        id=id_of("chatty"),
        command=("/bin/sh", "-c", "i=0; while [ $i -lt 40000 ]; do echo line $i; i=$((i+1)); done"),
        log_bytes_max=256 << 10,
    )
    status, lines = run(finished(driver, spec))
    assert status.exit_code == 0
    assert lines[-1] == "line 39999"
    size = sum(path.stat().st_size for path in (driver._containers / spec.id / "log").iterdir())
    assert size <= 2 * (256 << 10)


def test_nothing_is_left(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        spec = ContainerSpec(
            id=id_of("gone"),
            command=("/bin/sh", "-c", "echo up; sleep 600"),
            socket_dir=tmp_path / "s",
            models_dir=tmp_path / "m",
            mounts=(Mount(tmp_path, "/data"),),
            resources=Resources(1000, 64 * MIB, 32),
        )
        await up(driver, spec)
        created = json.loads((driver._containers / spec.id / "created.json").read_text())
        await driver.attach_model(spec.id, "m", tmp_path)
        await driver.remove(spec.id)
        assert not [p for p in mounts.mount_points() if tmp_path in p.parents or spec.id in str(p)]
        assert not [name for name in cgroups.below("/falctl") if spec.id in name]
        assert not (tmp_path / "s").exists()
        assert not (tmp_path / "m").exists()
        assert not any(spec.id in str(path) for path in driver._run.rglob("*"))
        assert list(driver._containers.iterdir()) == []
        for pid in (created["pid"], created["conmon"]):
            await until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{pid} is gone")  # type: ignore[misc]

    run(main())


def test_an_interrupted_creation_is_cleaned(driver: OciDriver) -> None:
    async def main() -> None:
        await driver.probe()
        for delay_s in (0.0, 0.005, 0.02, 0.04):
            spec = ContainerSpec(id=id_of("half"), command=("/bin/true",))
            task = asyncio.create_task(driver.create(spec))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled() and task.exception() is None:
                continue  # it was faster
            assert await driver.status(spec.id) is None
            assert not (driver._containers / spec.id).exists()
            assert not [name for name in cgroups.below("/falctl") if spec.id in name]

    run(main())


@pytest.mark.parametrize("written", [("created.json",), ("created.json", "record.json")])
def test_an_agent_killed_while_creating(driver: OciDriver, written: tuple[str, ...], tmp_path: Path) -> None:
    """What its last breath did not write down is found and taken away, whatever runs; then it is made anew."""

    async def main() -> None:
        spec = ContainerSpec(id=id_of("breath"), command=("/bin/sh", "-c", "echo up; sleep 600"))
        await driver.create(spec)
        created = json.loads((driver._containers / spec.id / "created.json").read_text())
        for name in written:
            (driver._containers / spec.id / name).unlink()
        again = OciDriver(tmp_path / "state")
        assert await again.status(spec.id) is None
        assert await again.list() == []
        removed = await again.clean(frozenset({spec.id}))
        assert any(spec.id in words for words in removed)
        for pid in (created["pid"], created["conmon"]):
            await until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{pid} is gone")  # type: ignore[misc]
        assert not [name for name in cgroups.below("/falctl") if spec.id in name]
        assert not [point for point in mounts.mount_points() if spec.id in str(point)]
        assert await up(again, spec) == "up"
        again.close()

    run(main())


def test_many_start_at_once(driver: OciDriver, tmp_path: Path) -> None:
    async def main() -> None:
        specs = [
            ContainerSpec(id=id_of("many"), command=("/bin/sh", "-c", f"echo {n}"), socket_dir=tmp_path / f"s{n}")
            for n in range(8)
        ]
        ended = await asyncio.gather(*(finished(driver, spec) for spec in specs))
        assert [lines for _status, lines in ended] == [[str(n)] for n in range(8)]
        assert all(status.exit_code == 0 for status, _lines in ended)
        await asyncio.gather(*(driver.remove(spec.id) for spec in specs))
        assert await driver.list() == []

    run(main())


def test_only_the_devices_it_was_given_are_usable(driver: OciDriver) -> None:
    node = Path(f"/dev/falctl-test-{os.urandom(4).hex()}")
    look = """
import json, sys
try:
    print(json.dumps(open(sys.argv[1], "rb").read(2).hex()))
except OSError as error:
    print(json.dumps(error.errno))
"""
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # another /dev/zero
    try:
        node.chmod(0o666)

        async def main() -> None:
            for devices, expected in (((str(node),), "0000"), ((), errno.ENOENT)):
                spec = python(look, str(node), gpu_devices=devices)
                _status, lines = await finished(driver, spec)
                assert json.loads(lines[-1]) == expected

        run(main())
    finally:
        node.unlink()


def test_what_is_not_supported_is_refused(driver: OciDriver) -> None:
    for spec in (
        ContainerSpec(id="a", command=("x",), network="egress"),
        ContainerSpec(id="a", command=("x",), gpu_devices=("/dev/no-such-gpu",)),
        ContainerSpec(id="a", command=("x",), socket_dir=Path("/tmp/" + "x" * 120)),
    ):
        with pytest.raises(FalError) as caught:
            run(driver.create(spec))
        assert caught.value.remedy
        assert run(driver.list()) == []
