"""What an origin's answers mean."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError
from fal_fsd.origin import PICKLE_SUFFIXES, check_files_allowed
from fal_fsd.origin.answers import (
    OriginBusy,
    Wanted,
    canonical_tag,
    check_body,
    check_status,
    condition_of,
    retry_after_s,
    size_of,
    version_of,
)
from fal_fsd.origin.listing import made_listing
from fal_fsd.origin.uri import parse_uri
from fal_fsd.origin.web import own_name, parse_list
from fal_fsd.origin.web_client import proxy_of

NOW_S = 1_800_000_000.0
WANTED = Wanted("x", 100, 50, 1000, '"tag"')
GOOD = {"Content-Range": "bytes 100-149/1000", "Content-Length": "50", "ETag": '"tag"'}


def test_a_good_range_is_taken_whatever_its_status_says() -> None:
    assert check_body(206, GOOD, WANTED) == 0
    assert check_body(200, GOOD, WANTED) == 0
    assert check_body(206, {k: v for k, v in GOOD.items() if k != "Content-Length"}, WANTED) == 0
    assert check_body(206, {**GOOD, "Content-Range": "bytes 100-149/*"}, WANTED) == 0


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"ETag": '"other"'}, Code.CONFLICT),
        ({"ETag": 'W/"tag"'}, Code.CONFLICT),
        ({"ETag": ""}, Code.CONFLICT),
        ({"Content-Range": "bytes 100-149/1001"}, Code.CONFLICT),
        ({"Content-Range": "bytes 101-150/1000"}, Code.CONFLICT),
        ({"Content-Range": "bytes 100-148/1000"}, Code.CONFLICT),
        ({"Content-Range": "nonsense"}, Code.CONFLICT),
        ({"Content-Range": ""}, Code.CONFLICT),
        ({"Content-Length": "51"}, Code.CORRUPT),
        ({"Content-Length": "49"}, Code.CONFLICT),
        ({"Content-Encoding": "gzip"}, Code.INVALID),
    ],
)
def test_a_range_of_something_else_is_refused(headers: dict[str, str], code: Code) -> None:
    with pytest.raises(FalError) as caught:
        check_body(206, GOOD | headers, WANTED)
    assert caught.value.code is code


def test_a_whole_file_in_place_of_a_range() -> None:
    assert check_body(200, {"Content-Length": "1000", "ETag": '"tag"'}, WANTED) == 100
    assert check_body(200, {"ETag": '"tag"'}, WANTED) == 100
    with pytest.raises(FalError, match="999 bytes") as caught:
        check_body(200, {"Content-Length": "999", "ETag": '"tag"'}, WANTED)
    assert caught.value.code is Code.CONFLICT


@pytest.mark.parametrize(
    ("status", "headers", "text", "hub", "code", "says"),
    [
        (401, {}, "", False, Code.UNAUTHENTICATED, "credentials file"),
        (403, {}, "<Code>SignatureDoesNotMatch</Code>", False, Code.PERMISSION_DENIED, "SignatureDoesNotMatch"),
        (400, {}, "<Code>ExpiredToken</Code>", False, Code.UNAUTHENTICATED, "ExpiredToken"),
        (403, {}, "<Code>RequestTimeTooSkewed</Code>", False, Code.UNAUTHENTICATED, "RequestTimeTooSkewed"),
        (401, {}, "", True, Code.UNAUTHENTICATED, "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "", True, Code.PERMISSION_DENIED, "Accept its licence"),
        (401, {"X-Error-Code": "GatedRepo"}, "", True, Code.UNAUTHENTICATED, "expired"),
        (407, {}, "", False, Code.UNAUTHENTICATED, "proxy"),
        (404, {}, "<Code>NoSuchBucket</Code>", False, Code.NOT_FOUND, "NoSuchBucket"),
        (410, {}, "", False, Code.NOT_FOUND, "410"),
        (412, {}, "", False, Code.CONFLICT, "changed"),
        (416, {}, "", False, Code.CONFLICT, "changed"),
        (429, {}, "", False, Code.BUSY, "429"),
        (503, {}, "<Code>SlowDown</Code>", False, Code.UNAVAILABLE, "SlowDown"),
        (500, {}, "", False, Code.UNAVAILABLE, "500"),
        (408, {}, "", False, Code.UNAVAILABLE, "408"),
        (418, {}, "", False, Code.INVALID, "418"),
        (301, {}, "<Code>PermanentRedirect</Code>", False, Code.INVALID, "PermanentRedirect"),
    ],
)
def test_a_status_is_one_error(
    status: int, headers: dict[str, str], text: str, hub: bool, code: Code, says: str
) -> None:
    with pytest.raises(FalError) as caught:
        check_status(status, headers, "s3://b/x", NOW_S, hub=hub, text=text)
    assert caught.value.code is code
    assert says in str(caught.value)
    assert caught.value.remedy


def test_patience_is_told() -> None:
    with pytest.raises(OriginBusy) as caught:
        check_status(429, {"Retry-After": "7"}, "x", NOW_S, hub=False, text="")
    assert caught.value.retry_s == 7.0
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("", 0.0),
        ("12", 12.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", 0.0),
        ("99999", 300.0),
        ("9" * 30, 0.0),
        ("1e3", 0.0),
    ],
)
def test_retry_after_in_seconds(value: str, seconds: float) -> None:
    assert retry_after_s(value, NOW_S) == seconds


def test_retry_after_as_a_date() -> None:
    assert retry_after_s(formatdate(NOW_S + 20, usegmt=True), NOW_S) == 20.0
    assert retry_after_s(formatdate(NOW_S - 20, usegmt=True), NOW_S) == 0.0
    assert retry_after_s(formatdate(NOW_S + 1e6, usegmt=True), NOW_S) == 300.0
    assert retry_after_s("Mon, 99 Foo 2026 00:00:00 GMT", NOW_S) == 0.0


@given(st.text(max_size=40))
def test_retry_after_never_fails(value: str) -> None:
    assert 0.0 <= retry_after_s(value, NOW_S) <= 300.0


def test_versions() -> None:
    assert version_of({"ETag": '"a"', "Last-Modified": "x"}) == '"a"'
    assert version_of({"ETag": "a"}) == '"a"'
    assert version_of({"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}) == "modified:Thu, 01 Jan 2026 00:00:00 GMT"
    assert version_of({}) == ""
    assert canonical_tag('W/"a"') == 'W/"a"'
    assert condition_of('"a"') == {"If-Match": '"a"'}
    assert condition_of('W/"a"') == {}
    assert condition_of("modified:D") == {"If-Unmodified-Since": "D"}
    dated = Wanted("x", 0, 10, 10, "modified:D")
    assert check_body(206, {"Content-Range": "bytes 0-9/10", "Last-Modified": "D"}, dated) == 0
    with pytest.raises(FalError, match="another version"):
        check_body(206, {"Content-Range": "bytes 0-9/10", "Last-Modified": "E"}, dated)


def test_sizes() -> None:
    assert size_of(206, {"Content-Range": "bytes 0-0/77", "Content-Length": "1"}) == 77
    assert size_of(206, {"Content-Range": "bytes 0-0/*", "Content-Length": "1"}) is None
    assert size_of(200, {"Content-Length": "77"}) == 77
    assert size_of(200, {}) is None
    assert size_of(206, {"Content-Length": "1"}) is None


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_pickles_are_refused_by_name(suffix: str) -> None:
    file = ArtifactFile(f"unet/model{suffix.upper()}", 1, '"a"')
    with pytest.raises(FalError, match="pickle") as caught:
        check_files_allowed([ArtifactFile("a.json", 1), file], False)
    assert file.path in caught.value.what
    check_files_allowed([file], True)


def test_a_listing_is_in_order_and_checked() -> None:
    files = [ArtifactFile("b", 1, '"b"'), ArtifactFile("a", 1, '"a"')]
    assert [x.path for x in made_listing("s3://b/", "", files, allow_pickle=False).files] == ["a", "b"]
    for wrong in ([], [ArtifactFile("../a", 1)], [*files, ArtifactFile("a", 2)], [*files, ArtifactFile("a/b", 1)]):
        with pytest.raises(FalError) as caught:
            made_listing("s3://b/", "", wrong, allow_pickle=False)
        assert caught.value.code is Code.INVALID


def test_lists_of_files() -> None:
    digest = "ab" * 32
    told = parse_list(
        b'{"files": [{"path": "a"}, {"path": "b/c", "size_bytes": 3, "sha256": "%s"}]}' % digest.encode(), "x"
    )
    assert told == [("a", None, b""), ("b/c", 3, bytes.fromhex(digest))]
    files = (
        "1",
        "[1]",
        '[{"path": "../x"}]',
        '[{"path": "a", "size_bytes": -1}]',
        '[{"path": "a", "size_bytes": true}]',
    )
    digests = ('[{"path": "a", "sha256": "abcd"}]', '[{"path": "a", "sha256": 1}]')
    for wrong in (b"", b"[]", *(f'{{"files": {x}}}'.encode() for x in files + digests)):
        with pytest.raises(FalError) as caught:
            parse_list(wrong, "https://h/x/")
        assert caught.value.code is Code.INVALID


def test_the_name_of_a_single_file() -> None:
    uri = parse_uri("https://host/api/download/1%2F2?type=Model")
    assert own_name(uri, "") == "2"
    assert own_name(uri, 'attachment; filename="../../etc/model.safetensors"') == "model.safetensors"


@pytest.mark.parametrize(
    ("host", "excluded", "proxied"),
    [
        ("example.org", "", True),
        ("example.org", "example.org", False),
        ("a.example.org", ".example.org", False),
        ("a.example.org", "*.example.org", False),
        ("badexample.org", "example.org", True),
        ("10.1.2.3", "10.0.0.0/8", False),
        ("11.1.2.3", "10.0.0.0/8,other", True),
        ("anything", "*", False),
        ("example.org", " , ,", True),
    ],
)
def test_who_is_reached_through_the_proxy(host: str, excluded: str, proxied: bool) -> None:
    found = proxy_of("https", host, {"https": "proxy.example:3128", "no_proxy": excluded})
    assert found == ("http://proxy.example:3128" if proxied else None)
    assert proxy_of("http", host, {"https": "proxy.example:3128"}) is None
