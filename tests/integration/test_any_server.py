"""Servers that are none of ours, as the examples describe them: a port, a health path, an image."""

from __future__ import annotations

import http.client
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from e2e_cluster import POOLS, Cluster, run
from fal_contract.manifest import AppManifest, read_manifest
from fal_contract.v1 import cluster_pb2 as pb
from fal_contract.v1 import state_pb2

EXAMPLES = Path(__file__).parents[2] / "ops" / "examples"
real_parts = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]


def _asked(real: Cluster, app: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", real.http_port, timeout=60)
    try:
        connection.request("GET", f"/v1/run/default/{app}{path}")
        with connection.getresponse() as answer:
            return answer.status, answer.read()
    finally:
        connection.close()


def _apply(real: Cluster, example: str, **changes: Any) -> None:
    keys = tomllib.loads((EXAMPLES / example / "app.toml").read_text()) | changes
    file = real.root / f"{example}.yaml"
    file.write_text(json.dumps(keys))  # JSON is YAML
    done = real.falctl("app", "apply", "-f", str(file), "--detach")
    assert done.returncode == 0, done.stderr
    real.wait_ready(example, 1)


@pytest.mark.parametrize("example", sorted(path.parent.name for path in EXAMPLES.glob("*/app.toml")))
def test_every_example_is_a_good_manifest(example: str) -> None:
    manifest = read_manifest(AppManifest, EXAMPLES / example / "app.toml")
    assert manifest.name == example
    sent = manifest.to_proto()
    assert AppManifest.from_proto(manifest.id, sent).to_proto() == sent


@pytest.mark.parametrize("driver", [pytest.param("oci", marks=real_parts), pytest.param("process", marks=real_parts)])
def test_pythons_own_server(shared_cluster: Cluster, driver: str) -> None:
    _apply(shared_cluster, "http-server", pools=[POOLS[driver]])
    try:
        status, body = _asked(shared_cluster, "http-server", "/")
        assert status == 200
        assert b"Directory listing" in body
        assert _asked(shared_cluster, "http-server", "/no-such-file")[0] == 404
    finally:
        shared_cluster.delete("http-server")


@pytest.mark.root
@pytest.mark.oci
@pytest.mark.slow
@pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs busybox-static")
def test_a_static_binary_in_an_image_that_was_made_here(shared_cluster: Cluster, tmp_path: Path) -> None:
    real = shared_cluster
    run("sh", str(EXAMPLES / "static-binary" / "build.sh"), str(tmp_path / "root"))
    done = real.falctl("image", "add", "static", f"rootfs:{tmp_path / 'root'}", timeout_s=90)
    assert done.returncode == 0, done.stderr
    _apply(real, "static-binary", pools=[POOLS["oci"]])
    try:
        assert _asked(real, "static-binary", "/") == (200, b"<h1>one static binary</h1>\n")
        assert _asked(real, "static-binary", "/none")[0] == 404
    finally:
        real.delete("static-binary")
        real.falctl("image", "rm", "static")


@pytest.mark.root
@pytest.mark.oci
@pytest.mark.slow
def test_the_nodes_network_only_where_the_pool_allows_it(shared_cluster: Cluster) -> None:
    real = shared_cluster
    file = real.manifest("nosy", network="host", min_concurrency=1, num_gpus=0)
    done = real.falctl("app", "apply", "-f", str(file), "--detach")
    assert done.returncode == 0, done.stderr
    try:
        assert "allow_host_network" in done.stderr, "a warning that names what is missing"
        assert "allow_host_network" in json.dumps(real.ask("explanation", "explain", "nosy"))
        _allow(real, allowed=True)
        real.wait_ready("nosy", 1)
        shown = real.falctl("node", "show", "box")
        assert "egress" in shown.stdout, "it can, or it says why not"
    finally:
        real.delete("nosy")
        _allow(real, allowed=False)


def _allow(real: Cluster, *, allowed: bool) -> None:
    pool = state_pb2.Pool(name=POOLS["oci"], cloud="metal", allow_host_network=allowed)
    real.call("ApplyPool", pb.ApplyPoolRequest(pool=pool))


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    script = str(EXAMPLES / "static-binary" / "build.sh")
    done = subprocess.run(["sh", script], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode != 0
    assert "usage: build.sh FOLDER" in done.stderr
