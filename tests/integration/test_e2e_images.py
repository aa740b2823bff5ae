"""Images end to end: a registry, `falctl image add`, an app that serves out of the image, the registry gone."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e_cluster import POOLS, STRANGERS, Cluster, cluster, until
from image_rig import ImageRegistry, layer, why_no_packing, why_no_registry, write_layout

pytestmark = [
    pytest.mark.root,
    pytest.mark.oci,
    pytest.mark.slow,
    pytest.mark.timeout(150),
    pytest.mark.skipif(bool(why_no_registry() or why_no_packing()), reason=why_no_registry() or why_no_packing()),
]
BUSYBOX = Path("/bin/busybox")
PORT = 8080
NODES = {"a": POOLS["oci"], "b": STRANGERS}


def server_image(folder: Path) -> Path:
    """A static web server and two pages."""
    files = {
        "bin/busybox": BUSYBOX.read_bytes(),
        "www/readyz": b"ok",
        "www/livez": b"ok",
        "www/page": b"from the image",
    }
    command = ["/bin/busybox", "httpd", "-f", "-p", f"127.0.0.1:{PORT}", "-h", "/www"]
    return write_layout(folder, [layer(files)], config={"Cmd": command})


def page(real: Cluster, app: str) -> tuple[int, bytes]:
    """One request through the gateway."""
    connection = http.client.HTTPConnection("127.0.0.1", real.http_port, timeout=60)
    try:
        connection.request("GET", f"/v1/run/default/{app}/page")
        with connection.getresponse() as answer:
            return answer.status, answer.read()
    finally:
        connection.close()


def serve(real: Cluster, app: str, pool: str) -> None:
    """An app of the image in one pool, until it answers."""
    table = {
        "name": app, "image": "web", "port": PORT, "num_gpus": 0, "min_concurrency": 1, "max_concurrency": 1,
        "termination_grace_period": 1, "resources": {"cpu": 0.2, "memory_gib": 0.25}, "pools": [pool],
    }  # fmt: skip
    file = real.root / f"{app}.yaml"
    file.write_text(json.dumps(table))
    done = real.falctl("app", "apply", "-f", str(file), "--detach")
    assert done.returncode == 0, done.stderr
    real.wait_ready(app, 1)
    assert page(real, app) == (200, b"from the image")


@contextmanager
def two_nodes(root: Path) -> Iterator[Cluster]:
    """A cluster of its own with two machines, which come up at the same time."""
    with cluster(root) as real:
        for name, pool in NODES.items():
            real.make_node(name, real.token(pool=pool)).process.start()
        for name in NODES:
            real.wait_node(name, "ready")
        yield real


@pytest.mark.skipif(not BUSYBOX.exists(), reason="not installed: busybox-static")
def test_an_image_outlives_its_registry_and_serves_on_every_node(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Sockets lie below the state directories, so their folder has a short name.
    with two_nodes(tmp_path_factory.mktemp("i")) as real:
        with ImageRegistry(tmp_path / "registry") as registry:
            registry.push(server_image(tmp_path / "layout"), "team/web:1")
            missing = real.falctl("image", "add", "none", registry.source("team/none:1"))
            done = real.falctl("image", "add", "web", registry.source("team/web:1"), "--pool", NODES["a"])
        assert missing.returncode == 1
        assert "does not exist" in missing.stderr
        assert done.returncode == 0, done.stderr
        a, b = (real.node(name).node.id for name in NODES)
        packed = real.ask("image", "image", "show", "web")
        assert packed["model"]["image"]["digest"].startswith("sha256:")
        assert packed["model"]["attested_by"] == a

        serve(real, "first", NODES["a"])
        serve(real, "second", NODES["b"])  # its node never spoke with the registry
        rows = {row["node_id"]: row["cached"] for row in real.ask("where", "image", "where", "web")["nodes"]}
        assert rows[b]["bytes_from_peers"] > 0
        assert rows[b]["bytes_from_origin"] == rows[a]["bytes_from_origin"] == 0
        used = real.falctl("image", "rm", "web")
        assert used.returncode == 1
        assert "default/first, default/second" in used.stderr
        until(
            lambda: real.ask("image", "image", "show", "web")["model"]["image"]["first_pieces"], "a start was recorded"
        )
        for app in ("first", "second"):
            real.delete(app)
        until(lambda: real.falctl("image", "rm", "web").returncode == 0, "nothing uses it any more")
