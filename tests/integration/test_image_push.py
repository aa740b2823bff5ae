"""`falctl image add` of this machine's images, between real processes: packed here, kept by nodes, immutable."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fal_contract.clock import SystemClock
from fal_contract.identity import Role
from fal_contract.v1 import cluster_pb2
from fal_runtime.images.layout import parse_layout
from fal_scheduler.ca import CertificateAuthority
from falctl.main import app
from fsd_rig import tree
from image_rig import entry, layer, why_no_packing, write_layout
from weights_rig import Chain, chain

pytestmark = pytest.mark.skipif(bool(why_no_packing()), reason=why_no_packing() or "-")


def falctl(c: Chain, folder: Path, *arguments: str) -> Result:
    """The command, as operator ada of team t."""
    ca = CertificateAuthority.open(c.scheduler.data / "identity")
    ca.new_identity(role=Role.OPERATOR, name="ada", now_s=SystemClock().wall_s()).save(folder / "ada.pem")
    profile = folder / "ada.toml"
    profile.write_text(f'servers = ["{c.scheduler.address}"]\nidentity = "ada.pem"\nteam = "t"\n')
    return CliRunner().invoke(app, ["--profile", str(profile), *arguments])


@pytest.mark.slow
def test_a_local_image_is_packed_here_and_kept_by_nodes(tmp_path: Path) -> None:
    shell = entry("bin/sh", b"shell" * 100_000, mode=0o755)
    layout = write_layout(tmp_path / "oci", [layer([shell])], config={"Cmd": ["/bin/sh"]})
    other = write_layout(tmp_path / "other", [layer([shell, entry("new", b"new")])])

    async def body() -> None:
        async with asyncio.timeout(120), chain(tmp_path / "cluster", "ab") as c:
            work = tmp_path / "work"
            work.mkdir()

            def add(*arguments: str) -> Result:
                return falctl(c, tmp_path, "image", "add", *arguments, "--work", str(work), "--json")

            done = await asyncio.to_thread(add, "shell", f"oci:{layout}")
            assert done.exit_code == 0, done.output
            assert list(work.iterdir()) == []
            image = json.loads(done.stdout)["image"]
            assert image["id"] == "t/shell"
            view = await c.stub.GetModel(cluster_pb2.GetModelRequest(id="t/shell"), timeout=10)
            model = view.model
            assert (model.kind, model.image.format, model.image.source) == ("image", "erofs", f"oci:{layout}")

            async def kept() -> bool:
                told = (await c.where("shell")).values()
                return any(one.cached.ready for one in told)

            await c.until(kept)
            for node in c.nodes.values():
                folder = node.folder / "state" / "models" / model.manifest_digest
                if folder.exists():
                    files = tree(folder)
                    assert sorted(files) == ["config.json", "image.erofs"]
                    found = parse_layout(files["config.json"], folder)
                    assert (found.digest, found.config.cmd) == (model.image.digest, ("/bin/sh",))
            again = await asyncio.to_thread(add, "shell", f"oci:{layout}")
            assert again.exit_code == 0, again.output
            changed = await asyncio.to_thread(add, "shell", f"oci:{other}")
            assert changed.exit_code == 1
            assert "other content" in str(changed.exception or changed.output)
            bad = await asyncio.to_thread(add, "bad", f"oci:{tmp_path / 'none'}")
            assert bad.exit_code == 1
            assert list(work.iterdir()) == []

    asyncio.run(body())
