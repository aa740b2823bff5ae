"""Who signed what: certificates of signers, checked against the cluster's CA once, and claims checked against them.

Thread-safe and bounded. A claim stays good after its signer's certificate has expired: it was signed while that was
valid, and what it says of a piece does not age; so only chain, cluster and role are looked at. Without a CA (a node
that belongs to no cluster) nothing can be checked: claims are ignored, and pieces need none.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fal_contract.artifact import claim_text, signed_by
from fal_contract.errors import FalError
from fal_contract.identity import Role, ca_cluster_id, peer_of_der
from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Claim
from fal_fsd.peers.shared import SharedPart

SIGNERS_MAX: Final = 4096
CERTS_PER_SIGNER_MAX: Final = 4  # a renewal brings a new key; claims of the old one are about for a while
CHECKED_MAX: Final = 1 << 16
ODD_MAX: Final = 4096


class BadClaim(Exception):
    """A certificate or claim that nobody of this cluster made: its sender lies."""


class Signers:
    """See the module's docstring."""

    def __init__(self, ca_pem: bytes | None) -> None:
        self._ca = x509.load_pem_x509_certificate(ca_pem) if ca_pem else None
        self._cluster_id = ca_cluster_id(ca_pem) if ca_pem else ""
        self._lock = threading.Lock()
        self._known: OrderedDict[str, OrderedDict[bytes, ec.EllipticCurvePublicKey]] = OrderedDict()
        self._good: OrderedDict[bytes, None] = OrderedDict()

    @property
    def checks(self) -> bool:
        """Whether there is a CA."""
        return self._ca is not None

    def add_pem(self, certificate_pem: bytes) -> None:
        """Our own."""
        self.add(x509.load_pem_x509_certificate(certificate_pem).public_bytes(Encoding.DER))

    def add(self, der: bytes) -> str:
        """Take in a certificate; the signer's node id. Raises BadClaim."""
        if self._ca is None:
            return ""
        try:
            certificate = x509.load_der_x509_certificate(der)
            certificate.verify_directly_issued_by(self._ca)
            peer = peer_of_der(der)
            key = certificate.public_key()
        except (ValueError, TypeError, InvalidSignature, FalError):
            raise BadClaim("a signer's certificate is not of this cluster") from None
        if (
            peer.role is not Role.NODE
            or peer.cluster_id != self._cluster_id
            or not isinstance(key, ec.EllipticCurvePublicKey)
        ):
            raise BadClaim(f"{peer.subject} may not sign pieces")
        with self._lock:
            certs = self._known.setdefault(peer.name, OrderedDict())
            certs[der] = key
            while len(certs) > CERTS_PER_SIGNER_MAX:
                certs.popitem(last=False)
            self._known.move_to_end(peer.name)
            while len(self._known) > SIGNERS_MAX:
                self._known.popitem(last=False)
        return peer.name

    def certs_of(self, signer: str) -> list[bytes]:
        """What others need to check this signer's claims, DER."""
        with self._lock:
            return list(self._known.get(signer, ()))

    def check(self, artifact_id: str, claim: Claim) -> None:
        """Raise BadClaim unless the signer made it."""
        text = claim_text(artifact_id, claim.piece, claim.digest)
        mark = hashlib.blake2b(text + claim.signer.encode() + b"\n" + claim.signature, digest_size=16).digest()
        with self._lock:
            if mark in self._good:
                return
            keys = list(self._known.get(claim.signer, {}).values())
        if not any(signed_by(key, claim.signature, text) for key in reversed(keys)):
            raise BadClaim(f"the claim on piece {claim.piece} is not signed by {claim.signer or 'anybody'}")
        with self._lock:
            self._good[mark] = None
            while len(self._good) > CHECKED_MAX:
                self._good.popitem(last=False)


class Claimed:
    """What one peer has claimed of one artifact's pieces: the digests that its bytes must have.

    `common`: what all peers say, shared; only what this one says otherwise takes room of its own.
    """

    def __init__(self, of: SharedPart) -> None:
        self.of = of
        self._same = Bitmap(of.lengths.count)
        self._common = of.digests
        self._odd: dict[int, bytes] = {}

    def note(self, piece: int, digest: bytes) -> None:
        """It claims this. Raises BadClaim for a piece that does not exist.

        Of odd ones that are too many nothing is kept, so that their pieces are not taken: who spoke first may lie.
        """
        if piece >= self._same.size:
            raise BadClaim(f"it claims piece {piece} of {self._same.size}")
        if self._common.setdefault(piece, digest) == digest:
            self._odd.pop(piece, None)
            self._same.add(piece)
            return
        if piece in self._odd or len(self._odd) < ODD_MAX:
            self._odd[piece] = digest
        else:
            self._same.discard(piece)

    def digest(self, piece: int) -> bytes | None:
        """What it last said of a piece."""
        return self._odd.get(piece) or (self._common.get(piece) if piece in self._same else None)


__all__ = ["BadClaim", "Claimed", "Signers"]
