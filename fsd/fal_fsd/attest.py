"""What this node signs and what it believes: claims about pieces, the content of whole artifacts, manifests of the CA.

Invariant: nothing is believed that the cluster's CA did not sign, once this node has an identity; without one (a node
alone, no scheduler) the agent's word counts, whose socket is the owner's. Called by fal_fsd.transfer and fal_fsd.node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from fal_contract.artifact import (
    Artifact,
    ArtifactFile,
    claim_text,
    entries_of,
    from_manifest,
    key_of_pem,
    listing_id,
)
from fal_contract.errors import Code, FalError, invalid
from fal_contract.identity import Identity
from fal_contract.model_manifest import check_digest, manifest_digest
from fal_contract.pieces import piece_bytes_of
from fal_contract.v1 import agent_pb2, state_pb2, weights_pb2
from fal_fsd.core.messages import Claim


class Signer:
    """Signs with the node's key. Thread-safe."""

    def __init__(self, identity: Identity) -> None:
        self.node_id = identity.peer.name
        key = serialization.load_pem_private_key(identity.key_pem, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise invalid("identity", type(key).__name__, "is not an EC key", remedy="Join the cluster again.")
        self._key = key

    def claim(self, artifact_id: str, piece: int, digest: bytes) -> Claim:
        """That this node read the piece from the origin and got this."""
        signature = self._key.sign(claim_text(artifact_id, piece, digest), ec.ECDSA(hashes.SHA256()))
        return Claim(piece, digest, self.node_id, signature)


def ca_key_of(identity: Identity | None) -> ec.EllipticCurvePublicKey | None:
    """The key that signs manifests; None without an identity."""
    return key_of_pem(identity.ca_pem) if identity is not None else None


def asked(message: agent_pb2.Artifact, ca_key: ec.EllipticCurvePublicKey | None) -> Artifact | None:
    """The artifact that the agent or the scheduler names, checked; None when its manifest has to be fetched.

    Manifests of the release before pieces lack artifact id, kind and piece length: these follow from what is there.
    INVALID or CORRUPT naming the field.
    """
    if message.manifest_digest:
        check_digest(message.manifest_digest)
    if message.artifact_id:
        check_digest(message.artifact_id, field="artifact_id")
    if not message.manifest.files:
        if not message.manifest_digest and not message.artifact_id:
            raise invalid("artifact_id", "", "is empty", remedy="Name the artifact.")
        return None
    artifact = from_manifest(_completed(message), ca_key=ca_key)
    if message.artifact_id and artifact.id != message.artifact_id:
        raise _another("artifact_id", artifact.id, message.artifact_id)
    if message.manifest_digest:
        digest = told_digest(artifact)
        if digest != message.manifest_digest:
            raise _another("manifest_digest", digest, message.manifest_digest)
    return artifact


def believed(
    message: state_pb2.ModelManifest, ca_key: ec.EllipticCurvePublicKey | None, *, attested: bool = True
) -> Artifact:
    """The artifact of a manifest that came over the wire. CORRUPT when it is not signed; with `attested` it must be."""
    artifact = from_manifest(message, ca_key=ca_key)
    if attested and not artifact.attested:
        raise invalid("signature", "", "is missing", remedy="Ask again once the model is attested.")
    return artifact


def parsed(raw: bytes) -> state_pb2.ModelManifest:
    """A manifest as peers send it. INVALID when it is none."""
    try:
        return state_pb2.ModelManifest.FromString(raw)
    except DecodeError:
        raise invalid("manifest", len(raw), "bytes are no manifest", remedy="Another peer is asked.") from None


def told_digest(artifact: Artifact) -> str:
    """Manifest digest that follows from the SHA-256 of all files; empty while one is not known."""
    return manifest_digest(entries_of(artifact)) if all(x.sha256 for x in artifact.files) else ""


def _completed(message: agent_pb2.Artifact) -> state_pb2.ModelManifest:
    manifest = state_pb2.ModelManifest()
    manifest.CopyFrom(message.manifest)
    manifest.uri = manifest.uri or message.uri
    manifest.kind = manifest.kind or message.kind or "model"
    if not manifest.piece_bytes:
        manifest.piece_bytes = piece_bytes_of(manifest.kind, sum(file.bytes for file in manifest.files))
    if not manifest.artifact_id:
        files = [ArtifactFile(x.path, x.bytes, x.version, x.sha256) for x in manifest.files]
        manifest.artifact_id = message.artifact_id or listing_id(manifest.uri, files)
    return manifest


def attestation_of(
    artifact: Artifact, sha256: Sequence[bytes], digests: Sequence[bytes], claims: Mapping[int, Claim], me: str
) -> weights_pb2.Attestation:
    """What the scheduler is told of a whole artifact. `digests`: BLAKE3 of every piece; pieces without a claim are
    this node's. Where the origin published a SHA-256 that is not the content's, `failure` names the file."""
    signers: dict[str, int] = {}
    by_piece = [
        signers.setdefault(claims[piece].signer if piece in claims else me, len(signers))
        for piece in range(artifact.layout.count)
    ]
    files = []
    for index, (file, found) in enumerate(zip(artifact.files, sha256, strict=True)):
        pieces = artifact.layout.of_file(index)
        told = state_pb2.ModelFile(
            path=file.path, bytes=file.size_bytes, version=file.version, sha256=found,
            blake3=b"".join(digests[pieces.start : pieces.stop]),
        )  # fmt: skip
        if file.sha256 and file.sha256 != found:
            why = f"file {file.path!r} has SHA-256 {found.hex()}, the origin says {file.sha256.hex()}"
            return weights_pb2.Attestation(
                artifact_id=artifact.id, files=[told], piece_signers=by_piece, signers=list(signers), failure=why
            )
        files.append(told)
    return weights_pb2.Attestation(artifact_id=artifact.id, files=files, piece_signers=by_piece, signers=list(signers))


def not_as_published(attestation: weights_pb2.Attestation) -> FalError:
    """The error that a failed attestation is."""
    return FalError(
        Code.CORRUPT,
        f"the model is not what its origin says: {attestation.failure}",
        remedy="Nothing of it was exposed. Correct the origin, then register the model again.",
        field=attestation.files[0].path if attestation.files else "",
    )


def wrong_file(artifact: Artifact, sha256: Sequence[bytes]) -> tuple[int, str] | None:
    """The first file whose bytes have another SHA-256 than its manifest says, and what to say of it."""
    for index, (file, found) in enumerate(zip(artifact.files, sha256, strict=True)):
        if file.sha256 != found:
            return index, f"file {file.path!r} has SHA-256 {found.hex()}, not {file.sha256.hex()}"
    return None


def not_the_content(model: str, path: str, why: str) -> FalError:
    """The signed digests of pieces are of other bytes than the origin published: whoever attested them lied."""
    return FalError(
        Code.CORRUPT,
        f"what was attested of {model} is not its content: {why}",
        remedy="Nothing of it was exposed. Look who attested it (falctl weights show), then revoke it.",
        field=path,
    )


def _another(field: str, actual: str, told: str) -> FalError:
    return FalError(
        Code.CORRUPT,
        f"the manifest's {field.replace('_', ' ')} is {actual}, {told} was asked for",
        remedy="Register the model again (falctl weights add).",
        field=field,
    )


__all__ = ["Signer", "asked", "attestation_of", "believed", "ca_key_of", "not_as_published", "parsed", "told_digest"]
