"""Model hubs: hf://ORG/REPO@REVISION, at huggingface.co or any endpoint that speaks like it.

A branch is resolved to its commit once, by the same answer that lists the files. Ranges come from
ENDPOINT/ORG/REPO/resolve/COMMIT/PATH, which redirects to a CDN; a commit's files never change, so no version is
compared, only lengths (and digests, later).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from fal_contract.artifact import ArtifactFile
from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.limits import ORIGIN_CONNECT_TIMEOUT_S
from fal_fsd.origin.answers import check_status, gated, unavailable
from fal_fsd.origin.credentials import Credentials
from fal_fsd.origin.uri import OriginUri
from fal_fsd.origin.web import HttpOrigin
from fal_fsd.origin.web_client import Target, proxy_of, tls_context

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINT: Final = "https://huggingface.co"
# huggingface_hub has one client for the whole process; ours carries this call's proxy and authorities.
_HUB_LOCK: Final = threading.Lock()


def endpoint_of(credentials: Credentials) -> str:
    """Where the hub is, without a final '/'. Raises INVALID."""
    options = credentials.of("hf")
    endpoint = str(options.get("endpoint", ENDPOINT)).rstrip("/")
    parts = urlsplit(endpoint)
    loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not parts.hostname or not (
        parts.scheme == "https" or (parts.scheme == "http" and (loopback or options.get("allow_http")))
    ):
        raise invalid("endpoint", endpoint[:120], "of [hf] is no https:// address", remedy=f"The usual is {ENDPOINT}.")
    return endpoint


class HubOrigin(HttpOrigin):
    """Files of one commit."""

    hub = True
    tells_version = False

    async def _address(self, file: ArtifactFile) -> Target:
        commit = quote(self.uri.revision, safe="")
        where = f"{endpoint_of(self.credentials)}/{self.uri.authority}/resolve/{commit}/"
        token = self.credentials.of("hf").get("token")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return Target(where + quote(self.uri.key_of(file.path)), self.label(file), headers)


def list_hub(
    uri: OriginUri, credentials: Credentials, timeout_s: float, now_s: float
) -> tuple[OriginUri, list[ArtifactFile]]:
    """The URI with its commit, and the files below its folder. Blocks; call it in a thread.

    Raises NOT_FOUND, UNAUTHENTICATED, PERMISSION_DENIED (a gated repository says what to do), INVALID, OriginBusy.
    """
    label = str(uri)
    info = _ask(uri, credentials, label, timeout_s, now_s)
    commit = str(info.sha or "")
    resolved = replace(uri, revision=commit)
    if not resolved.is_commit:
        raise invalid("uri", label, "has no commit that the hub tells", remedy="Check the endpoint.")
    files = {x.path: x for x in _files_of(info)}
    if uri.path in files:
        alone = files[uri.path]
        return resolved, [replace(alone, path=alone.path.rpartition("/")[2])]
    folder = resolved.as_folder() if uri.path else resolved
    below = [
        replace(x, path=x.path.removeprefix(folder.path)) for x in files.values() if x.path.startswith(folder.path)
    ]
    if not below:
        raise not_found("folder", f"{folder.path} of {label}", remedy="Check its name in the repository.")
    return folder, below


def _ask(uri: OriginUri, credentials: Credentials, label: str, timeout_s: float, now_s: float) -> Any:
    import httpx2
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RevisionNotFoundError

    endpoint = endpoint_of(credentials)
    parts = urlsplit(endpoint)
    proxy = proxy_of(parts.scheme, parts.hostname or "", credentials.of("proxy"))
    context = tls_context(str(credentials.of("tls").get("ca_file", "")))
    client = httpx2.Client(
        verify=context, proxy=proxy, trust_env=False, follow_redirects=True, timeout=ORIGIN_CONNECT_TIMEOUT_S
    )
    # token=False: without ours none is sent; the library would look into the home directory.
    api = HfApi(endpoint=endpoint, token=str(credentials.of("hf").get("token", "")) or False)
    with _HUB_LOCK, client:
        set_client_factory(lambda: client)
        try:
            return api.model_info(uri.authority, revision=uri.revision or None, files_metadata=True, timeout=timeout_s)
        except GatedRepoError as exc:
            status = exc.response.status_code if exc.response is not None else 401
            raise gated(label, Code.PERMISSION_DENIED if status == 403 else Code.UNAUTHENTICATED) from None
        except RevisionNotFoundError:
            raise not_found("revision", f"{uri.revision or 'main'} of {label}", remedy="Check --rev.") from None
        except HfHubHTTPError as exc:
            _explain(exc, label, now_s)
            raise
        except HFValidationError:
            raise invalid("uri", label, "is no name of a repository", remedy="Write it as hf://ORG/REPO.") from None
        except httpx2.ConnectError as exc:
            raise _not_reached(exc, label) from None
        except (httpx2.HTTPError, ValueError):
            raise unavailable(label, "does not answer as a hub does") from None
        finally:
            # The next user of the library makes a client of its own.
            set_client_factory(_default_factory())


def _default_factory() -> Any:
    from huggingface_hub.utils import _http

    return _http.default_client_factory


def _not_reached(exc: Exception, label: str) -> FalError:
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return FalError(
            Code.UNAUTHENTICATED,
            f"the server of {label} is not trusted",
            remedy="Name its authority: [tls] ca_file in the credentials file, or SSL_CERT_FILE.",
            field="uri",
        )
    return unavailable(label, "does not answer")


def _explain(exc: Any, label: str, now_s: float) -> None:
    """Raise what the status means. A hub says 401 for a repository that does not exist, too."""
    response = exc.response
    if response is None:
        raise unavailable(label, "does not answer as a hub does") from None
    if response.status_code == 401:
        raise FalError(
            Code.UNAUTHENTICATED,
            f"the hub does not show {label} (401)",
            remedy="Check its name. If it is private or gated, give a token that may read it and has not expired: [hf] "
            "token in the credentials file, or HF_TOKEN.",
            field="uri",
        ) from None
    try:
        check_status(response.status_code, response.headers, label, now_s, hub=True, text="")
    except FalError as error:
        raise error from None


def _files_of(info: Any) -> Iterator[ArtifactFile]:
    """All but git's own. Large files have a published SHA-256; small ones only git's id."""
    for sibling in info.siblings or ():
        name = sibling.rfilename
        if name.split("/")[0].startswith(".git"):
            continue
        sha256 = bytes.fromhex(sibling.lfs.sha256) if sibling.lfs is not None else b""
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        if size is None:
            raise invalid("file", name, "has no length that the hub tells", remedy="Check the endpoint.")
        yield ArtifactFile(name, int(size), sha256.hex() or str(sibling.blob_id or ""), sha256)


__all__ = ["ENDPOINT", "HubOrigin", "endpoint_of", "list_hub"]
