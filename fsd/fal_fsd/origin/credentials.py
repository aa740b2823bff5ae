"""Secrets for origins: read from a TOML file that only its owner can read, or from the usual environment variables.

    [s3]                     for all buckets: endpoint, region, access_key_id, secret_access_key, session_token
    [s3."my-bucket"]         for one; its keys win over those above. allow_http, anonymous = true where needed
    [gs]                     service_account_file, service_account_key (its JSON), token, endpoint
    [az]  [az."account"]     account_key, sas_token, token, endpoint
    [hf]                     token, endpoint
    [https."example.org"]    bearer, or user and password, or headers = { X-Key = "…" }; host or host:port
    [tls]                    ca_file: more authorities that are trusted
    [proxy]                  https, http: URLs; no_proxy: hosts, domains and networks, divided by commas

The file wins over the environment. A secret is never in a repr, an error, a log line or a command line.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import ORIGIN_CREDENTIALS_BYTES_MAX

Options = dict[str, Any]

_FLAGS: Final = ("allow_http", "anonymous")
_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "s3": ("endpoint", "region", "access_key_id", "secret_access_key", "session_token", *_FLAGS),
    "gs": ("endpoint", "service_account_file", "service_account_key", "token", *_FLAGS),
    "az": ("endpoint", "account_key", "sas_token", "token", *_FLAGS),
    "hf": ("token", "endpoint", "allow_http"),
    "https": ("bearer", "user", "password", "headers", "allow_http"),
    "tls": ("ca_file",),
    "proxy": ("https", "http", "no_proxy"),
}
_NAMED: Final = ("s3", "gs", "az", "https")  # may have sections of one bucket, account or host
_ENVIRONMENT: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "s3": {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "access_key_id": ("AWS_ACCESS_KEY_ID",),
        "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
        "session_token": ("AWS_SESSION_TOKEN",),
    },
    "gs": {"service_account_file": ("GOOGLE_APPLICATION_CREDENTIALS",)},
    "az": {
        "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"),
        "sas_token": ("AZURE_STORAGE_SAS_TOKEN",),
        "token": ("AZURE_STORAGE_TOKEN",),
    },
    "hf": {"token": ("HF_TOKEN",), "endpoint": ("HF_ENDPOINT",)},
    "tls": {"ca_file": ("SSL_CERT_FILE",)},
    "proxy": {
        "https": ("HTTPS_PROXY", "https_proxy"),
        "http": ("HTTP_PROXY", "http_proxy"),
        "no_proxy": ("NO_PROXY", "no_proxy"),
    },
}


@dataclass(frozen=True)
class Credentials:
    """What is known, by scheme and by bucket or host. Its repr shows no value."""

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, file: Path | None, env: Mapping[str, str]) -> Credentials:
        """Both sources put together. Blocks on the disk.

        Raises INVALID for a file that is not there or a key that is not known, FAILED_PRECONDITION for one that others
        may read.
        """
        sections: dict[str, dict[str, Any]] = {}
        for scheme, names in _ENVIRONMENT.items():
            found = {key: env[name] for key, tried in names.items() for name in reversed(tried) if env.get(name)}
            if found:
                sections[scheme] = found
        if file is not None:
            for scheme, section in _read(file).items():
                sections[scheme] = {**sections.get(scheme, {}), **section}
        return cls(sections)

    def of(self, scheme: str, *names: str) -> Options:
        """Keys for `scheme`; those of each of `names` (bucket, account, host, the most special last) win."""
        section = self.sections.get(scheme, {})
        found = {key: value for key, value in section.items() if key in _KEYS[scheme]}
        for name in names:
            found.update(section.get(name, {}) if scheme in _NAMED and name not in _KEYS[scheme] else {})
        return found


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > ORIGIN_CREDENTIALS_BYTES_MAX:
                raise invalid("credentials_file", str(file), "is no small file", remedy="Name the TOML file.")
            if facts.st_mode & 0o077:
                raise FalError(
                    Code.FAILED_PRECONDITION,
                    f"credentials_file {str(file)!r} can be read by others (mode {facts.st_mode & 0o777:04o})",
                    remedy=f"Run chmod 600 {file}.",
                    field="credentials_file",
                )
            told = tomllib.loads(opened.read().decode())
    except OSError as exc:
        raise invalid("credentials_file", str(file), f"cannot be read: {exc.strerror}", remedy="Correct it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        # Its text may quote a line of the file; only the place is told.
        place = str(exc).rpartition("(")[2].rstrip(")") if isinstance(exc, tomllib.TOMLDecodeError) else "not UTF-8"
        raise invalid("credentials_file", str(file), f"is no TOML: {place}", remedy="Correct it.") from None
    for scheme, section in told.items():
        _check_section(scheme, section)
    return told


def _check_section(scheme: str, section: object) -> None:
    if scheme not in _KEYS or not isinstance(section, dict):
        raise invalid("credentials", scheme, "is no section", remedy=f"Use one of {', '.join(_KEYS)}.")
    for key, value in section.items():
        if key in _KEYS[scheme]:
            _check_value(scheme, key, value)
        elif scheme in _NAMED and isinstance(value, dict):
            for inner, told in value.items():
                if inner not in _KEYS[scheme]:
                    raise _unknown(f"{scheme}.{key}", inner, scheme)
                _check_value(f"{scheme}.{key}", inner, told)
        else:
            raise _unknown(scheme, key, scheme)


def _check_value(section: str, key: str, value: object) -> None:
    if key in _FLAGS:
        good = isinstance(value, bool)
    elif key == "headers":
        good = isinstance(value, dict) and all(isinstance(x, str) and x.isprintable() for x in value.values())
    else:
        good = isinstance(value, str) and (key == "service_account_key" or value.isprintable())
    if not good:
        raise invalid(
            "credentials", f"{section}.{key}", "has a value of another kind", remedy="Give a text (a flag: true)."
        )


def _unknown(section: str, key: str, scheme: str) -> FalError:
    return invalid("credentials", f"{section}.{key}", "is no key", remedy=f"Use one of {', '.join(_KEYS[scheme])}.")


__all__ = ["Credentials", "Options"]
