"""Containers of real images on a real runtime: roots, users, bounds, hostile images, what is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from contract.driver_cases import oci_missing
from fal_contract.errors import Code, FalError
from fal_runtime.driver import ContainerSpec, ContainerStatus, Image, Mount, Resources
from fal_runtime.oci import mounts
from fal_runtime.oci.driver import OciDriver
from image_folders import image_of, make_folder, tools_missing

pytestmark = [
    pytest.mark.oci,
    pytest.mark.root,
    pytest.mark.skipif(bool(oci_missing()), reason=f"no containers here: {oci_missing()}"),
    pytest.mark.skipif(bool(tools_missing()), reason=f"no images here: {tools_missing()}"),
]
TIMEOUT_S = 60.0
MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = OciDriver(tmp_path / "state")
    yield made
    run(made.clean(frozenset()))
    made.close()
    assert [point for point in mounts.mount_points() if made._run in point.parents] == []


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main

    return asyncio.run(bounded())


def spec_of(image: Image, *command: str, **more: Any) -> ContainerSpec:
    more.setdefault("resources", Resources(scratch_bytes=4 * MIB, pids_max=64))
    return ContainerSpec(id=f"t-{os.urandom(4).hex()}", command=command, image=image, **more)


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


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


@pytest.mark.parametrize("format", ["erofs", "squashfs"])
def test_a_container_runs_from_an_image(driver: OciDriver, tmp_path: Path, format: str) -> None:
    image = image_of(make_folder(tmp_path / "i", format=format))
    script = (
        "id -u; stat -c %u:%a /etc/only-root; cat /etc/only-root; echo new >/etc/new; cat /etc/new; cat /etc/hostname"
    )
    status, lines = run(finished(driver, spec_of(image, *shell(script))))
    assert status.exit_code == 0, lines
    assert lines == ["0", "0:600", "secret of the image's root", "new", "runner"]
    assert not (tmp_path / "i" / "new").exists()


def test_the_image_names_the_process(driver: OciDriver, tmp_path: Path) -> None:
    config = {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; echo $GREETING; echo $HOME; pwd; echo $FAL_X"], "User": "worker",
        "Env": ["GREETING=hello", "FAL_X=no"], "WorkingDir": "/var",
    }  # fmt: skip
    image = image_of(make_folder(tmp_path / "i", config=config))
    status, lines = run(finished(driver, spec_of(image, env={"FAL_X": "ours"})))
    assert status.exit_code == 0, lines
    assert lines == ["uid=1000(worker) gid=1000(worker) groups=44(video)", "hello", "/home/worker", "/var", "ours"]


def test_a_command_beside_an_image_that_is_not_roots_opens_its_output_by_name(
    driver: OciDriver, tmp_path: Path
) -> None:
    image = image_of(make_folder(tmp_path / "i", config={"User": "worker"}))
    spec = spec_of(image, *shell("echo up; exec sleep 60"))

    async def main() -> None:
        assert await up(driver, spec) == "up"
        session = await driver.exec(spec.id, shell("id -u; echo said >/dev/stdout; echo wrong >/dev/stderr"))
        said: dict[str, bytes] = {}
        try:
            while (piece := await session.read()) is not None:
                said[piece[0]] = said.get(piece[0], b"") + piece[1]
            assert (await session.wait(), said) == (0, {"stdout": b"1000\nsaid\n", "stderr": b"wrong\n"})
        finally:
            await session.close()

    run(main())


def test_two_containers_of_one_image_share_a_mount_and_no_writes(driver: OciDriver, tmp_path: Path) -> None:
    image = image_of(make_folder(tmp_path / "i"))
    writer = spec_of(image, *shell("echo mine >/etc/mine; echo changed >/etc/passwd; cat /etc/mine; exec sleep 60"))
    reader = spec_of(image, *shell("cat /etc/mine; head -n1 /etc/passwd; id -u; cat /proc/self/uid_map"))

    async def main() -> tuple[ContainerStatus, list[str]]:
        assert await up(driver, writer) == "mine"
        found = await finished(driver, reader)
        shared = [point for point in mounts.mount_points() if point == driver._place.images.folder / image.id]
        assert len(shared) == 1
        return found

    _status, lines = run(main())
    assert any("/etc/mine" in line for line in lines)  # no such file
    assert "root:x:0:0::/root:/bin/sh" in lines
    assert "0" in lines


def test_what_is_written_over_an_image_is_bounded(driver: OciDriver, tmp_path: Path) -> None:
    image = image_of(make_folder(tmp_path / "i"))
    script = "dd if=/dev/zero of=/fill bs=65536 count=1000 2>&1; stat -c %s /fill; echo still >/tmp/here; cat /tmp/here"
    status, lines = run(finished(driver, spec_of(image, *shell(script))))
    assert status.exit_code == 0
    assert any("No space left" in line for line in lines)
    assert 0 < int(lines[-2]) <= 4 * MIB
    assert lines[-1] == "still"
    files = "i=0; while mkdir /d$i; do i=$((i+1)); [ $i -gt 6000 ] && break; done; echo made $i"
    _status, lines = run(finished(driver, spec_of(image, *shell(files))))
    (made,) = (line for line in lines if line.startswith("made "))  # the two outputs come in any order
    assert int(made.split()[1]) < 6000  # inodes are bounded, too


def test_no_scratch_means_a_read_only_root(driver: OciDriver, tmp_path: Path) -> None:
    image = image_of(make_folder(tmp_path / "i"))
    script = "echo x >/etc/new || echo refused; cat /etc/hosts"
    spec = spec_of(image, *shell(script), resources=Resources(), models_dir=tmp_path / "m")
    _status, lines = run(finished(driver, spec))
    assert "refused" in lines
    assert "127.0.0.1\tlocalhost runner" in lines


def hostile(root: Path) -> None:
    """Links where the runtime mounts and where the driver reads; device nodes; a set-user-id program."""
    for name in ("proc", "sys", "dev", "tmp", "run", "models"):
        (root / name).symlink_to("/etc")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/../../../../../etc/shadow")
    (root / "etc/hosts").symlink_to("/proc/1/environ")
    (root / "output").symlink_to("../../../../../../../../var")
    os.mknod(root / "root/mem", 0o666 | 0o020000, os.makedev(1, 1))
    (root / "bin/busybox").chmod(0o4755)


def test_links_in_an_image_lead_nowhere(driver: OciDriver, tmp_path: Path) -> None:
    image = image_of(make_folder(tmp_path / "i", change=hostile, config={"User": "0:0"}))
    given = tmp_path / "given"
    given.mkdir(mode=0o755)
    (given / "marker").write_text("ours\n")
    script = (
        "cat /proc/self/comm; ls /models; cat /output/marker; ls -l /var | wc -l; readlink /run || echo folder;"
        " head -c1 /root/mem || echo no-device; head -n1 /etc/hosts; ls /tmp; [ -e /etc/fal ] || echo nothing-there"
    )
    spec = spec_of(
        image, *shell(script), models_dir=tmp_path / "m", socket_dir=tmp_path / "s", mounts=(Mount(given, "/output"),)
    )
    before = sorted(path.name for path in Path("/var").iterdir())
    status, lines = run(finished(driver, spec))
    assert status.exit_code == 0, lines
    assert lines[0] == "cat"  # a real /proc
    assert "ours" in lines  # the bind is where it was asked for, inside
    assert "folder" in lines
    assert "no-device" in lines
    assert "127.0.0.1\tlocalhost runner" in lines
    assert "nothing-there" in lines  # /run/fal is not /etc/fal
    assert sorted(path.name for path in Path("/var").iterdir()) == before


def test_a_user_is_never_looked_up_in_the_hosts_files(driver: OciDriver, tmp_path: Path) -> None:
    """The image's /etc/passwd is a link to the host's: inside the image there is nothing behind it."""

    def link(root: Path) -> None:
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to("/../../../../etc/group")  # on the host: a table with "root" and "daemon"

    image = image_of(make_folder(tmp_path / "i", change=link, config={"User": "daemon"}))
    with pytest.raises(FalError) as caught:
        run(driver.create(spec_of(image, "/bin/sh")))
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "user"
    assert run(driver.clean(frozenset())) == [f"image mount {image.id}"]


@pytest.mark.parametrize("name", ["passwd", "group"])
def test_a_table_of_users_that_would_hang_its_reader_is_refused(driver: OciDriver, tmp_path: Path, name: str) -> None:
    def fifo(root: Path) -> None:
        (root / "etc" / name).unlink()
        os.mkfifo(root / "etc" / name)

    image = image_of(make_folder(tmp_path / "i", change=fifo))
    with pytest.raises(FalError) as caught:
        run(driver.create(spec_of(image, "/bin/sh")))
    assert caught.value.code is Code.CORRUPT
    assert caught.value.field == f"etc/{name}"


def test_an_image_that_is_none_is_refused_and_leaves_nothing(driver: OciDriver, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "i")
    (folder / "image.erofs").write_bytes(os.urandom(1 << 16))
    with pytest.raises(FalError) as caught:
        run(driver.create(spec_of(image_of(folder), "/bin/sh")))
    assert caught.value.code is Code.DRIVER_FAILED
    (folder / "config.json").write_text("{}")
    with pytest.raises(FalError) as caught:
        run(driver.create(spec_of(image_of(folder), "/bin/sh")))
    assert caught.value.code is Code.CORRUPT
    assert run(driver.list()) == []


def test_the_mount_goes_after_the_last_container_and_a_leaked_one_at_the_next_start(
    driver: OciDriver, tmp_path: Path
) -> None:
    driver._place.images._keep_s = 0.0
    image = image_of(make_folder(tmp_path / "i"))
    place = driver._place.images.folder / image.id

    async def one(keep_s: float) -> None:
        driver._place.images._keep_s = keep_s
        first, second = spec_of(image, "/bin/sleep", "60"), spec_of(image, "/bin/sleep", "60")
        await driver.create(first)
        await driver.create(second)
        await driver.remove(first.id)
        assert not await driver._place.images.release(image.id)  # the other one still uses it
        assert place.is_mount()
        await driver.remove(second.id)

    async def main() -> None:
        await one(0.0)
        async with asyncio.timeout(10):
            while place.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await one(3600.0)
        assert place.is_mount()
        again = OciDriver(tmp_path / "state")  # the agent was killed before it unmounted
        assert await again.clean(frozenset()) == [f"image mount {image.id}"]
        again.close()
        assert not place.exists()

    run(main())
