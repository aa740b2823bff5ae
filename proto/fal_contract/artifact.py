"""What names an artifact and what is signed about it. Pure.

An artifact is known in two steps. REGISTERED: paths, sizes, what the origin calls each file's version; from these comes
the *artifact id*, which names it in swarms and caches for good. ATTESTED: SHA-256 of every file (hence the manifest
digest, `fal_contract.model_manifest`) and BLAKE3 of every piece, signed by the cluster's CA. Three texts are signed or
hashed, each with a head of its own, so that none can be taken for another:

    fal-listing 1\n URI \n, then a line a file in order of path: SIZE SPACE VERSION SPACE PATH      → artifact id
    fal-attestation 1\n ARTIFACT-ID \n MANIFEST-DIGEST \n PIECE-BYTES \n PIECES-DIGEST \n            signed by the CA
                       and, where the origin published SHA-256 of a file: published \n
    fal-piece 1\n ARTIFACT-ID SPACE PIECE SPACE BLAKE3-HEX \n                                        signed by a node

PIECES-DIGEST is SHA-256 over the concatenated BLAKE3 digests of all pieces, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fal_contract.errors import Code, FalError, invalid
from fal_contract.model_manifest import FileEntry, check_digest, check_files, manifest_digest
from fal_contract.pieces import BLAKE3_BYTES, KINDS, PieceLayout
from fal_contract.v1 import state_pb2


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One file. `version`: what the origin calls it (ETag …). `sha256`: 32 bytes, or empty while unknown."""

    path: str
    size_bytes: int
    version: str = ""
    sha256: bytes = b""


@dataclass(frozen=True)
class Artifact:
    """What is to be brought: files in order of path. `hashes`: BLAKE3 of every piece, or None while REGISTERED.

    `published`: the origin told SHA-256 of a file, so that a node can hold bytes against it, whoever attested them.
    """

    id: str
    kind: str
    uri: str
    piece_bytes: int
    files: tuple[ArtifactFile, ...]
    hashes: tuple[bytes, ...] | None = None
    signature: bytes = b""
    published: bool = False

    @cached_property
    def layout(self) -> PieceLayout:
        """Its pieces."""
        return PieceLayout([file.size_bytes for file in self.files], self.piece_bytes)

    @cached_property
    def manifest_digest(self) -> str:
        """Names the content; empty while REGISTERED."""
        return manifest_digest(entries_of(self)) if self.attested else ""

    @property
    def attested(self) -> bool:
        """Whether content is known and signed."""
        return self.hashes is not None

    @property
    def bytes_total(self) -> int:
        """Sum of all files."""
        return sum(file.size_bytes for file in self.files)


def listing_id(uri: str, files: Sequence[ArtifactFile]) -> str:
    """The artifact id of a listing, hexadecimal. `uri` must be resolved: equal listings mean equal bytes."""
    hasher = hashlib.sha256(f"fal-listing 1\n{uri}\n".encode())
    for file in sorted(files, key=lambda x: x.path.encode()):
        version = file.version or file.sha256.hex()
        hasher.update(f"{file.size_bytes} {version} {file.path}\n".encode())
    return hasher.hexdigest()


def entries_of(artifact: Artifact) -> list[FileEntry]:
    """Its files as the manifest digest takes them."""
    return [FileEntry(x.path, x.size_bytes, x.sha256) for x in artifact.files]


def check_listing(files: Sequence[ArtifactFile]) -> None:
    """Raise INVALID naming the file unless these could be the files of one artifact (digests may be missing)."""
    placeholder = bytes(BLAKE3_BYTES)
    check_files([FileEntry(x.path, x.size_bytes, x.sha256 or placeholder) for x in files])
    for file in files:
        if not file.version.isprintable() or len(file.version) > 256:
            raise invalid("version", file.version[:80], f"of {file.path!r} is not printable", remedy="Tell the origin.")


def attestation_text(artifact: Artifact) -> bytes:
    """What the CA signs. `artifact` must be attested."""
    assert artifact.hashes is not None
    pieces = hashlib.sha256(b"".join(artifact.hashes)).hexdigest()
    head = f"fal-attestation 1\n{artifact.id}\n{artifact.manifest_digest}\n{artifact.piece_bytes}\n{pieces}\n"
    return (head + ("published\n" if artifact.published else "")).encode()


def claim_text(artifact_id: str, piece: int, digest: bytes) -> bytes:
    """What a node signs about a piece that it read from the origin."""
    return f"fal-piece 1\n{artifact_id} {piece} {digest.hex()}\n".encode()


def cache_entry_text(namespace: str, key: str, digest: str) -> bytes:
    """What the CA signs about an entry of the compile cache."""
    return f"fal-cache-entry 1\n{namespace}\n{key}\n{digest}\n".encode()


def signed_by(public_key: ec.EllipticCurvePublicKey, signature: bytes, text: bytes) -> bool:
    """Whether `signature` (ECDSA, SHA-256, DER) over `text` is that key's."""
    try:
        public_key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=4)
def key_of_pem(certificate_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Public key of the first certificate. INVALID when it is no elliptic curve key."""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except ValueError:
        raise invalid("certificate", "…", "cannot be read", remedy="Join the cluster again.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise invalid("certificate", "…", "has no elliptic curve key", remedy="Join the cluster again.")
    return key


def from_manifest(message: state_pb2.ModelManifest, *, ca_key: ec.EllipticCurvePublicKey | None = None) -> Artifact:
    """The artifact that a manifest describes. INVALID or CORRUPT, naming the field, for anything wrong with it.

    With `ca_key` an attested one must carry the CA's signature. A manifest with SHA-256 but without piece digests
    (written before pieces existed) counts as not attested.
    """
    files = tuple(ArtifactFile(x.path, x.bytes, x.version, x.sha256) for x in message.files)
    check_listing(files)
    if list(files) != sorted(files, key=lambda x: x.path.encode()):
        raise invalid("files", len(files), "are not in order of path", remedy="Register the model again.")
    if message.kind not in KINDS:
        raise invalid("kind", message.kind, "is no kind", remedy=f"Use one of {', '.join(KINDS)}.")
    check_digest(message.artifact_id, field="artifact_id")
    layout = PieceLayout([x.size_bytes for x in files], message.piece_bytes)
    hashes_ = _hashes(message, layout)
    artifact = Artifact(
        message.artifact_id,
        message.kind,
        message.uri,
        message.piece_bytes,
        files,
        hashes_,
        message.signature,
        message.published,
    )
    if (
        ca_key is not None
        and artifact.attested
        and not signed_by(ca_key, artifact.signature, attestation_text(artifact))
    ):
        raise FalError(
            Code.CORRUPT,
            f"the manifest of artifact {artifact.id[:12]} is not signed by this cluster",
            remedy="Nothing of it is used. Register the model again.",
            field="signature",
        )
    return artifact


def _hashes(message: state_pb2.ModelManifest, layout: PieceLayout) -> tuple[bytes, ...] | None:
    told = [len(x.blake3) // BLAKE3_BYTES for x in message.files]
    if not any(told) and (layout.count or not message.signature):
        return None
    for index, file in enumerate(message.files):
        if len(file.blake3) != BLAKE3_BYTES * len(layout.of_file(index)) or len(file.sha256) != BLAKE3_BYTES:
            raise invalid("blake3", file.path, "does not have one digest a piece", remedy="Register the model again.")
    raw = b"".join(file.blake3 for file in message.files)
    return tuple(raw[at : at + BLAKE3_BYTES] for at in range(0, len(raw), BLAKE3_BYTES))


def to_manifest(artifact: Artifact) -> state_pb2.ModelManifest:
    """The message; `from_manifest` gives the artifact back."""
    files = []
    for index, file in enumerate(artifact.files):
        pieces = artifact.layout.of_file(index)
        digests = b"".join(artifact.hashes[pieces.start : pieces.stop]) if artifact.hashes is not None else b""
        files.append(
            state_pb2.ModelFile(
                path=file.path, bytes=file.size_bytes, sha256=file.sha256, version=file.version, blake3=digests
            )
        )
    return state_pb2.ModelManifest(
        files=files,
        artifact_id=artifact.id,
        uri=artifact.uri,
        kind=artifact.kind,
        piece_bytes=artifact.piece_bytes,
        signature=artifact.signature,
        published=artifact.published,
    )


__all__ = [
    "Artifact",
    "ArtifactFile",
    "attestation_text",
    "cache_entry_text",
    "check_listing",
    "claim_text",
    "entries_of",
    "from_manifest",
    "key_of_pem",
    "listing_id",
    "signed_by",
    "to_manifest",
]
