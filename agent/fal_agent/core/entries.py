"""Which entries of the compile cache a runner may be shown. Pure.

This is the one place that decides it, because only the agent knows both whose the container is and whose CA signs: an
entry must be of the cluster's or the runner's own team's namespace, and the CA must have signed that namespace, key and
content. That the bytes are that content is fal-fsd's to check, as for every artifact, before it shows a folder. What
is refused is left out; a container can always compile for itself.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec

from fal_contract.artifact import cache_entry_text, signed_by
from fal_contract.cache_key import may_read
from fal_contract.ids import team_of
from fal_contract.v1 import agent_pb2


def refusal(artifact: agent_pb2.Artifact, app: str, ca_key: ec.EllipticCurvePublicKey | None) -> str:
    """Why a container of `app` must not see this entry; empty when it may. `ca_key`: the cluster's, None unknown."""
    if not may_read(artifact.namespace, team_of(app)):
        return f"it is of namespace {artifact.namespace!r}, the runner of team {team_of(app)!r}"
    text = cache_entry_text(artifact.namespace, artifact.cache_key, artifact.manifest_digest)
    if not artifact.manifest_digest or ca_key is None or not signed_by(ca_key, artifact.entry_signature, text):
        return "it is not signed by this cluster"
    return ""


def allowed(
    message: agent_pb2.Assignment, ca_key: ec.EllipticCurvePublicKey | None
) -> tuple[agent_pb2.Assignment, dict[str, str]]:
    """The assignment without entries that must not be shown, and why by model. The same object where all may."""
    refused: dict[str, str] = {}
    for artifact in message.artifacts:
        if artifact.kind == "cache" and (why := refusal(artifact, message.app, ca_key)):
            refused[artifact.model] = why
    if not refused:
        return message, refused
    kept = agent_pb2.Assignment()
    kept.CopyFrom(message)
    del kept.artifacts[:]
    kept.artifacts.extend(one for one in message.artifacts if one.model not in refused)
    return kept, refused


__all__ = ["allowed", "refusal"]
