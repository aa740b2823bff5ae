"""The cluster's certificate authority, and the seal that protects its key and other secrets at rest.

The CA is made once, as a folder that appears whole or not at all:

    seal.key         256 random bits, hexadecimal; may be kept elsewhere (another disk, a secret mount)
    ca.pem           the CA's certificate; its subject carries the cluster id
    ca.key.sealed    its private key, sealed with seal.key

A certificate's role and name come from the caller of `issue`, never from the CSR: of that only the public key and
the proof that its private key is held count. Issuing is pure computation (under a millisecond); nothing is recorded
here. Certificates are dated back by 5 minutes, so that a node whose clock is slow can use them at once.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fal_contract.clock import Clock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import (
    Identity,
    PeerIdentity,
    Role,
    ca_cluster_id,
    ca_fingerprint,
    check_cluster_id,
    check_peer_name,
    dns_name_of,
    fsync_folder,
    new_csr,
    new_key,
    uri_of,
    write_durably,
)
from fal_contract.limits import CERTIFICATE_BACKDATE_S, CERTIFICATE_TTL_S, CSR_BYTES_MAX

_CA_LIFE: Final = timedelta(days=3650)
_CA_BACKDATE: Final = timedelta(days=1)
_SEAL_VERSION: Final = b"fals1"
_NONCE_BYTES: Final = 12
_CA_KEY_PURPOSE: Final = "ca-key"
_SECRET_BYTES: Final = 32
_HEX_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SERVERS: Final = frozenset({Role.SCHEDULER, Role.SERVING, Role.NODE})


class Sealer:
    """AES-256-GCM under one key file. Sealed text names its purpose, so that one kind cannot pass for another."""

    def __init__(self, key: bytes, source: str) -> None:
        self._cipher = AESGCM(key)
        self._source = source

    @classmethod
    def load(cls, file: Path) -> Sealer:
        """Read a key file. Raises FAILED_PRECONDITION when it is missing, CORRUPT when it is no key."""
        try:
            text = file.read_text().strip()
        except OSError as exc:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"the seal key {file} cannot be read: {exc.strerror}",
                remedy="Restore it from where it was kept; without it the CA key and all secrets are lost.",
            ) from None
        except UnicodeDecodeError:
            text = ""
        if not _HEX_KEY.fullmatch(text):
            raise FalError(
                Code.CORRUPT, f"{file} is not a seal key (64 hexadecimal digits)", remedy="Restore the right file."
            )
        return cls(bytes.fromhex(text), str(file))

    @staticmethod
    def create(file: Path) -> Sealer:
        """Make a key file of mode 0600 and load it."""
        write_durably(file, secrets.token_hex(32).encode() + b"\n")
        return Sealer.load(file)

    def seal(self, plain: bytes, *, purpose: str) -> bytes:
        """Encrypt and authenticate `plain` for `purpose`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _SEAL_VERSION + nonce + self._cipher.encrypt(nonce, plain, purpose.encode())

    def unseal(self, sealed: bytes, *, purpose: str) -> bytes:
        """The inverse of `seal`. Raises CORRUPT for another key, another purpose or changed bytes."""
        version = sealed[: len(_SEAL_VERSION)]
        nonce = sealed[len(_SEAL_VERSION) : len(_SEAL_VERSION) + _NONCE_BYTES]
        try:
            if version != _SEAL_VERSION or len(nonce) != _NONCE_BYTES:
                raise InvalidTag
            return self._cipher.decrypt(nonce, sealed[len(_SEAL_VERSION) + _NONCE_BYTES :], purpose.encode())
        except InvalidTag:
            raise FalError(
                Code.CORRUPT,
                f"what was sealed as {purpose!r} cannot be opened with {self._source}",
                remedy="Use the key file that this cluster was made with, or restore the sealed data.",
            ) from None


class CertificateAuthority:
    """Issues every certificate of one cluster."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, sealer: Sealer) -> None:
        self._certificate = certificate
        self._key = key
        self.sealer = sealer
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.fingerprint = ca_fingerprint(self.ca_pem)
        self.cluster_id = ca_cluster_id(self.ca_pem)

    @classmethod
    def create(
        cls, folder: Path, *, cluster_id: str, now_s: float, seal_key: Path | None = None
    ) -> CertificateAuthority:
        """Make the CA. `folder` must not exist, or be empty; an existing `seal_key` elsewhere is used."""
        check_cluster_id(cluster_id)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FalError(
                Code.ALREADY_EXISTS,
                f"{folder} exists and is not empty",
                remedy="Open the CA that is there, or name another folder.",
            )
        scratch = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(scratch, ignore_errors=True)  # of a creation that was interrupted
        scratch.mkdir(mode=0o700, parents=True)
        if seal_key is not None and seal_key.exists():
            sealer = Sealer.load(seal_key)
        else:
            sealer = Sealer.create(seal_key or scratch / "seal.key")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key, cluster_id, now_s)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(scratch / "ca.key.sealed", sealer.seal(key_pem, purpose=_CA_KEY_PURPOSE))
        write_durably(scratch / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        os.replace(scratch, folder)
        fsync_folder(folder.parent)
        return cls.open(folder, seal_key=seal_key)

    @classmethod
    def open(cls, folder: Path, *, seal_key: Path | None = None) -> CertificateAuthority:
        """Load the CA. Raises NOT_FOUND, FAILED_PRECONDITION (key file missing) or CORRUPT (wrong key, damage)."""
        try:
            ca_pem, sealed = (folder / "ca.pem").read_bytes(), (folder / "ca.key.sealed").read_bytes()
        except FileNotFoundError as exc:
            raise FalError(
                Code.NOT_FOUND, f"{exc.filename} does not exist", remedy="Restore it, or make a new cluster."
            ) from None
        return cls.from_parts(ca_pem, sealed, Sealer.load(seal_key or folder / "seal.key"))

    @classmethod
    def from_parts(cls, ca_pem: bytes, sealed_key: bytes, sealer: Sealer) -> CertificateAuthority:
        """From bytes that may come from the store, so that standby schedulers need the key file only."""
        key_pem = sealer.unseal(sealed_key, purpose=_CA_KEY_PURPOSE)
        try:
            certificate = x509.load_pem_x509_certificate(ca_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
                raise ValueError
        except ValueError:
            raise FalError(
                Code.CORRUPT,
                "the CA's certificate and key do not belong together",
                remedy="Restore both from one copy.",
            ) from None
        return cls(certificate, key, sealer)

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """What `sign` is checked with (`fal_contract.artifact.signed_by`)."""
        return self._key.public_key()

    def sign(self, text: bytes) -> bytes:
        """ECDSA with SHA-256, DER. `text` must begin with a head of its own kind (`fal_contract.artifact`)."""
        return self._key.sign(text, ec.ECDSA(hashes.SHA256()))

    def issue(
        self,
        csr_pem: bytes,
        *,
        role: Role,
        name: str,
        now_s: float,
        ttl_s: float = CERTIFICATE_TTL_S,
        hosts: Sequence[str] = (),
    ) -> bytes:
        """A certificate (PEM) for the CSR's key. `hosts` are extra DNS names and addresses, for people's tools.

        Raises INVALID for a CSR that is damaged, not signed by its own key, or of another key type than EC P-256.
        """
        check_peer_name(name)
        public_key = check_csr(csr_pem)
        now = datetime.fromtimestamp(now_s, UTC)
        ca = self._certificate
        not_before = max(now - timedelta(seconds=CERTIFICATE_BACKDATE_S), ca.not_valid_before_utc)
        not_after = min(now + timedelta(seconds=ttl_s), ca.not_valid_after_utc)
        if not_after <= not_before:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"the CA is valid {ca.not_valid_before_utc:%F} to {ca.not_valid_after_utc:%F}; here it is {now:%F}",
                remedy="Check this machine's clock (NTP).",
            )
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role in _SERVERS:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(self.cluster_id, unit=str(role), common=name))
            .issuer_name(ca.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(self._names(role, name, hosts), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def derive(self, purpose: str) -> bytes:
        """32 secret bytes for `purpose`, the same on every scheduler that has the CA's key; nothing is stored.

        HKDF-SHA256 (RFC 5869) over the private scalar: who knows a derived secret learns neither the key nor another.
        """
        scalar = self._key.private_numbers().private_value.to_bytes(_SECRET_BYTES, "big")
        info = f"falctl {self.cluster_id} {purpose}".encode()
        return HKDF(algorithm=hashes.SHA256(), length=_SECRET_BYTES, salt=None, info=info).derive(scalar)

    def renew(self, csr_pem: bytes, peer: PeerIdentity, *, revoked: bool, now_s: float) -> bytes:
        """A new certificate for the name and role that the caller already has, never another.

        `peer` is what its current, verified certificate says. Raises UNAUTHENTICATED when it is revoked.
        """
        if revoked:
            raise FalError(
                Code.UNAUTHENTICATED,
                f"{peer.subject} is revoked and gets no new certificate",
                remedy="Join again with a new token, or ask an admin why.",
            )
        return self.issue(csr_pem, role=peer.role, name=peer.name, now_s=now_s)

    def new_identity(
        self, *, role: Role, name: str, now_s: float, ttl_s: float = CERTIFICATE_TTL_S, hosts: Sequence[str] = ()
    ) -> Identity:
        """Key and certificate in one step: for the scheduler itself, and for people's credentials."""
        key_pem = new_key()
        cert_pem = self.issue(new_csr(key_pem, name), role=role, name=name, now_s=now_s, ttl_s=ttl_s, hosts=hosts)
        return Identity(cert_pem=cert_pem, key_pem=key_pem, ca_pem=self.ca_pem)

    def _names(self, role: Role, name: str, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri_of(self.cluster_id, role, name)),
            x509.DNSName(dns_name_of(self.cluster_id, role)),
        ]
        for host in hosts:
            if host.endswith(".fal.internal"):
                raise invalid("hosts", host, "is reserved", remedy="Names under fal.internal are given by role.")
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        return x509.SubjectAlternativeName(names)


class OwnIdentity:
    """The scheduler's own certificate, issued anew at half its life. `current` is cheap and safe from any thread."""

    def __init__(self, ca: CertificateAuthority, *, name: str, hosts: Sequence[str], clock: Clock) -> None:
        self._ca = ca
        self._name = name
        self._hosts = tuple(hosts)
        self._clock = clock
        self._identity = self._issue()

    def current(self) -> Identity:
        """The identity to show now; a new object after each renewal. Also the answer to a clock that jumped."""
        now_s = self._clock.wall_s()
        peer = self._identity.peer
        if not peer.not_before_s <= now_s < (peer.not_before_s + peer.not_after_s) / 2:
            self._identity = self._issue()
        return self._identity

    def _issue(self) -> Identity:
        return self._ca.new_identity(
            role=Role.SCHEDULER, name=self._name, now_s=self._clock.wall_s(), hosts=self._hosts
        )


def _self_signed(key: ec.EllipticCurvePrivateKey, cluster_id: str, now_s: float) -> x509.Certificate:
    now = datetime.fromtimestamp(now_s, UTC)
    subject = _name(cluster_id, unit="ca", common=f"falctl CA of {cluster_id}")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CA_BACKDATE)
        .not_valid_after(now + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(cluster_id: str, *, unit: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster_id),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def check_csr(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose holder proved the private key. Raises INVALID."""
    remedy = "Make the request with a fresh EC P-256 key."
    if len(csr_pem) > CSR_BYTES_MAX:
        raise invalid("csr", f"{len(csr_pem)} bytes", f"is larger than {CSR_BYTES_MAX} bytes", remedy=remedy)
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        proven = csr.is_signature_valid
        key = csr.public_key()
    except (ValueError, InvalidSignature):
        raise invalid("csr", "…", "is not a PEM signing request", remedy=remedy) from None
    if not proven:
        raise invalid("csr", "…", "is not signed by its own key", remedy=remedy)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise invalid("csr", type(key).__name__, "holds a key of another type than EC P-256", remedy=remedy)
    return key
