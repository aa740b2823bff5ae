"""How a machine becomes a node, and stays one: joining with a token, renewing at half life.

Joining trusts nothing but the token: the CA is fetched without verification, its SHA-256 must be the token's, and it
is then the only root for the request that carries the secret. The server must also show the scheduler's own name
under that CA, so that a node of the same cluster cannot pose as it; the address's host name does not matter, which
keeps joining possible behind NAT. The private key never leaves the machine.
"""

from __future__ import annotations

import asyncio
import hmac
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp
from pydantic import ValidationError

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import (
    Identity,
    PeerIdentity,
    Role,
    ca_cluster_id,
    ca_fingerprint,
    dns_name_of,
    new_csr,
    new_key,
    require,
)
from fal_contract.join_token import TokenText, parse_token
from fal_contract.join_wire import CA_PATH, JOIN_PATH, REPLY_BYTES_MAX, JoinReply, JoinRequest, error_of
from fal_contract.limits import CERTIFICATE_BACKDATE_S, JOIN_TIMEOUT_S
from fal_contract.telemetry import get_logger
from fal_contract.tls import pinned_client_context

_RETRY_BASE_S: Final = 5.0
_RETRY_CAP_S: Final = 900.0
_NAP_MAX_S: Final = 60.0  # the wall clock may jump; look at it again this often
_JITTER: Final = 0.1

_log = get_logger("fal.join")


@dataclass(frozen=True, slots=True)
class Joined:
    """The outcome of a join."""

    identity: Identity
    node_id: str
    pool: str
    cluster_id: str


async def join(
    address: str, token_text: str, *, node_name: str, boot_id: str, clock: Clock, timeout_s: float = JOIN_TIMEOUT_S
) -> Joined:
    """Join the cluster whose join listener is at `address` (host:port). Saves nothing.

    Raises INVALID (address, token), UNAUTHENTICATED (token refused, another CA, clocks), UNAVAILABLE or TIMEOUT. The
    request is sent once: when its answer is lost, a use of the token may be spent.
    """
    token = parse_token(token_text)
    base = _base_url(address)
    client_timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=client_timeout, trust_env=False) as session:
        ca_pem = await _fetch_ca(session, base, token)
        cluster_id = ca_cluster_id(ca_pem)
        key_pem = new_key()
        request = JoinRequest(
            token_id=token.id,
            secret=token.secret,
            csr=new_csr(key_pem, node_name).decode(),
            node_name=node_name,
            boot_id=boot_id,
        )
        body = await _exchange(
            session.post(
                f"{base}{JOIN_PATH}",
                data=request.model_dump_json(),
                headers={"Content-Type": "application/json"},
                ssl=pinned_client_context(ca_pem),
                server_hostname=dns_name_of(cluster_id, Role.SCHEDULER),
                allow_redirects=False,
            ),
            base,
        )
    try:
        reply = JoinReply.model_validate_json(body)
    except ValidationError:
        raise FalError(
            Code.VERSION_MISMATCH, f"{base} sent an answer that cannot be read", remedy="Bring both to one release."
        ) from None
    identity = Identity.issued(cert_pem=reply.certificate.encode(), key_pem=key_pem, ca_pem=ca_pem)
    now_s = clock.wall_s()
    _check_clock(identity, scheduler_s=reply.time_s, now_s=now_s)
    require(identity.peer, cluster_id=cluster_id, roles={Role.NODE}, name=reply.node_id, now_s=now_s)
    return Joined(identity=identity, node_id=reply.node_id, pool=reply.pool, cluster_id=cluster_id)


async def _fetch_ca(session: aiohttp.ClientSession, base: str, token: TokenText) -> bytes:
    """The CA as the address tells it, believed because of its hash alone."""
    ca_pem = await _exchange(session.get(f"{base}{CA_PATH}", ssl=False, allow_redirects=False), base)
    if not hmac.compare_digest(ca_fingerprint(ca_pem), token.ca_sha256):
        raise FalError(
            Code.UNAUTHENTICATED,
            f"{base} has another CA than the token names: the token is of another cluster, or somebody stands between",
            remedy="Check the address and the token; the secret was not sent.",
        )
    return ca_pem


async def _exchange(request: Any, base: str) -> bytes:
    """The body of a 200, bounded; everything else as a FalError."""
    try:
        async with request as answer:
            body: bytes = await answer.content.read(REPLY_BYTES_MAX + 1)
            while len(body) <= REPLY_BYTES_MAX and (more := await answer.content.read(REPLY_BYTES_MAX + 1 - len(body))):
                body += more
            if answer.status != 200:
                raise error_of(answer.status, body[:REPLY_BYTES_MAX])
    except aiohttp.ClientConnectorCertificateError as exc:
        raise _untrusted(base, exc.certificate_error) from None
    except aiohttp.ClientSSLError as exc:
        raise FalError(
            Code.UNAVAILABLE, f"{base} does not speak TLS as we do: {exc}", remedy="Check that it is the join port."
        ) from None
    except TimeoutError:
        raise FalError(
            Code.TIMEOUT, f"{base} did not answer in time", remedy="Check the address and the way there; try again."
        ) from None
    except (aiohttp.ClientError, OSError) as exc:
        raise FalError(
            Code.UNAVAILABLE, f"{base} cannot be reached: {exc}", remedy="Check the address; is the scheduler running?"
        ) from None
    if len(body) > REPLY_BYTES_MAX:
        raise FalError(Code.UNAVAILABLE, f"{base} answers too much", remedy="Check that it is the join port.")
    return body


def _untrusted(base: str, error: Exception) -> FalError:
    why = getattr(error, "verify_message", "") or str(error)
    if "expired" in why or "not yet valid" in why:
        what = f"the certificate of {base} is not valid by this machine's clock: {why}"
        return FalError(Code.UNAUTHENTICATED, what, remedy="Check both clocks (NTP), then try again.")
    if not isinstance(error, ssl.SSLCertVerificationError):
        why = "its name is another"
    return FalError(
        Code.UNAUTHENTICATED,
        f"{base} is not the scheduler of the cluster that the token names ({why})",
        remedy="Check the address; the secret was not sent.",
    )


def _check_clock(identity: Identity, *, scheduler_s: float, now_s: float) -> None:
    try:
        identity.check(now_s=now_s)
    except FalError:
        behind_s = scheduler_s - now_s
        direction = "behind" if behind_s > 0 else "ahead of"
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"this machine's clock is {abs(behind_s):.0f} s {direction} the scheduler's, so certificates do not fit",
            remedy="Set the clock (NTP), then join again; a use of the token was spent.",
        ) from None


def _base_url(address: str) -> str:
    host, colon, port = address.removeprefix("https://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise invalid("address", address, "is not host:port", remedy="Give the scheduler's join address, host:port.")
    return f"https://{host}:{port}"


def renewal_due_s(peer: PeerIdentity, rng: Random) -> float:
    """Wall time at which to renew: half of its life, ± 10 % so that a fleet does not come at once."""
    life_s = peer.not_after_s - peer.issued_at_s
    return peer.issued_at_s + life_s * rng.uniform(0.5 - _JITTER, 0.5 + _JITTER)


class Renewer:
    """Keeps an identity fresh. `renew` takes a CSR (PEM) to the scheduler and returns the certificate (PEM).

    A failure is tried again with growing, jittered waits for as long as it takes: an expired certificate hurts
    nothing that runs here. `on_renewed` gets the new identity after it is on disk and re-dials.
    """

    def __init__(
        self,
        *,
        file: Path,
        identity: Identity,
        renew: Callable[[bytes], Awaitable[bytes]],
        on_renewed: Callable[[Identity], None],
        clock: Clock,
        rng: Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._file = file
        self._identity = identity
        self._renew = renew
        self._on_renewed = on_renewed
        self._clock = clock
        self._rng = rng
        self._sleep = sleep

    async def run(self) -> None:
        """Renew until cancelled."""
        failures = 0
        due_s = renewal_due_s(self._identity.peer, self._rng)
        while True:
            # A clock that was set back to before the issue makes it due at once too.
            early = self._clock.wall_s() < self._identity.peer.issued_at_s - CERTIFICATE_BACKDATE_S
            if not early and (left_s := due_s - self._clock.wall_s()) > 0:
                await self._sleep(min(left_s, _NAP_MAX_S))
                continue
            try:
                await self.renew_now()
            except FalError as error:
                wait_s = self._rng.uniform(0.5, 1.0) * min(_RETRY_CAP_S, _RETRY_BASE_S * 2 ** min(failures, 10))
                failures += 1
                _log.warning("renewal_failed", code=str(error.code), message=str(error), retry_in_s=round(wait_s))
                await self._sleep(wait_s)
                continue
            failures = 0
            due_s = renewal_due_s(self._identity.peer, self._rng)

    async def renew_now(self) -> Identity:
        """One renewal with a fresh key. Raises FalError and keeps the old identity."""
        old = self._identity
        key_pem = new_key()
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                cert_pem = await self._renew(new_csr(key_pem, old.peer.name))
        except TimeoutError:
            raise FalError(Code.TIMEOUT, "certificate renewal took too long", remedy="It is tried again.") from None
        fresh = Identity.issued(cert_pem=cert_pem, key_pem=key_pem, ca_pem=old.ca_pem)
        require(
            fresh.peer,
            cluster_id=old.peer.cluster_id,
            roles={old.peer.role},
            name=old.peer.name,
            now_s=self._clock.wall_s(),
        )
        fresh.save(self._file)
        self._identity = fresh
        self._on_renewed(fresh)
        return fresh
