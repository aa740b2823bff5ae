"""A hostile program and hostile images try to leave their container: each attempt is made, and what it met is shown.

`tests/hostile_probe.py` makes the attempts and reports each one, so that none can be left out unseen. Containers run
with a user namespace and, where it could differ, without one. What was promised is in ops/docs/isolation.md.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, aclosing, closing, suppress
from pathlib import Path
from typing import Any

import pytest

import hostile_probe
from contract.driver_cases import oci_missing
from fal_contract.errors import FalError
from fal_runtime import host_image
from fal_runtime.driver import Capabilities, ContainerSpec, ContainerStatus, Phase, Prepared, Resources
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.driver import OciDriver
from fal_runtime.oci.spec import SIGNALS_PENDING_MAX, TERMINALS_MAX
from fal_runtime.oci.user_counts import INOTIFY_INSTANCES_MAX
from image_folders import image_of, make_folder, tools_missing

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
]
TIMEOUT_S = 60.0
MIB = 1 << 20
PYTHON = host_image.this_layout().python
SOURCE = Path(hostile_probe.__file__).read_text()
LIMITS = Resources(memory_bytes=256 * MIB, pids_max=48, open_files_max=1000, shm_bytes=16 * MIB)
FAMILIES = [1, 2, 10, 16]  # UNIX, INET, INET6, NETLINK
# An attempt that met something else than one of these was not contained, or was not made as it was meant.
REFUSALS = {
    *("EPERM", "EACCES", "EROFS", "ENOENT", "ENOSYS", "ESRCH", "EIO", "ENXIO", "ENODEV", "ECONNREFUSED", "EXDEV"),
    *("ETXTBSY", "EINVAL", "ELOOP", "ENETUNREACH", "EHOSTUNREACH"),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Capabilities, Mode]:
    """What works here, and how containers are best made."""
    made = OciDriver(tmp_path_factory.mktemp("probed"))
    try:
        found = run(made.probe())
        assert made._mode is not None
        return found, made._mode
    finally:
        run(made.clean(frozenset()))
        made.close()


@pytest.fixture(scope="module")
def modes(probed: tuple[Capabilities, Mode]) -> dict[str, Mode | None]:
    """How containers can be made here; None: not so."""
    found, mode = probed
    return {"mapped": mode if found.user_namespaces else None, "unmapped": Mode(mode.program, False)}


@pytest.fixture(params=["mapped", "unmapped"])
def driver(request: pytest.FixtureRequest, tmp_path: Path, modes: dict[str, Mode | None]) -> Iterator[OciDriver]:
    """With a user namespace, and without."""
    mode = modes[request.param]
    if mode is None:
        pytest.skip("no user namespaces here")
    made = OciDriver(tmp_path / "state", mode=mode)
    yield made
    run(made.prepare(()))
    run(made.clean(frozenset()))
    made.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def spec_of(*command: str, **more: Any) -> ContainerSpec:
    more.setdefault("resources", LIMITS)
    return ContainerSpec(id=f"t-{os.urandom(4).hex()}", command=command, **more)


def probe(facts: dict[str, Any], *groups: str, hold: bool = False) -> tuple[str, ...]:
    return (PYTHON, "-c", SOURCE, json.dumps(facts), ",".join(groups), *(["hold"] * hold))


async def lines_of(driver: OciDriver, id: str) -> list[str]:
    return [line.text async for line in driver.logs(id, tail_lines=10_000, follow=False)]


async def finished(driver: OciDriver, spec: ContainerSpec) -> tuple[ContainerStatus, list[str]]:
    await driver.create(spec)
    await driver.start(spec.id)
    status = await driver.wait(spec.id)
    return status, await lines_of(driver, spec.id)


async def up(driver: OciDriver, spec: ContainerSpec, word: str) -> list[str]:
    """Start it; its lines up to the one that is `word`."""
    await driver.create(spec)
    await driver.start(spec.id)
    seen = []
    async with aclosing(driver.logs(spec.id, tail_lines=10_000, follow=True)) as lines:
        async for line in lines:
            seen.append(line.text)
            if line.text == word:
                return seen
    raise AssertionError(f"{spec.id} ended: {await driver.status(spec.id)}, {seen[-5:]}")


def report_of(lines: list[str]) -> dict[str, dict[str, Any]]:
    """Group → attempt → what came of it; the program got to its end."""
    words = [json.loads(line) for line in lines if line.startswith(("[", '"'))]
    assert words[-1] == "all was tried", lines[-5:]
    report: dict[str, dict[str, Any]] = {}
    for group, name, got in words[:-1]:
        report.setdefault(group, {})[name] = got
    return report


def tried_of(facts: dict[str, Any], group: str) -> set[str]:
    return set(hostile_probe.GROUPS[group](facts))


def not_refused(report: dict[str, dict[str, Any]], *groups: str) -> dict[str, Any]:
    """What was not refused with an error that says so."""
    every = [(f"{group}: {name}", got) for group in groups for name, got in report[group].items()]
    return {name: got for name, got in every if not isinstance(got, str) or got.partition(":")[0] not in REFUSALS}


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=False).stdout
    return ["127.0.0.1", *(word for word in said.split() if "." in word)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a node has that a container could go for: servers on ports and sockets, a process, files."""
    secret = ["planted-", os.urandom(8).hex()]
    with ExitStack() as stack:
        victim = subprocess.Popen(["sleep", "600"])
        stack.callback(victim.wait, 10)
        stack.callback(victim.kill)
        listener = stack.enter_context(closing(socket.create_server(("0.0.0.0", 0))))
        port = listener.getsockname()[1]
        path = tmp_path / "docker.sock"
        abstract = f"hostile-{os.urandom(6).hex()}"
        for name in (str(path), f"\0{abstract}"):
            server = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            server.bind(name)
            server.listen()
        (tmp_path / "key.pem").write_text("".join(secret))
        yield {
            "host_pid": victim.pid,
            "ports": {address: [address, port] for address in own_addresses()},
            "sockets": {"its agent": str(path), "its agent, abstract": f"@{abstract}", "docker": "/run/docker.sock"},
            "paths": [str(tmp_path), str(tmp_path / "key.pem"), str(path), "/etc/shadow", "/root", "/run/falctl"],
            "keys": {"shm": 0x7A11, "name": "hostile"},
            "needle": secret,
        }
        assert victim.poll() is None, "it lives"


def test_every_way_out_is_closed(driver: OciDriver, node: dict[str, Any], tmp_path: Path) -> None:
    """Mounts, namespaces, device nodes, files of the kernel, processes, privileges, sockets."""
    groups = ("mounts", "nodes", "kernel_files", "processes", "sockets")
    spec = spec_of(*probe(node, *groups), socket_dir=tmp_path / "s")
    status, lines = run(finished(driver, spec))
    report = report_of(lines)
    assert status.exit_code == 0
    assert {group: set(report[group]) for group in groups} == {group: tried_of(node, group) for group in groups}
    passed = not_refused(report, *groups)
    # What is masked by an empty file or folder can be opened, and has nothing.
    masked = {
        name: got for name, got in passed.items() if name.startswith(("kernel_files: read", "kernel_files: list"))
    }
    assert set(masked.values()) <= {0}, masked
    assert {name: got for name, got in passed.items() if name not in masked} == {
        "processes: processes seen": 1,
        "sockets: families": FAMILIES,
        "sockets: families, written long": FAMILIES,
    }


def test_a_network_opens_nothing_but_the_network(
    node: dict[str, Any], tmp_path: Path, probed: tuple[Capabilities, Mode]
) -> None:
    """With egress, the node stays out of reach; with the node's own network, what listens on it is not."""
    capabilities, mode = probed
    driver = OciDriver(tmp_path / "state", mode=mode)
    groups = ("mounts", "kernel_files", "sockets")

    async def main() -> dict[str, dict[str, Any]]:
        networks = ["host"] + ["egress"] * ("egress" in capabilities.features)
        found = {}
        for network in networks:
            spec = spec_of(*probe(node, *groups), socket_dir=tmp_path / network, network=network)
            report = report_of((await finished(driver, spec))[1])
            assert set(report) == set(groups)
            passed = not_refused(report, *groups)
            found[network] = {name: got for name, got in passed.items() if got != 0 and "families" not in name}
            assert report["sockets"]["families"] == report["sockets"]["families, written long"] == FAMILIES
        return found

    try:
        found = run(main())
    finally:
        run(driver.clean(frozenset()))
        driver.close()
    ports = {f"sockets: port of {address}": "ok" for address in node["ports"]}
    assert found.pop("host") == {**ports, "sockets: socket of its agent, abstract": "ok"}
    assert found in ({}, {"egress": {}})


def test_it_holds_nothing_of_the_node(driver: OciDriver, node: dict[str, Any], tmp_path: Path) -> None:
    """Descriptors, environment, secrets, limits: of the command, of one in a prepared container, of one by `exec`."""
    given = probe(node, "given")

    async def main() -> list[dict[str, Any]]:
        specs = [
            spec_of(*given, socket_dir=tmp_path / f"s{n}", models_dir=tmp_path / f"m{n}", env={"MINE": "1"})
            for n in range(2)
        ]
        _, cold = await finished(driver, specs[0])
        await driver.prepare([Prepared(specs[1], 1)])
        _, warm = await finished(driver, specs[1])
        assert (driver._containers / specs[1].id).is_symlink(), "it was prepared"
        sleeper = spec_of("/bin/sh", "-c", "echo up; exec sleep 600", socket_dir=tmp_path / "s3", env={"MINE": "1"})
        await up(driver, sleeper, "up")
        session = await driver.exec(sleeper.id, given)
        try:
            said = b""
            while (got := await session.read()) is not None:
                said += got[1]
            assert await session.wait() == 0
        finally:
            await session.close()
        return [report_of(lines)["given"] for lines in (cold, warm, said.decode().splitlines())]

    for seen in run(main()):
        fds = {**seen["fds of 1"], **seen["fds of self"]}
        assert set(seen["fds of 1"]) <= {"0", "1", "2", "3"}, seen[
            "fds of 1"
        ]  # 3: a pidfd or folder of the probe's own
        assert {name for name in fds.values() if not name.startswith("pipe:")} <= {"/dev/null", "/proc/1/fd"}, fds
        assert all(int(seen["status"][name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
        assert (seen["status"]["NoNewPrivs"], seen["status"]["Seccomp"]) == ("1", "2")
        assert seen["status"]["Groups"] == ""
        assert seen["secret seen"] == []
        assert "MINE" in seen["env of 1"]
        ours = {name for name in seen["env of 1"] if not name.startswith("FAL_")} - {*host_image.this_layout().env}
        assert ours <= {"MINE", "PWD", "OLDPWD"}, "a shell's own, else as it was asked for"
        assert set(seen["run"]) <= {"/run/fal", "/run/fal-bind", "/run/secrets"}
        assert set(seen["setuid"]) <= {"/"}  # the runtime's, without a user namespace; it has no programs (`/usr` has)
        assert {"/", "/usr", "/etc", "/proc/sys", "/sys"} & set(seen["writable"]) == set()
        assert seen["limits"]["CORE"] == seen["limits"]["RTPRIO"] == seen["limits"]["NICE"] == [0, 0]


NEIGHBOUR = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None)
server = socket.socket(socket.AF_UNIX); server.bind("/run/fal/worker.sock"); server.listen()
hidden = socket.socket(socket.AF_UNIX); hidden.bind("\\0hostile-neighbour"); hidden.listen()
port = socket.create_server(("127.0.0.1", 7000))
libc.shmget(0x7A11, 4096, 0o1666)
for folder in ("/dev/shm", "/tmp"): open(folder + "/hostile", "w").write(open("/run/secrets/key").read())
libc.mq_open(b"/hostile", os.O_CREAT | os.O_RDWR, 0o666, None)
print("up", flush=True)
signal.pause()
"""


def test_another_runner_is_out_of_reach(driver: OciDriver, node: dict[str, Any], tmp_path: Path) -> None:
    """Its process, sockets, memory, queues, models, secrets and logs; by name, by path and by links to them."""
    secret = "".join(node["needle"]).encode()
    other = spec_of(
        PYTHON, "-c", NEIGHBOUR, secrets={"key": secret}, socket_dir=tmp_path / "o", models_dir=tmp_path / "om"
    )

    async def main() -> tuple[list[str], ContainerStatus | None]:
        await up(driver, other, "up")
        status = await driver.status(other.id)
        assert status is not None
        files = driver._containers / other.id
        facts = node | {
            "host_pid": status.pid,
            "ports": {"its server": ["127.0.0.1", 7000]},
            "sockets": {"it": str(tmp_path / "o/worker.sock"), "it, abstract": "@hostile-neighbour"},
            "paths": [str(tmp_path / "o"), str(tmp_path / "om"), str(files), str(driver._run / other.id)],
        }
        hostile = spec_of(
            *probe(facts, "neighbours", "processes", "sockets", "given"),
            secrets={"mine": b"mine"}, socket_dir=tmp_path / "s", models_dir=tmp_path / "m",
        )  # fmt: skip
        _, lines = await finished(driver, hostile)
        return lines, await driver.status(other.id)

    lines, status = run(main())
    report = report_of(lines)
    assert len(report["neighbours"]) >= 4 * 6 + 6
    assert not_refused(report, "neighbours") == {}
    assert set(not_refused(report, "processes", "sockets")) == {
        "processes: processes seen", "sockets: families", "sockets: families, written long",
    }  # fmt: skip
    assert report["given"]["secret seen"] == []
    assert status is not None
    assert status.phase is Phase.RUNNING


def test_what_is_counted_for_the_whole_node_is_not_used_up(
    driver: OciDriver, node: dict[str, Any], tmp_path: Path
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    async def main() -> list[str]:
        spec = spec_of(*probe(node, "exhaust", hold=True), socket_dir=tmp_path / "s")
        lines = await up(driver, spec, '"all was tried"')
        watcher = libc.inotify_init1(os.O_CLOEXEC)  # while it holds all that it got
        assert watcher >= 0, "the node has watchers left"
        os.close(watcher)
        os.close(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
        return lines

    got = report_of(run(main()))["exhaust"]
    assert set(got) == tried_of(node, "exhaust")
    mapped = driver._mode is not None and driver._mode.user_namespace
    if mapped:  # without, they are counted for a user of the container's own
        assert got["watchers of files"] == [INOTIFY_INSTANCES_MAX, "EMFILE"]
    assert got["terminals"] == [TERMINALS_MAX, "ENOSPC"]
    assert got["signals"] == [SIGNALS_PENDING_MAX, "EAGAIN"]
    assert got["processes"][0] < LIMITS.pids_max
    assert got["processes"][1] == "EAGAIN"
    assert got["open files"][0] < LIMITS.open_files_max
    assert got["open files"][1] == "EMFILE"
    assert got["files in /run/fal"][0] < 64
    assert got["files in /run/fal"][1] == "ENOSPC"
    assert got["names in /dev"][0] <= 16
    assert got["names in /dev"][1] in ("ENOSPC", "EACCES")  # without a user namespace /dev is root's


EATERS = {
    "a memfd": "import os\nfd = os.memfd_create('x')\nfor _ in range(512): os.write(fd, bytes(1 << 20))",
    "files in /tmp": "import os\nfd = os.open('/tmp/x', 66)\nfor _ in range(512): os.write(fd, bytes(1 << 20))",
    "pipes": """
import fcntl, os
held = []
for _ in range(3000):
    ends = os.pipe(); held.append(ends); fcntl.fcntl(ends[1], 1031, 1 << 18); os.write(ends[1], bytes(1 << 18))
""",
    "names in /tmp": "for n in range(2_000_000): open(f'/tmp/{n}', 'w').close()",
}


@pytest.mark.parametrize("what", EATERS)
def test_memory_ends_at_its_limit_whatever_it_is_used_for(
    what: str, tmp_path: Path, probed: tuple[Capabilities, Mode]
) -> None:
    driver = OciDriver(tmp_path / "state", mode=probed[1])
    limits = Resources(memory_bytes=32 * MIB, pids_max=16, open_files_max=20_000)
    try:
        program = f"print('eating', flush=True)\n{EATERS[what]}\nprint('ate it all')"
        status, lines = run(finished(driver, spec_of(PYTHON, "-c", program, resources=limits)))
        assert "eating" in lines
        assert "ate it all" not in lines
        assert status.oom_killed or "No space left" in lines[-1] or "Operation not permitted" in lines[-1], (
            status,
            lines,
        )
    finally:
        run(driver.clean(frozenset()))
        driver.close()


# --- hostile images ---------------------------------------------------------------------------------------------------


def hostile_root(root: Path) -> None:
    """Device nodes with everybody's permission, set-user-id programs, and links to where the runtime may stand."""
    for name, kind, device in (("mem", 0o020666, (1, 1)), ("disk", 0o060666, (254, 0)), ("kmsg", 0o020666, (1, 11))):
        os.mknod(root / "root" / name, kind, os.makedev(*device))
        (root / "root" / name).chmod(0o666)
    (root / "root").chmod(0o755)
    (root / "su").mkdir()
    for name in ("id", "cat"):
        shutil.copy(root / "bin/busybox", root / "su" / name)
        (root / "su" / name).chmod(0o6755)
    (root / "cwd").symlink_to("/proc/self/fd/7")


@pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}")
@pytest.mark.parametrize("scratch_bytes", [0, 4 * MIB])
def test_nodes_and_set_user_id_programs_of_an_image_are_of_no_use(
    driver: OciDriver, tmp_path: Path, scratch_bytes: int
) -> None:
    image = image_of(make_folder(tmp_path / "i", change=hostile_root, config={"User": "1000:1000"}))
    script = (
        "for n in mem disk kmsg; do [ -e /root/$n ] && cat /root/$n >/tmp/$n 2>/tmp/why;"
        " echo $n $? $(head -c1 /tmp/$n | wc -c); done; /su/id -u; /su/cat /etc/only-root; id -u"
    )
    limits = Resources(memory_bytes=64 * MIB, pids_max=32, scratch_bytes=scratch_bytes)
    _status, lines = run(finished(driver, spec_of("/bin/sh", "-c", script, image=image, resources=limits)))
    assert {"mem 1 0", "disk 1 0", "kmsg 1 0"} <= set(lines), lines
    assert "secret of the image's root" not in "".join(lines)
    uids = [line for line in lines if line.isdigit()]
    assert len(uids) == 2
    assert uids[0] == uids[1], "it stays who it was"


@pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}")
def test_an_image_cannot_stand_in_a_folder_of_the_node(driver: OciDriver, tmp_path: Path) -> None:
    """Its working directory names a descriptor that the runtime might have open (CVE-2024-21626)."""
    (tmp_path / "marker").write_text("of the node")
    folder = make_folder(tmp_path / "i", change=hostile_root)
    facts = json.loads((folder / "config.json").read_text())
    script = f"echo stands; cat ../../../../../../../../..{tmp_path}/marker; readlink /proc/self/cwd"

    async def said(spec: ContainerSpec) -> str:
        try:
            return "".join((await finished(driver, spec))[1])
        except FalError as error:
            return error.what  # the runtime finds no such folder

    for number, place in enumerate(["/cwd", *(f"/proc/self/fd/{fd}" for fd in (3, 5, 6, 7, 8, 9))]):
        copy = tmp_path / f"c{number}"
        copy.mkdir()
        os.link(folder / "image.erofs", copy / "image.erofs")
        (copy / "config.json").write_text(json.dumps(facts | {"config": {"WorkingDir": place}}))
        spec = spec_of("/bin/sh", "-c", script, image=image_of(copy))
        assert "of the node" not in run(said(spec)), place


def test_a_terminal_does_not_type_for_its_reader(tmp_path: Path, probed: tuple[Capabilities, Mode]) -> None:
    """What a command says on a terminal is bytes; it cannot put words into the terminal's input."""
    driver = OciDriver(tmp_path / "state", mode=probed[1])
    program = (
        "import ctypes, fcntl, json, os, pty\n"
        "main, side = pty.openpty()\n"
        "def call(number, high=0):\n"
        "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    return ctypes.get_errno() if libc.syscall(16, side, number | high, b'\\x03\\0') < 0 else 0\n"
        "print(json.dumps([call(n, h) for n in (0x5412, 0x541C) for h in (0, 1 << 32)]))"
    )
    try:
        _status, lines = run(finished(driver, spec_of(PYTHON, "-c", program)))
        assert json.loads(lines[-1]) == [1] * 4
    finally:
        run(driver.clean(frozenset()))
        driver.close()


# It waits for processes that come from outside, and tries to open the program that each one runs for writing: at once,
# and through the descriptor that it could open for reading, when nobody runs it any more.
AMBUSH = """
import errno, json, os, time
with open("/tmp/again", "w") as script: script.write("#!/proc/self/exe\\n")
os.chmod("/tmp/again", 0o755)
seen, held, until_s = {}, {}, time.monotonic() + 60
def opened(path, flags, what):
    try:
        fd = os.open(path, flags)
    except OSError as error:
        seen[what + " " + errno.errorcode[error.errno]] = seen.get(what + " " + errno.errorcode[error.errno], 0) + 1
        return -1
    seen[what] = seen.get(what, 0) + 1
    return fd
print("waits", flush=True)
while not os.path.exists("/tmp/over") and time.monotonic() < until_s:
    for pid in [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]:
        opened(f"/proc/{pid}/exe", os.O_WRONLY, "write")
        fd = opened(f"/proc/{pid}/exe", os.O_RDONLY, "read")
        if fd >= 0:
            place = os.readlink(f"/proc/self/fd/{fd}")
            if held.setdefault(place, fd) != fd: os.close(fd)
for place, fd in held.items():
    opened(f"/proc/self/fd/{fd}", os.O_WRONLY, "write later " + place)
print(json.dumps(seen))
"""


def test_the_runtime_cannot_be_overwritten_by_the_container_that_it_enters(driver: OciDriver) -> None:
    """CVE-2019-5736: who enters a container brings its program, as /proc/PID/exe."""
    assert driver._mode is not None
    program = Path(driver._mode.program)
    before = program.read_bytes()

    async def main() -> dict[str, Any]:
        spec = spec_of(PYTHON, "-c", AMBUSH)
        await up(driver, spec, "waits")
        for command in [("/bin/true",)] * 4 + [("/tmp/again",), ("/bin/sh", "-c", ": >/tmp/over")]:
            with suppress(FalError):  # /tmp/again makes the runtime execute itself, which it does not like
                session = await driver.exec(spec.id, command)
                try:
                    while await session.read() is not None:
                        pass
                    await session.wait()
                finally:
                    await session.close()
        await driver.wait(spec.id)
        seen: dict[str, Any] = json.loads((await lines_of(driver, spec.id))[-1])
        return seen

    seen = run(main())
    assert sum(count for name, count in seen.items() if name.startswith("write")) > 0, "it saw nobody come"
    refused = ("EROFS", "EACCES", "EPERM", "ETXTBSY", "ENOENT", "ESRCH")
    assert [name for name in seen if name.startswith("write") and not name.endswith(refused)] == [], seen
    assert program.read_bytes() == before
