"""The name under which a cache tells the measured rate of an origin, and the scheduler looks it up. Pure."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

_HOSTS: Final = {"hf": "hf", "file": "file"}


def origin_source(uri: str) -> str:
    """`LinkRate.source` of a model's (resolved) URI: "origin:" and host or bucket; one name for all of a hub.

    >>> origin_source("s3://models/flux/1"), origin_source("hf://org/repo@abc"), origin_source("file:///srv/m")
    ('origin:models', 'origin:hf', 'origin:file')
    """
    parts = urlsplit(uri)
    return f"origin:{_HOSTS.get(parts.scheme) or parts.netloc.rpartition('@')[2].lower() or parts.scheme}"


__all__ = ["origin_source"]
