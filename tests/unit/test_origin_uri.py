"""Names of origins: what is taken, what is refused, and that no secret is repeated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.errors import Code, FalError
from fal_fsd.origin import parse_uri
from fal_fsd.origin.uri import OriginUri, with_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("uri", "scheme", "authority", "path", "revision"),
    [
        ("s3://bucket", "s3", "bucket", "", ""),
        ("s3://bucket/a/b", "s3", "bucket", "a/b", ""),
        ("s3://bucket/a/b/", "s3", "bucket", "a/b/", ""),
        ("S3://bucket/ä b", "s3", "bucket", "ä b", ""),
        ("gs://bucket.example/x", "gs", "bucket.example", "x", ""),
        ("az://account1/container/x/", "az", "account1/container", "x/", ""),
        ("hf://org/repo", "hf", "org/repo", "", ""),
        ("hf://org/Repo.v1@main", "hf", "org/Repo.v1", "", "main"),
        (f"hf://org/repo@{COMMIT}/unet/", "hf", "org/repo", "unet/", COMMIT),
        ("hf://org/repo@refs%2Fpr%2F1", "hf", "org/repo", "", "refs/pr/1"),
        ("https://Example.org:8443/a/b?download=true", "https", "example.org:8443", "a/b?download=true", ""),
        ("https://[::1]/a/", "https", "[::1]", "a/", ""),
        ("https://host/", "https", "host", "", ""),
        ("http://127.0.0.1:80/a", "http", "127.0.0.1:80", "a", ""),
        ("file:///srv/models/x", "file", "", "/srv/models/x", ""),
        ("push://upload-1", "push", "upload-1", "", ""),
        ("push://team/name", "push", "team", "name", ""),
    ],
)
def test_parts(uri: str, scheme: str, authority: str, path: str, revision: str) -> None:
    found = parse_uri(uri)
    assert found == OriginUri(scheme, authority, path, revision)
    assert parse_uri(str(found)) == found


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "no scheme"),
        ("bucket/x", "no scheme"),
        ("ftp://host/x", "no scheme"),
        ("s3://", "bucket"),
        ("s3://UPPER/x", "bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket//", "empty part"),
        ("s3://bucket/../x", "'..'"),
        ("s3://bucket/x?versionId=1", "query"),
        ("s3://bucket/x\n", "control"),
        ("az://account1", "container"),
        ("az://acc-ount/container", "account"),
        ("hf://repo", "repository"),
        ("hf://org/repo@", "revision"),
        ("hf://org/repo@a..b", "revision"),
        ("hf://org/repo@main#x", "fragment"),
        ("https://", "host"),
        ("https://host", "no file"),
        ("https://host/?x=1", "no file"),
        ("https://host/a/../b", "'..'"),
        ("https://host/a b", "%XX"),
        ("https://host/a/?x=1", "folder with a query"),
        ("https://ho st/a", "host"),
        ("file://other/srv", "host"),
        ("file://", "absolute"),
        ("file:///a/../b", "'..'"),
        ("push://a/b/c", "upload"),
        ("https://host/" + "a" * 3000, "too long"),
    ],
)
def test_refused_with_a_remedy(uri: str, says: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_uri(uri)
    assert caught.value.code is Code.INVALID
    assert says in caught.value.what
    assert caught.value.remedy
    assert caught.value.field in ("uri", "revision")


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:hunter2@host/a",
        "https://host/a?X-Amz-Signature=hunter2",
        "https://host/a?X-Goog-Credential=hunter2",
        "https://host/a?ok=1&token=hunter2",
        "https://host/a?api_key=hunter2",
        "https://host/a?sig=hunter2",
        "s3://key:hunter2@bucket/x",
        "hf://hunter2@org/repo",
        "nope://u:hunter2@host/x?token=hunter2",
        "https://host/a?X-Amz-Signature=hunter2#" + "a" * 3000,
    ],
)
def test_a_uri_with_a_secret_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(FalError) as caught:
        parse_uri(uri)
    assert "hunter2" not in str(caught.value)


def test_a_resolved_uri_says_whether_it_is_a_folder() -> None:
    assert parse_uri("s3://bucket/x/").key_of("a/b") == "x/a/b"
    assert parse_uri("s3://bucket").key_of("a/b") == "a/b"
    assert parse_uri("s3://bucket/x/one.safetensors").key_of("one.safetensors") == "x/one.safetensors"
    assert parse_uri("s3://bucket/x").as_folder() == parse_uri("s3://bucket/x/")
    assert parse_uri(f"hf://org/repo@{COMMIT}").is_commit
    assert not parse_uri("hf://org/repo@main").is_commit
    assert parse_uri("http://localhost:1/x").is_loopback
    assert not parse_uri("http://127.0.0.1.example.org/x").is_loopback


def test_a_revision_belongs_to_hubs_only() -> None:
    hub = parse_uri("hf://org/repo")
    assert with_revision(hub, "v1").revision == "v1"
    assert with_revision(hub, "") == hub
    assert with_revision(parse_uri("hf://org/repo@v1"), "v1").revision == "v1"
    for uri, revision in (("s3://bucket", "v1"), ("hf://org/repo@v2", "v1"), ("hf://org/repo", "../x")):
        with pytest.raises(FalError, match="revision"):
            with_revision(parse_uri(uri), revision)


@given(
    st.text(max_size=60),
    st.sampled_from(["", "s3://b1", "https://h/", "hf://o/r@", "az://abc/con/", "gs://", "file://"]),
)
def test_any_text_is_taken_or_refused_and_taken_ones_come_back(text: str, head: str) -> None:
    try:
        found = parse_uri(head + text)
    except FalError as error:
        found, code = None, error.code
    assert (parse_uri(str(found)) == found and str(found).isprintable()) if found else code is Code.INVALID
