"""Sources, manifests and what registries complain of: pure, and as hostile as the internet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_runtime.images import manifest as oci
from fal_runtime.images.commands import redact
from fal_runtime.images.filesystem import choose_format, sort_list
from fal_runtime.images.registry import failure
from fal_runtime.images.source import Platform, Source, parse_platform, parse_source

DIGEST = f"sha256:{'ab' * 32}"
AMD64 = Platform("linux", "amd64")
T = TypeVar("T")


def outcome(work: Callable[[], T]) -> T | FalError:
    """What it returns, or the expected failure."""
    try:
        return work()
    except FalError as error:
        return error


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("docker://r.example/a/b:1", ("r.example", "a/b", "1", "")),
        ("docker://r.example:5000/a", ("r.example:5000", "a", "latest", "")),
        ("docker://localhost/a", ("localhost", "a", "latest", "")),
        ("docker://[::1]:5000/a", ("[::1]:5000", "a", "latest", "")),
        (f"docker://r.example/a@{DIGEST}", ("r.example", "a", "latest", DIGEST)),
        (f"docker://r.example/a:1@{DIGEST}", ("r.example", "a", "1", DIGEST)),
        ("docker://ubuntu:22.04", ("docker.io", "library/ubuntu", "22.04", "")),
        ("docker://team/app", ("docker.io", "team/app", "latest", "")),
    ],
)
def test_registry_sources(text: str, source: tuple[str, str, str, str]) -> None:
    found = parse_source(text)
    assert (found.registry, found.repository, found.tag, found.digest) == source
    assert not found.local
    assert found.reference(DIGEST) == f"docker://{source[0]}/{source[1]}@{DIGEST}"


@pytest.mark.parametrize(
    ("text", "path", "tag"),
    [
        ("oci:/a/b", "/a/b", ""),
        ("oci:/a/b:1", "/a/b", "1"),
        ("oci:a:b/c", "a:b/c", ""),
        ("docker-archive:/a.tar", "/a.tar", ""),
        ("rootfs:/", "/", ""),
    ],
)
def test_local_sources(text: str, path: str, tag: str) -> None:
    found = parse_source(text)
    assert (found.path, found.tag, found.local) == (Path(path), tag, True)


@pytest.mark.parametrize(
    "text",
    [
        "", "ubuntu", "http://x/y", "oci:", "rootfs:", "dir:/x", "docker://", "docker:///a", "docker://r.example/A",
        "docker://r.example/a:", "docker://r.example/a:b c", "docker://r.example:99999/a", "docker://r.example/a@sha256:1",
        "docker://r.example/../a", "docker://r.example/a\n", "docker://-r.example/a", "docker://r.example/" + "a" * 300,
        "oci:/a:b c", "docker://r.example/a --help", "x" * 5000,
    ],
)  # fmt: skip
def test_bad_sources_name_the_remedy(text: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_source(text)
    assert (caught.value.code, caught.value.field) == (Code.INVALID, "source")
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["docker://ann:hunter22@r.example/a", "docker://ann@r.example/a"])
def test_credentials_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(FalError, match="credentials") as caught:
        parse_source(text)
    assert "hunter22" not in str(caught.value)


@given(st.text(max_size=60).map(lambda text: f"docker://{text}"))
def test_what_is_taken_is_one_word_for_a_command_line(text: str) -> None:
    found = outcome(lambda: parse_source(text))
    if isinstance(found, FalError):
        assert found.field == "source"
        return
    assert found.reference().startswith("docker://")
    assert not any(char.isspace() or char in "@?#\\'\"$" for char in found.registry + found.repository + found.tag)


def test_platforms() -> None:
    assert str(parse_platform("linux/arm/v7")) == "linux/arm/v7"
    for bad in ("linux", "linux/", "Linux/AMD64", "linux/amd64/v1/x", "a b/c"):
        with pytest.raises(FalError, match="platform"):
            parse_platform(bad)


# --- manifests --------------------------------------------------------------------------------------------------------


def descriptor(
    kind: str = "application/vnd.oci.image.layer.v1.tar+gzip", size: int = 10, **more: Any
) -> dict[str, Any]:
    return {"mediaType": kind, "digest": DIGEST, "size": size, **more}


def manifest(**changes: Any) -> bytes:
    base = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor()],
    }
    return json.dumps({**base, **changes}).encode()


def test_a_manifest_is_read() -> None:
    found = oci.parse_manifest(manifest(layers=[descriptor(size=3), descriptor(size=4)]), bytes_max=100)
    assert (found.layer_bytes, len(found.layers)) == (7, 2)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (manifest(layers=[]), Code.FAILED_PRECONDITION, "empty"),
        (manifest(layers=[descriptor(size=1000)]), Code.FAILED_PRECONDITION, "bound is 100"),
        (manifest(layers=[descriptor()] * 2000), Code.CORRUPT, "layers"),
        (manifest(layers=[descriptor(digest="md5:1")]), Code.CORRUPT, "digest"),
        (manifest(layers=[descriptor(size=-1)]), Code.CORRUPT, "size"),
        (
            manifest(layers=[descriptor("application/vnd.oci.image.layer.v1.tar+xz")]),
            Code.FAILED_PRECONDITION,
            "xz",
        ),
        (manifest(layers=[3]), Code.CORRUPT, "no JSON object"),
        (manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json")), Code.FAILED_PRECONDITION, "helm"),
        (
            manifest(config=descriptor("application/vnd.oci.image.config.v1+json", 1 << 30)),
            Code.FAILED_PRECONDITION,
            "read",
        ),
        (b'{"schemaVersion": 1}', Code.FAILED_PRECONDITION, "no image of today"),
        (b"[" * 50_000, Code.CORRUPT, "no JSON"),
        (b" " * (5 << 20), Code.CORRUPT, "4 MiB"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_it_is_fetched(text: bytes, code: Code, says: str) -> None:
    with pytest.raises(FalError, match=says) as caught:
        oci.parse_manifest(text, bytes_max=100)
    assert caught.value.code is code


def index(*platforms: str) -> tuple[oci.Descriptor, ...]:
    found = []
    for number, text in enumerate(platforms):
        os_, architecture, *variant = text.split("/")
        platform = {"os": os_, "architecture": architecture, "variant": variant[0] if variant else ""}
        kind = "application/vnd.oci.image.manifest.v1+json"
        found.append(descriptor(kind, number, platform=platform))
    return oci.parse_index(json.dumps({"schemaVersion": 2, "manifests": found}).encode())


def test_the_platform_is_chosen_and_others_are_named() -> None:
    found = index("unknown/unknown", "linux/arm64/v8", "linux/amd64", "windows/amd64")
    assert oci.choose(found, AMD64).size_bytes == 2
    assert oci.choose(found, Platform("linux", "arm64")).size_bytes == 1
    with pytest.raises(FalError, match=r"nothing for linux/s390x, only: linux/amd64, linux/arm64/v8, windows/amd64"):
        oci.choose(found, Platform("linux", "s390x"))


def test_tags_of_a_layout() -> None:
    bare = oci.parse_index(
        json.dumps({"manifests": [descriptor(annotations={"org.opencontainers.image.ref.name": "1.0"})]}).encode()
    )
    assert oci.named(bare, "1.0") == bare == oci.named(bare, "")
    with pytest.raises(FalError, match=r"only: 1\.0"):
        oci.named(bare, "2.0")
    with pytest.raises(FalError, match="holds no image"):
        oci.named((), "")


def test_a_configuration_for_another_platform_is_refused() -> None:
    text = json.dumps({"os": "linux", "architecture": "arm64", "config": {"Cmd": ["x"]}}).encode()
    assert oci.config_of(text, Platform("linux", "arm64")) == {"Cmd": ["x"]}
    with pytest.raises(FalError, match="is for linux/arm64, not for linux/amd64"):
        oci.config_of(text, AMD64)
    assert oci.config_of(b"{}", AMD64) == {}


@given(st.binary(max_size=300) | st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text()).map(
    lambda table: json.dumps(table).encode()))  # fmt: skip
def test_any_answer_of_a_registry_is_read_or_refused(text: bytes) -> None:
    for read in (oci.parse_index, oci.is_index, lambda data: oci.parse_manifest(data, bytes_max=1)):
        found = outcome(lambda read=read: read(text))  # type: ignore[misc]
        assert not isinstance(found, FalError) or found.code in (Code.CORRUPT, Code.FAILED_PRECONDITION)


# --- complaints -------------------------------------------------------------------------------------------------------

SOURCE = Source("docker", "docker://r.example/a:1", "r.example", "a", "1")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("reading manifest 1 in r.example/a: manifest unknown: manifest unknown", Code.NOT_FOUND),
        ("unauthorized: authentication required", Code.UNAUTHENTICATED),
        ("denied: requested access to the resource is denied", Code.UNAUTHENTICATED),
        ("x509: certificate signed by unknown authority", Code.UNAUTHENTICATED),
        ("received unexpected HTTP status: 503 Service Unavailable", Code.UNAVAILABLE),
        ("dial tcp: lookup r.example: server misbehaving", Code.UNAVAILABLE),
        ("read: connection reset by peer", Code.UNAVAILABLE),
        ("toomanyrequests: slow down", Code.UNAVAILABLE),
        ("http: server gave HTTP response to HTTPS client", Code.UNAVAILABLE),
        ("something that nobody foresaw", Code.UNAVAILABLE),
    ],
)
def test_complaints_become_errors_with_a_remedy(text: str, code: Code) -> None:
    error = failure(text, f'time="x" level=fatal msg="{text}"', SOURCE)
    assert error.code is code
    assert error.remedy
    assert "level=fatal" not in str(error)


def test_what_programs_say_is_free_of_credentials() -> None:
    said = (
        "Get https://ann:secret@r.example/v2/: proxyconnect http://bob:hidden@proxy:1 "
        "https://s3.example/blob?X-Amz-Signature=abcdef&X=1 Authorization: Bearer abcdefgh.ijk-123 \x1b[31mred\x07"
    )
    clean = redact(said)
    for word in ("secret", "hidden", "abcdef", "ijk-123", "\x1b", "\x07"):
        assert word not in clean
    assert "https://s3.example/blob" in clean


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_access_list_becomes_priorities() -> None:
    assert sort_list("/bin/sh\nlib/a b.so\n\nbin/sh\n") == "bin/sh 32767\nlib/a\\ b.so 32766\n"
    many = sort_list("".join(f"f{number}\n" for number in range(40_000))).splitlines()
    assert (many[0], many[-1]) == ("f0 32767", "f39999 1")
    for bad in ("../etc/passwd", "a\0b"):
        with pytest.raises(FalError, match="line 1"):
            sort_list(bad)


def test_formats() -> None:
    with pytest.raises(FalError, match="is no format"):
        choose_format("ext4", ordered=False)
    with pytest.raises(FalError, match="means nothing to mkfs"):
        choose_format("erofs", ordered=True)
