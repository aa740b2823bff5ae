"""Pulls from real registries: open, with passwords, with tokens that end, with TLS of a private authority, by a proxy,
slow, moving, refusing, gone."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from etcd_server import free_ports
from fal_contract.errors import Code, FalError
from fal_runtime.images import registry as pulls
from fal_runtime.images.__main__ import main
from fal_runtime.images.layout import read_layout
from fal_runtime.images.pack import PackRequest, PackResult, pack
from fal_runtime.images.registry import RegistryAccess
from image_rig import (
    ImageRegistry,
    NamedProxy,
    SlowRelay,
    TokenServer,
    auth_file,
    entry,
    layer,
    why_no_packing,
    why_no_registry,
    write_layout,
)
from origin_servers import make_authority

_WHY = why_no_packing() or why_no_registry()
pytestmark = pytest.mark.skipif(bool(_WHY), reason=_WHY or "-")
NAME = "team/app:1"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of two layers, one of them 1.2 MB that do not shrink."""
    layers = [layer([entry("bin/sh", b"x", mode=0o755)]), layer({"data": os.urandom(1_200_000)})]
    return write_layout(tmp_path_factory.mktemp("image") / "oci", layers, config={"Cmd": ["sh"]})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[ImageRegistry]:
    """A registry without a password, with the image."""
    with ImageRegistry(tmp_path_factory.mktemp("registry")) as registry:
        registry.push(layout, NAME)
        yield registry


def packed(source: str, output: Path, said: list[str] | None = None, **access: Path) -> PackResult:
    request = PackRequest(source, output, access=RegistryAccess(**access))
    return asyncio.run(pack(request, say=(said if said is not None else []).append))


def refused(source: str, output: Path, code: Code, says: str, **access: Path) -> FalError:
    with pytest.raises(FalError, match=says) as caught:
        packed(source, output, **access)
    assert caught.value.code is code
    assert caught.value.remedy
    assert not list(output.iterdir())
    return caught.value


def test_an_open_registry(tmp_path: Path, plain: ImageRegistry, layout: Path) -> None:
    digest = plain.push(layout, "team/app:other")
    by_tag = packed(plain.source("team/app:other"), tmp_path / "tag")
    assert (by_tag.digest, by_tag.layer_bytes > 1_200_000) == (digest, True)
    assert read_layout(tmp_path / "tag").config.cmd == ("sh",)
    by_digest = packed(plain.source(f"team/app@{digest}"), tmp_path / "digest")
    assert by_digest.digest == digest
    same = [(tmp_path / name / "image.erofs").read_bytes() for name in ("tag", "digest")]
    assert same[0] == same[1]


def test_an_index_of_platforms(tmp_path: Path, plain: ImageRegistry, layout: Path) -> None:
    """The image of the platform is taken, and its digest counts, not the index's."""
    arm = write_layout(tmp_path / "arm", [layer({"arm": b"arm"})], platform="linux/arm64")
    digests = {"linux/arm64": plain.push(arm, "team/multi:arm"), "linux/amd64": plain.push(layout, "team/multi:amd")}
    index = plain.push_index("team/multi", "1", digests)
    assert packed(plain.source("team/multi:1"), tmp_path / "amd").digest == digests["linux/amd64"]
    request = PackRequest(plain.source(f"team/multi@{index}"), tmp_path / "arm-out", platform="linux/arm64")
    assert asyncio.run(pack(request)).digest == digests["linux/arm64"]
    request = PackRequest(plain.source("team/multi:1"), tmp_path / "no", platform="linux/s390x")
    with pytest.raises(FalError, match="only: linux/amd64, linux/arm64"):
        asyncio.run(pack(request))


def test_what_is_not_there(tmp_path: Path, plain: ImageRegistry) -> None:
    for name in ("team/app:none", "team/none:1", f"team/app@sha256:{'0' * 64}"):
        refused(plain.source(name), tmp_path / "out", Code.NOT_FOUND, "does not exist")


def test_passwords(tmp_path: Path, layout: Path) -> None:
    with ImageRegistry(tmp_path / "registry", users={"ann": "hunter22"}) as registry:
        registry.push(layout, NAME)
        good = auth_file(tmp_path / "good", registry.host, "ann", "hunter22")
        assert packed(registry.source(NAME), tmp_path / "out", authfile=good).layer_bytes
        bad = auth_file(tmp_path / "bad", registry.host, "ann", "hunter23")
        other = auth_file(tmp_path / "other", "registry.example", "ann", "hunter22")
        for more in ({}, {"authfile": bad}, {"authfile": other}):
            error = refused(registry.source(NAME), tmp_path / "no", Code.UNAUTHENTICATED, "may not be pulled", **more)
            assert "hunter" not in str(error)
    (tmp_path / "text").write_text("hunter22")
    for wrong in (tmp_path / "text", tmp_path / "none"):
        error = refused(registry.source(NAME), tmp_path / "no", Code.INVALID, "--authfile", authfile=wrong)
        assert "hunter" not in str(error)


def test_credentials_are_never_copied_to_the_disk(tmp_path: Path, layout: Path) -> None:
    """A node's pack task has them in memory only, and may be killed before it cleans up."""
    work, seen = tmp_path / "work", []

    def look(text: str) -> None:
        files = [path for path in work.rglob("*") if path.is_file()]
        seen.append([path.name for path in files if b"registry.example" in path.read_bytes()])

    with ImageRegistry(tmp_path / "registry", users={"ann": "hunter22"}) as registry:
        registry.push(layout, NAME)
        auth = auth_file(tmp_path / "auth", registry.host, "ann", "hunter22")
        table = json.loads(auth.read_text())
        table["auths"]["registry.example"] = {"auth": "YTpi"}  # what is looked for
        auth.write_text(json.dumps(table))
        request = PackRequest(registry.source(NAME), tmp_path / "out", work=work, access=RegistryAccess(authfile=auth))
        asyncio.run(pack(request, say=look))
    assert len(seen) >= 3
    assert not any(seen)


@pytest.mark.slow
def test_tokens_that_end_during_a_long_pull(tmp_path: Path) -> None:
    """2 s each; the pull takes about 4 and makes 14 requests, six at once. What has arrived is kept, and the token
    service is asked again."""
    layout = write_layout(tmp_path / "oci", [layer({f"d{n}": os.urandom(100_000)}) for n in range(13)])
    with (
        TokenServer(tmp_path / "tokens", life_s=2) as tokens,
        ImageRegistry(tmp_path / "registry", tokens=tokens) as registry,
        SlowRelay(registry.port, 350_000) as relay,
    ):
        registry.push(layout, NAME)
        source = registry.source(NAME, host=relay.host)
        auth = auth_file(tmp_path / "auth", relay.host, tokens.USER, tokens.PASSWORD)
        given, said = tokens.given, []
        packed(source, tmp_path / "out", said, authfile=auth)
        assert tokens.given - given >= 3  # to ask, to pull, to go on
        assert any("again in" in line for line in said)
        assert tokens.PASSWORD not in " ".join(said)
        refused(source, tmp_path / "no", Code.UNAUTHENTICATED, "may not be pulled")


def test_a_private_authority(tmp_path: Path, layout: Path) -> None:
    authority = make_authority(tmp_path)
    with ImageRegistry(tmp_path / "registry", tls=authority) as registry:
        registry.push(layout, NAME)
        assert packed(registry.source(NAME), tmp_path / "out", ca_file=authority.ca_file).layer_bytes
        folder = tmp_path / "certificates"
        folder.mkdir()
        (folder / "own.crt").write_bytes(authority.ca_file.read_bytes())
        assert packed(registry.source(NAME), tmp_path / "out2", cert_dir=folder).layer_bytes
        error = refused(registry.source(NAME), tmp_path / "no", Code.UNAUTHENTICATED, "is not trusted")
        assert "--ca-file" in error.remedy
        (tmp_path / "text").write_text("no certificate")
        refused(registry.source(NAME), tmp_path / "no", Code.INVALID, "--ca-file", ca_file=tmp_path / "text")


def test_a_proxy(tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's name is known to the proxy only, which wants a password."""
    authority = make_authority(tmp_path, "registry.test")
    with ImageRegistry(tmp_path / "registry", tls=authority) as registry:
        registry.push(layout, NAME)
        source = registry.source(NAME, host="registry.test")
        with NamedProxy(registry.port, user="bob:hidden88") as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            assert packed(source, tmp_path / "out", ca_file=authority.ca_file).layer_bytes
            assert set(proxy.asked) == {"registry.test:443"}
            monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # the file's wins
            (tmp_path / "proxies").write_text(json.dumps({"HTTPS_PROXY": proxy.url}))
            words = ["pack", source, "--output", str(tmp_path / "by-file"), "--ca-file", str(authority.ca_file)]
            assert main([*words, "--proxy-file", str(tmp_path / "proxies")]) == 0
            (tmp_path / "proxies").write_text("[]")
            assert main([*words, "--proxy-file", str(tmp_path / "proxies")]) == 1
            monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("hidden88", "hidden89"))
            monkeypatch.setattr(pulls, "RETRY_BASE_S", 0.01)
            with pytest.raises(FalError) as caught:
                packed(source, tmp_path / "no", ca_file=authority.ca_file)
            assert "hidden" not in str(caught.value)


def test_a_tag_that_moves_is_pulled_as_it_was(tmp_path: Path, layout: Path) -> None:
    """Another image gets the tag after it was resolved: the first one is packed."""
    with ImageRegistry(tmp_path / "registry") as registry:
        first = registry.push(layout, "team/moving:1")
        other = write_layout(tmp_path / "other", [layer({"other": b"other"})])
        moved: list[str] = []

        def say(text: str) -> None:
            if text.startswith("pulling ") and not moved:
                moved.append(registry.push(other, "team/moving:1"))

        result = asyncio.run(pack(PackRequest(registry.source("team/moving:1"), tmp_path / "out"), say=say))
        assert result.digest == first
        assert moved
        assert moved[0] != first
        assert packed(registry.source("team/moving:1"), tmp_path / "second").digest == moved[0]


def test_a_registry_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "RETRY_BASE_S", 0.01)
    (port,) = free_ports(1)
    error = refused(f"docker://127.0.0.1:{port}/a:1", tmp_path / "out", Code.UNAVAILABLE, "connection refused")
    assert error.retryable


class _Front:
    """An HTTP server before a registry that answers some requests itself."""

    def __init__(self, target: ImageRegistry, answers: list[tuple[int, bytes]], *, path: str) -> None:
        self.refused = 0
        front = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if path in self.path and answers:
                    front.refused += 1
                    status, body = answers.pop(0)
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                else:
                    self.send_response(307)
                    self.send_header("Location", f"http://{target.host}{self.path}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> _Front:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/"])
def test_a_registry_that_fails_now_and_then(
    tmp_path: Path, plain: ImageRegistry, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "RETRY_BASE_S", 0.01)
    said: list[str] = []
    with _Front(plain, [(503, b""), (502, b""), (500, b"")], path=path) as front:
        packed(plain.source(NAME, host=front.host), tmp_path / "out", said)
    assert front.refused == 3
    assert [line for line in said if "again in" in line]


def test_a_registry_that_always_fails_is_given_up(
    tmp_path: Path, plain: ImageRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "RETRY_BASE_S", 0.01)
    with _Front(plain, [(503, b"")] * 100, path="/manifests/") as front:
        refused(plain.source(NAME, host=front.host), tmp_path / "out", Code.UNAVAILABLE, "does not answer")
    assert front.refused == pulls.TRIES_MAX


def test_a_registry_that_lies(tmp_path: Path, plain: ImageRegistry, layout: Path) -> None:
    """Another manifest than the digest names, a layer of other bytes, an index without end."""
    digest = plain.push(layout, "team/app:lies")
    with _Front(plain, [(200, b'{"schemaVersion":2,"layers":[]}')] * 5, path="/manifests/") as front:
        source = plain.source(f"team/app@{digest}", host=front.host)
        refused(source, tmp_path / "out", Code.CORRUPT, "another manifest|digest")
    with _Front(plain, [(200, b"evil" * 100)] * 100, path="/blobs/") as front:
        with pytest.raises(FalError):
            packed(plain.source(NAME, host=front.host), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
    with _Front(plain, [(200, b"[" * (6 << 20))] * 5, path="/manifests/") as front:
        with pytest.raises(FalError):
            packed(plain.source(NAME, host=front.host), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


def test_a_registry_that_falls_silent_is_asked_again(
    tmp_path: Path, plain: ImageRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "RETRY_BASE_S", 0.01)
    monkeypatch.setattr(pulls, "SILENCE_MAX_S", 0.5)
    monkeypatch.setattr(pulls, "TRIES_MAX", 2)
    said: list[str] = []
    with SlowRelay(plain.port, 350_000) as relay:
        source = plain.source(NAME, host=relay.host)

        def say(text: str) -> None:
            said.append(text)
            if text.startswith("pulling "):
                relay.hold()

        with pytest.raises(FalError, match="no byte for") as caught:
            asyncio.run(pack(PackRequest(source, tmp_path / "out"), say=say))
    assert caught.value.code is Code.UNAVAILABLE
    assert [line for line in said if "again in" in line]


def test_what_is_too_large_is_not_fetched(tmp_path: Path, plain: ImageRegistry) -> None:
    said: list[str] = []
    with pytest.raises(FalError, match="the bound is 1000"):
        asyncio.run(pack(PackRequest(plain.source(NAME), tmp_path / "out", bytes_max=1000), say=said.append))
    assert not [line for line in said if line.startswith("pulling")]
