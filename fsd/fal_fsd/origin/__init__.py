"""Where weights come from: an origin is listed once and its ranges are read.

`list_origin` asks what is there (the scheduler, once a model); `open_origin` reads it (fsd, many times). Heavy
libraries (obstore, huggingface_hub, aiohttp) are imported only when the first origin of their kind is used.
"""

from __future__ import annotations

import asyncio
import random

from fal_contract.clock import SystemClock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import ORIGIN_CONNECTIONS_MAX, ORIGIN_LIST_TIMEOUT_S
from fal_fsd.origin.answers import OriginBusy
from fal_fsd.origin.credentials import Credentials
from fal_fsd.origin.listing import PICKLE_SUFFIXES, Listing, check_files_allowed, is_pickle, made_listing
from fal_fsd.origin.reading import Origin, Sink, patiently
from fal_fsd.origin.uri import OriginUri, parse_uri, with_revision


async def list_origin(
    uri: str,
    *,
    revision: str = "",
    credentials: Credentials,
    allow_pickle: bool = False,
    timeout_s: float = ORIGIN_LIST_TIMEOUT_S,
) -> Listing:
    """What is at `uri` now. A moving name is resolved to a commit; large things are not read.

    Raises INVALID naming the field (URI, revision, a file that may not be there), NOT_FOUND, UNAUTHENTICATED,
    PERMISSION_DENIED, CONFLICT, TIMEOUT, and OriginBusy.
    """
    named = with_revision(parse_uri(uri), revision)
    if named.scheme in ("file", "push"):
        raise invalid("uri", uri, "is no origin to ask", remedy="Folders and uploads are read where they are.")
    try:
        async with asyncio.timeout(timeout_s):
            return await _list(named, credentials, allow_pickle, timeout_s)
    except TimeoutError:
        raise FalError(
            Code.TIMEOUT, f"listing {named} takes longer than {timeout_s:g} s", remedy="Try again.", field="uri"
        ) from None


async def _list(uri: OriginUri, credentials: Credentials, allow_pickle: bool, timeout_s: float) -> Listing:
    rng, clock = random.Random(), SystemClock()
    if uri.scheme == "hf":
        from fal_fsd.origin.hub import list_hub

        resolved, files = await patiently(
            lambda: asyncio.to_thread(list_hub, uri, credentials, timeout_s, clock.wall_s()), rng=rng
        )
        return made_listing(str(resolved), resolved.revision, files, allow_pickle=allow_pickle)
    if uri.scheme in ("https", "http"):
        from fal_fsd.origin.web import WebLister

        files = await WebLister(uri, credentials, rng, clock).list()
        return made_listing(str(uri), "", files, allow_pickle=allow_pickle)
    from fal_fsd.origin.stores import list_store, open_store

    store = await asyncio.to_thread(open_store, uri, credentials)
    resolved, files = await patiently(lambda: list_store(uri, store, clock.wall_s()), rng=rng)
    return made_listing(str(resolved), "", files, allow_pickle=allow_pickle)


def open_origin(uri: str, credentials: Credentials, *, connections_max: int = ORIGIN_CONNECTIONS_MAX) -> Origin:
    """Read from a resolved URI (`Listing.uri`). Call it on the event loop that reads. Raises INVALID."""
    named = parse_uri(uri)
    if named.scheme in ("https", "http"):
        from fal_fsd.origin.web import PlainOrigin

        return PlainOrigin(named, credentials, connections_max=connections_max)
    if named.scheme == "hf":
        from fal_fsd.origin.hub import HubOrigin

        if not named.is_commit:
            raise invalid("uri", uri, "names no commit", remedy="Register the model again.")
        return HubOrigin(named, credentials, connections_max=connections_max)
    if named.scheme in ("file", "push"):
        raise invalid("uri", uri, "is no origin to ask", remedy="Folders and uploads are read where they are.")
    from fal_fsd.origin.stores import StoreOrigin

    return StoreOrigin(named, credentials, connections_max=connections_max)


__all__ = [
    "PICKLE_SUFFIXES",
    "Credentials",
    "Listing",
    "Origin",
    "OriginBusy",
    "OriginUri",
    "Sink",
    "check_files_allowed",
    "is_pickle",
    "list_origin",
    "open_origin",
    "parse_uri",
]
