"""Tasks that pack an image on a node: what their container is given, and what is told of what they leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent_fakes import Box, assignment, until, welcome
from fal_agent import build_output, wire
from fal_agent.core.tasks import Phase
from fal_agent.launch import container_id, output_folder
from fal_agent.node import Node
from fal_agent.packing import PRIVILEGES, Packer, clear_rest, missing, proxies_of
from fal_contract.errors import FalError
from fal_contract.limits import IMAGE_PACK_WORK_FACTOR, SECRET_BYTES_MAX
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.driver import Capabilities, ContainerSpec
from fal_runtime.fake import FakeDriver, Script
from virtual_time import LoopClock, run_virtually

RUNNER = "system/pack-abab-00000001-00000001"
SOURCE = "docker://registry/repo:1"
DIGEST = "sha256:" + "ab" * 32
PYTHON = ("/usr/bin/python3",)
Scenario = Callable[[Box], Awaitable[None]]


def play(tmp_path: Path, scenario: Scenario, **packer: object) -> None:
    async def main() -> None:
        box = Box(tmp_path, LoopClock())
        box.packer = Packer(PYTHON, **packer)  # type: ignore[arg-type]
        await scenario(box)

    run_virtually(main())


def pack(**changes: object) -> agent_pb2.Assignment:
    task = state_pb2.BuildTask(
        namespace="image", key="cd" * 32, bytes_max=1 << 20, image="default/img", source=SOURCE, platform="linux/amd64"
    )
    for name, value in changes.items():
        setattr(task, name, value)
    app = RUNNER.rsplit("-", 1)[0]
    return assignment(RUNNER, app=app, share_group=app, build=task, network="host")


async def begun(box: Box, message: agent_pb2.Assignment) -> Node:
    node = box.agent()
    await node.start()
    node.hello()
    node.welcome(wire.leader_of(welcome()))
    await node.receive(
        wire.complete_of(agent_pb2.Complete(revision=1, term=1, store_revision=1, assignments=[message]))
    )
    return node


def told(node: Node) -> agent_pb2.RunnerStatus:
    return next(x for x in node.hello().runners if x.runner_id == RUNNER)


def over(node: Node) -> Callable[[], bool]:
    return lambda: all(task.phase is Phase.GONE for task in node.tasks())


def spec_of(box: Box) -> ContainerSpec:
    return box.machine.containers[container_id(RUNNER)].spec


def packed(folder: Path, **changes: object) -> None:
    """What the packer leaves."""
    table: dict[str, object] = {
        "version": 1, "source": SOURCE, "digest": DIGEST, "platform": "linux/amd64", "format": "erofs",
        "layer_bytes": 7, "config": {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**table, **changes}))
    (folder / "image.erofs").write_bytes(b"x" * 100)


# --- its container ----------------------------------------------------------------------------------------------------


def test_it_runs_our_packer_with_the_nodes_network_and_little_else(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begun(box, pack())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        spec = spec_of(box)
        options = ["--platform", "linux/amd64", "--bytes-max", str(1 << 20), "--timeout-s", "55"]
        argv = [*PYTHON, "-m", "fal_runtime.images", "pack", SOURCE, "--output", "/output", *options]
        assert list(spec.command) == argv
        assert (spec.network, spec.privileges, spec.image) == ("host", PRIVILEGES, None)
        assert not spec.secrets
        (mount,) = spec.mounts
        assert (mount.source, mount.read_only) == (output_folder(box.places, RUNNER), False)
        await node.close()

    play(tmp_path, scenario)


def test_the_nodes_own_credentials_authority_and_proxy_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text('{"auths": {}}')
    (tmp_path / "ca").write_text("PEM")

    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begun(box, pack())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        spec = spec_of(box)
        hidden = spec.secrets["registry-proxies.json"]
        assert dict(spec.secrets) == {
            "registry-auth.json": b'{"auths": {}}', "registry-ca.pem": b"PEM", "registry-proxies.json": hidden,
        }  # fmt: skip
        assert json.loads(hidden) == {"HTTPS_PROXY": "http://bob:hidden88@proxy:3128"}
        text = " ".join(spec.command)
        assert "--authfile /run/secrets/registry-auth.json --ca-file /run/secrets/registry-ca.pem" in text
        assert text.endswith("--proxy-file /run/secrets/registry-proxies.json")
        assert spec.env["https_proxy"] == "http://proxy:3128"
        assert "hidden88" not in f"{spec.env} {text}", "the container's config.json is on the disk"
        await node.close()

    proxies = {"https_proxy": "http://proxy:3128", "HTTPS_PROXY": "http://bob:hidden88@proxy:3128"}
    play(tmp_path, scenario, auth_file=tmp_path / "auth", ca_file=tmp_path / "ca", proxies=proxies)


def test_the_images_own_secret_wins_over_the_nodes_file(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("the node's")

    async def ask(runner_id: str) -> dict[str, bytes]:
        assert runner_id == RUNNER
        return {"mine": b"the team's"}

    async def scenario(box: Box) -> None:
        box.secrets = ask
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begun(box, pack(auth_secret="mine"))
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        spec = spec_of(box)
        assert dict(spec.secrets) == {"mine": b"the team's"}
        assert "--authfile /run/secrets/mine" in " ".join(spec.command)
        await node.close()

    play(tmp_path, scenario, auth_file=tmp_path / "auth")


@pytest.mark.parametrize("content", [None, b"x" * (SECRET_BYTES_MAX + 1)])
def test_a_file_that_cannot_be_used_ends_the_task_with_a_reason(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "auth").write_bytes(content)

    async def scenario(box: Box) -> None:
        node = await begun(box, pack())
        await until(over(node))
        assert str(tmp_path / "auth") in told(node).reason
        assert "agent's options" in told(node).reason
        await node.close()

    play(tmp_path, scenario, auth_file=tmp_path / "auth")


def test_other_runners_get_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("secret")
    box = Box(tmp_path, LoopClock())
    spec = ContainerSpec("a", ("true",))
    other = assignment("t/app-1", build=state_pb2.BuildTask(namespace="cluster", key="k", bytes_max=1))
    for message in (assignment("t/app-1"), other):
        assert Packer(PYTHON, tmp_path / "auth").completed(spec, message, FakeDriver(box.machine)) is spec


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_the_image_is_told_without_its_pieces_and_with_the_packers_words(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=30.0, ready_after_s=None)
        node = await begun(box, pack())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        folder = output_folder(box.places, RUNNER)
        packed(folder)
        (folder / "left" / "behind").mkdir(parents=True)
        (folder / "left" / "link").symlink_to("/etc/passwd")
        (folder / "odd").symlink_to("/etc")
        await until(over(node))
        status = told(node)
        assert (status.exit_code, status.output.kind) == (0, "image")
        assert all(not file.blake3 for file in status.output.files)
        assert [file.path for file in status.output.files] == ["config.json", "image.erofs"]
        facts = status.output.image
        assert (facts.source, facts.digest, facts.format, facts.layer_bytes) == (SOURCE, DIGEST, "erofs", 7)
        assert not folder.exists()
        await node.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize(("changes", "why"), [({"digest": "none"}, "digest"), ({"format": "tar"}, "format")])
def test_an_image_that_is_none_is_not_taken_in(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(exit_after_s=30.0, ready_after_s=None)
        node = await begun(box, pack())
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        packed(output_folder(box.places, RUNNER), **changes)
        await until(over(node))
        assert "its output was not taken" in told(node).reason
        assert why in told(node).reason
        assert not box.cache.taken_in
        await node.close()

    play(tmp_path, scenario)


def test_a_pack_may_hold_some_times_its_image_and_no_more(tmp_path: Path) -> None:
    async def scenario(box: Box) -> None:
        box.machine.script_of = lambda spec: Script(ready_after_s=None)
        node = await begun(box, pack(bytes_max=100_000))
        await until(lambda: node.tasks()[0].phase is Phase.STARTED)
        work = output_folder(box.places, RUNNER) / "work"
        work.mkdir()
        (work / "layers").write_bytes(b"x" * 300_000)
        await asyncio.sleep(30.0)  # virtual
        assert node.tasks()[0].phase is Phase.STARTED
        (work / "more").write_bytes(b"x" * 200_000)
        await until(over(node))
        assert f"at most {IMAGE_PACK_WORK_FACTOR * 100_000} are allowed" in told(node).reason
        await node.close()

    play(tmp_path, scenario)


def test_the_packer_counts_files_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_output, "MODEL_FILES_MAX", 1)
    places = Box(tmp_path, LoopClock()).places
    folder = output_folder(places, RUNNER)
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).touch()
    assert not build_output.too_much(places, pack())
    assert "3 files" in build_output.too_much(places, pack(image=""))


def test_clearing_leaves_the_image_alone(tmp_path: Path) -> None:
    for name in ("config.json", "image.squashfs", "image.erofs.new"):
        (tmp_path / name).touch()
    (tmp_path / ".work").mkdir()
    clear_rest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "image.squashfs"]


# --- whether it can ---------------------------------------------------------------------------------------------------

ABLE = Capabilities(
    driver="oci", isolates=True, runtime="runc", user_namespaces=True, idmapped_mounts=True, cgroup="v2", seccomp=True,
    nosymfollow=True, details={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "programs", "host_network", "why"),
    [
        (ABLE, "skopeo umoci mkfs.erofs", True, ""),
        (ABLE, "skopeo umoci mksquashfs", True, ""),
        (ABLE, "umoci mkfs.erofs", True, "skopeo missing"),
        (ABLE, "skopeo", True, "umoci, mkfs.erofs or mksquashfs missing"),
        (ABLE, "skopeo umoci mkfs.erofs", False, "allow_host_network is off"),
        (replace(ABLE, user_namespaces=False), "skopeo umoci mkfs.erofs", True, "no user namespaces"),
        (replace(ABLE, driver="process"), "skopeo umoci mkfs.erofs", True, "keeps nothing apart"),
    ],
)
def test_a_node_says_what_keeps_it_from_packing(
    found: Capabilities, programs: str, host_network: bool, why: str
) -> None:
    names = programs.split()
    said = missing(found, host_network=host_network, which=lambda name: name if name in names else None)
    assert (why in said) if why else not said


def test_proxies_are_passed_on_in_both_spellings() -> None:
    environ = {"HTTPS_PROXY": "a", "no_proxy": "b", "HTTP_PROXY": "", "HOME": "/root", "https_proxy": "c"}
    assert proxies_of(environ) == {"HTTPS_PROXY": "a", "no_proxy": "b", "https_proxy": "c"}
    with pytest.raises(FalError, match="cannot be read"):
        Packer(PYTHON, Path("/none/such")).completed(
            ContainerSpec("a", ("true",), env={"FAL_BUILD_OUTPUT": "/output"}),
            pack(),
            None,  # type: ignore[arg-type]
        )
