"""Secrets for origins: where they come from, and where they never appear."""

from __future__ import annotations

from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_fsd.origin import Credentials
from origin_servers import write_secret

TEXT = """
[s3]
endpoint = "https://store.example"
access_key_id = "general"
secret_access_key = "hunter2"
[s3."special.bucket"]
access_key_id = "special"
allow_http = true
[az.account1]
account_key = "hunter2"
[hf]
token = "hunter2"
[https."example.org:8443"]
headers = { X-Key = "hunter2" }
[tls]
ca_file = "/ca.pem"
"""


def test_a_special_section_wins_over_the_general_one(tmp_path: Path) -> None:
    found = Credentials.load(write_secret(tmp_path / "c.toml", TEXT), {})
    assert found.of("s3", "other")["access_key_id"] == "general"
    assert found.of("s3", "special.bucket") == {
        "endpoint": "https://store.example",
        "access_key_id": "special",
        "secret_access_key": "hunter2",
        "allow_http": True,
    }
    assert found.of("az", "account1", "account1/container") == {"account_key": "hunter2"}
    assert found.of("az", "account2") == {}
    assert found.of("https", "example.org", "example.org:8443") == {"headers": {"X-Key": "hunter2"}}
    assert found.of("https", "example.org", "example.org") == {}
    assert "hunter2" not in repr(found)
    assert "hunter2" not in str(found)


def test_the_environment_gives_what_the_file_does_not(tmp_path: Path) -> None:
    env = {
        "AWS_ACCESS_KEY_ID": "from-env",
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "other",
        "HF_TOKEN": "from-env",
        "HF_ENDPOINT": "https://mirror.example",
        "HTTPS_PROXY": "http://proxy:1",
        "GOOGLE_APPLICATION_CREDENTIALS": "/key.json",
        "SSL_CERT_FILE": "/env.pem",
        "AZURE_STORAGE_SAS_TOKEN": "",
    }
    found = Credentials.load(write_secret(tmp_path / "c.toml", TEXT), env)
    assert found.of("s3", "b")["access_key_id"] == "general"
    assert found.of("s3", "b")["region"] == "eu-west-1"
    assert found.of("hf") == {"token": "hunter2", "endpoint": "https://mirror.example"}
    assert found.of("proxy") == {"https": "http://proxy:1"}
    assert found.of("gs") == {"service_account_file": "/key.json"}
    assert found.of("tls") == {"ca_file": "/ca.pem"}
    assert Credentials.load(None, {}).of("s3") == {}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = write_secret(tmp_path / "c.toml", TEXT)
    file.chmod(mode)
    with pytest.raises(FalError, match="chmod 600") as caught:
        Credentials.load(file, {})
    assert caught.value.code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[s4]\nx = 'hunter2'", "s4"),
        ("[s3]\nacess_key = 'hunter2'", "acess_key"),
        ("[s3.bucket]\nacess_key = 'hunter2'", "s3.bucket.acess_key"),
        ("[s3]\naccess_key_id = 12", "access_key_id"),
        ("[s3]\nallow_http = 'hunter2'", "allow_http"),
        ("[hf.x]\ntoken = 'hunter2'", "hf.x"),
        ("[https.'h']\nheaders = { A = \"hunter2\\n\" }", "headers"),
        ("s3 = 'hunter2'", "s3"),
        ("[s3]\nsecret_access_key = hunter2", "at line 2"),
        ('[s3]\nsecret_access_key = "hunter2\nx', "at line 2"),
    ],
)
def test_a_mistake_is_named_without_its_value(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FalError) as caught:
        Credentials.load(write_secret(tmp_path / "c.toml", text), {})
    assert caught.value.code is Code.INVALID
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FalError, match="No such file"):
        Credentials.load(tmp_path / "none.toml", {})
    with pytest.raises(FalError, match=r"cannot be read|no small file"):
        Credentials.load(tmp_path, {})
