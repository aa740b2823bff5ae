"""Who a process is: certificates, roles and names, and what must be true of a peer.

Every certificate of a cluster is issued by its own CA (`fal_scheduler.ca`) and carries exactly one URI
`fal://CLUSTER/ROLE/NAME`, from which role and name are read, nothing else. It also carries the DNS name
`ROLE.CLUSTER.fal.internal`, so that a client can demand a role of a server through ordinary TLS name checking: nodes
and gateways are reached under addresses that no certificate could list (NAT, containers), and a node's
certificate must not pass for the scheduler's.

The chain is always verified by TLS itself; `require` then checks cluster, role and name. Pure but for `save`/`load`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import random_suffix
from fal_contract.limits import CERTIFICATE_BACKDATE_S, CERTIFICATE_SKEW_S

_PEER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_CLUSTER_ID: Final = re.compile(r"c-[0-9a-z]{12}")
_PEM_BLOCK: Final = re.compile(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----", re.DOTALL)


class Role(StrEnum):
    """What a certificate's holder may do. Each RPC names the roles that it serves."""

    VIEWER = "viewer"  # reads
    OPERATOR = "operator"  # reads and changes
    ADMIN = "admin"  # also handles identity and confirms mass stops
    SERVING = "serving"  # a gateway
    NODE = "node"  # agent, proxy and weight cache of one machine
    SCHEDULER = "scheduler"  # the control plane itself; never a caller


READERS: Final = frozenset({Role.VIEWER, Role.OPERATOR, Role.ADMIN})
WRITERS: Final = frozenset({Role.OPERATOR, Role.ADMIN})
ADMINS: Final = frozenset({Role.ADMIN})


def new_cluster_id(rng: Random) -> str:
    """A fresh cluster id, `c-` and 12 characters."""
    return f"c-{random_suffix(rng, 12)}"


def check_cluster_id(value: str) -> str:
    """Return a legal cluster id, else raise INVALID."""
    if not _CLUSTER_ID.fullmatch(value):
        raise invalid("cluster_id", value, "is not a cluster id", remedy="Cluster ids look like c-4f7a20c1d9e8.")
    return value


def check_peer_name(value: str) -> str:
    """Return a legal certificate name (node id or user name), else raise INVALID."""
    if not _PEER_NAME.fullmatch(value):
        raise invalid(
            "name",
            value,
            "cannot stand in a certificate",
            remedy="Use 1 to 63 of letters, digits, '.', '_', '@' and '-', starting with a letter or digit.",
        )
    return value


def uri_of(cluster_id: str, role: Role, name: str) -> str:
    """The URI that a certificate carries."""
    return f"fal://{cluster_id}/{role}/{name}"


def dns_name_of(cluster_id: str, role: Role) -> str:
    """The DNS name that a certificate carries and that clients demand of servers."""
    return f"{role}.{cluster_id}.fal.internal"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What a verified certificate says of its holder. Times are seconds since 1970."""

    role: Role
    name: str
    cluster_id: str
    serial: str  # lower-case hexadecimal
    not_before_s: float
    not_after_s: float

    @property
    def subject(self) -> str:
        """`role/name`, the form of a revocation's subject."""
        return f"{self.role}/{self.name}"

    @property
    def issued_at_s(self) -> float:
        """When it was issued; certificates are dated back against slow clocks."""
        return self.not_before_s + CERTIFICATE_BACKDATE_S

    def __str__(self) -> str:
        return uri_of(self.cluster_id, self.role, self.name)


def peer_of_pem(pem: bytes) -> PeerIdentity:
    """Read a PEM certificate that TLS has verified. Raises FalError(UNAUTHENTICATED) when it is not one of ours."""
    try:
        return _peer_of(x509.load_pem_x509_certificate(pem))
    except ValueError:
        raise _not_ours("is not readable") from None


def peer_of_der(der: bytes) -> PeerIdentity:
    """As `peer_of_pem`, from what `ssl.SSLObject.getpeercert(True)` returns."""
    try:
        return _peer_of(x509.load_der_x509_certificate(der))
    except ValueError:
        raise _not_ours("is not readable") from None


def _peer_of(certificate: x509.Certificate) -> PeerIdentity:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise _not_ours("has no subject alternative name") from None
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("fal://")]
    if len(uris) != 1:
        raise _not_ours(f"carries {len(uris)} fal:// names instead of one")
    cluster_id, _, rest = uris[0].removeprefix("fal://").partition("/")
    role, _, name = rest.partition("/")
    if role not in set(Role) or not _CLUSTER_ID.fullmatch(cluster_id) or not _PEER_NAME.fullmatch(name):
        raise _not_ours(f"carries the name {uris[0][:100]!r}")
    return PeerIdentity(
        role=Role(role),
        name=name,
        cluster_id=cluster_id,
        serial=f"{certificate.serial_number:x}",
        not_before_s=certificate.not_valid_before_utc.timestamp(),
        not_after_s=certificate.not_valid_after_utc.timestamp(),
    )


def _not_ours(why: str) -> FalError:
    return FalError(
        Code.UNAUTHENTICATED,
        f"the peer's certificate {why}",
        remedy="Present a certificate issued by this cluster (join the node, or ask an admin for one).",
    )


def require(
    peer: PeerIdentity, *, cluster_id: str, roles: Collection[Role], name: str | None = None, now_s: float
) -> None:
    """Raise UNAUTHENTICATED (cluster, expiry) or PERMISSION_DENIED (role, name) unless `peer` fits."""
    if peer.cluster_id != cluster_id:
        raise FalError(
            Code.UNAUTHENTICATED,
            f"the certificate of {peer.subject} belongs to cluster {peer.cluster_id}, not {cluster_id}",
            remedy="Use this cluster's address, or join this cluster with a new token.",
        )
    if now_s > peer.not_after_s + CERTIFICATE_SKEW_S:
        raise FalError(
            Code.UNAUTHENTICATED,
            f"the certificate of {peer.subject} expired at {stamp(peer.not_after_s)} (here it is {stamp(now_s)})",
            remedy="Check both clocks; then renew it, or join again with a new token.",
        )
    if peer.role not in roles:
        allowed = ", ".join(sorted(roles)) or "none"
        raise FalError(
            Code.PERMISSION_DENIED,
            f"{peer.subject} may not do this; allowed: {allowed}",
            remedy="Use an identity with one of these roles.",
        )
    if name is not None and peer.name != name:
        raise FalError(
            Code.PERMISSION_DENIED,
            f"the peer is {peer.subject}, expected {name}",
            remedy="The address leads to another machine; check it.",
        )


def stamp(time_s: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC, for messages."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Identity:
    """A process's own certificate and key with the CA that it trusts, all PEM."""

    cert_pem: bytes
    key_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:  # the key must not reach a log
        return f"Identity({self.peer})"

    @property
    def peer(self) -> PeerIdentity:
        """What others see."""
        return peer_of_pem(self.cert_pem)

    def check(self, *, now_s: float) -> None:
        """Raise UNAUTHENTICATED when a peer would refuse it for its dates: before dialling, for a clear error."""
        peer = self.peer
        if now_s >= peer.not_after_s:
            raise FalError(
                Code.UNAUTHENTICATED,
                f"our certificate ({peer.subject}) expired at {stamp(peer.not_after_s)}; here it is {stamp(now_s)}",
                remedy="Check this machine's clock (NTP); if it is right, join again with a new token.",
            )
        if now_s < peer.not_before_s:
            raise FalError(
                Code.UNAUTHENTICATED,
                f"our certificate ({peer.subject}) is valid only from {stamp(peer.not_before_s)};"
                f" here it is {stamp(now_s)}",
                remedy="This machine's clock is behind; set it (NTP).",
            )

    def save(self, file: Path) -> None:
        """Write key, certificate and CA as one PEM file of mode 0600, whole and durable.

        One file, because a renewal changes key and certificate together: a crash between two files would leave
        a node that cannot come back.
        """
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(file, b"".join(part.strip() + b"\n" for part in (self.key_pem, self.cert_pem, self.ca_pem)))

    @classmethod
    def load(cls, file: Path) -> Identity:
        """Read what `save` wrote. Raises NOT_FOUND without one, CORRUPT when it is damaged."""
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise FalError(
                Code.NOT_FOUND, f"there is no identity in {file}", remedy="Join first, with a token."
            ) from None
        except OSError as exc:
            raise FalError(
                Code.CORRUPT, f"identity in {file} cannot be read: {exc.strerror}", remedy="Correct its permissions."
            ) from None
        return cls._of_pem(content, source=str(file))

    @classmethod
    def issued(cls, *, cert_pem: bytes, key_pem: bytes, ca_pem: bytes) -> Identity:
        """From an answer to a CSR; raises CORRUPT unless the certificate is for this key and by this CA."""
        return cls._of_pem(b"\n".join((key_pem, cert_pem, ca_pem)), source="the scheduler's answer")

    @classmethod
    def _of_pem(cls, content: bytes, *, source: str) -> Identity:
        blocks = _PEM_BLOCK.findall(content)
        damaged = FalError(
            Code.CORRUPT,
            f"identity in {source} is damaged: it is not a key, its certificate and a CA",
            remedy="Remove it and join again with a new token.",
        )
        if len(blocks) != 3:
            raise damaged
        identity = cls(key_pem=blocks[0] + b"\n", cert_pem=blocks[1] + b"\n", ca_pem=blocks[2] + b"\n")
        try:
            certificate = x509.load_pem_x509_certificate(identity.cert_pem)
            key = serialization.load_pem_private_key(identity.key_pem, password=None)
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca_pem))
        except (ValueError, TypeError, InvalidSignature):
            raise damaged from None
        if _spki(certificate.public_key()) != _spki(key.public_key()):
            raise damaged
        return identity


def _spki(key: object) -> bytes:
    encode = key.public_bytes  # type: ignore[attr-defined]
    return bytes(encode(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def new_key() -> bytes:
    """A fresh EC P-256 private key, PKCS #8 PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_csr(key_pem: bytes, name: str) -> bytes:
    """A signing request, PEM. Its subject is for people only: the CA takes the public key and nothing else."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise invalid("key", type(key).__name__, "is not an EC key", remedy="Make one with new_key().")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def ca_fingerprint(ca_pem: bytes) -> str:
    """SHA-256 of the CA certificate (DER), lower-case hexadecimal; stands in join tokens."""
    try:
        return x509.load_pem_x509_certificate(ca_pem).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise FalError(
            Code.CORRUPT, "the CA certificate is not PEM", remedy="Check that the address is a scheduler's join port."
        ) from None


def ca_cluster_id(ca_pem: bytes) -> str:
    """The cluster whose CA this is. Raises CORRUPT or INVALID when it is not a CA of ours."""
    try:
        subject = x509.load_pem_x509_certificate(ca_pem).subject
    except ValueError:
        raise FalError(Code.CORRUPT, "the CA certificate is not PEM", remedy="Restore it, or join again.") from None
    names = subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return check_cluster_id(str(names[0].value) if names else "")


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` as a whole: temporary file, fsync, rename, fsync of the folder."""
    scratch = path.with_name(f".{path.name}.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)  # a leftover of a crash may have another mode
        with os.fdopen(fd, "wb", closefd=False) as stream:
            stream.write(content)
        os.fsync(fd)
    finally:
        os.close(fd)
    scratch.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
