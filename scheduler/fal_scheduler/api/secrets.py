"""Secrets: set, list, unset; and what the node gets that runs a runner. The only place that opens them.

Sealed with the cluster's seal key (`ca.Sealer`), which every scheduler has and no store holds; the id is authenticated
with the value, so that one secret's record cannot pass for another's. Values must not get into errors, events or logs.
"""

from __future__ import annotations

from fal_contract.errors import Code, FalError, invalid
from fal_contract.ids import check_customer, check_name, team_of
from fal_contract.limits import SECRET_BYTES_MAX
from fal_contract.v1 import agent_pb2, cluster_pb2
from fal_scheduler.core.records import Goal, Secret
from fal_scheduler.core.secret_events import SetSecret, UnsetSecret
from fal_scheduler.core.secrets import users_of, wanted
from fal_scheduler.leadership import Leadership

PURPOSE = "secret "  # followed by the id


async def set_secret(leader: Leadership, request: cluster_pb2.SetSecretRequest, actor: str) -> cluster_pb2.SecretView:
    """Make or change a secret; durable when it returns. INVALID."""
    id_ = _checked_id(request.id)
    if not 1 <= len(request.value) <= SECRET_BYTES_MAX:
        remedy = f"Use 1 to {SECRET_BYTES_MAX} bytes."
        raise invalid("value", f"{len(request.value)} bytes", "is out of bounds", remedy=remedy)
    sealed = leader.ca.sealer.seal(request.value, purpose=PURPOSE + id_)
    await leader.engine.submit(SetSecret(id_, sealed, len(request.value), actor))
    return _view(leader, leader.view.secrets[id_])


def list_secrets(leader: Leadership, request: cluster_pb2.ListSecretsRequest) -> cluster_pb2.ListSecretsReply:
    """All, or a team's, without values, by id."""
    secrets = leader.view.secrets
    chosen = sorted(id_ for id_ in secrets if request.team in ("", team_of(id_)))
    return cluster_pb2.ListSecretsReply(secrets=[_view(leader, secrets[id_]) for id_ in chosen])


async def unset_secret(
    leader: Leadership, request: cluster_pb2.UnsetSecretRequest, actor: str
) -> cluster_pb2.SecretView:
    """Forget a secret that nothing names; answers what it was. NOT_FOUND, FAILED_PRECONDITION."""
    id_ = _checked_id(request.id)
    have = leader.view.secrets.get(id_)
    await leader.engine.submit(UnsetSecret(id_, actor))
    assert have is not None, "the command refuses what is not there"
    return _view(leader, have)


def get_secrets(leader: Leadership, request: agent_pb2.GetSecretsRequest, node_id: str) -> agent_pb2.GetSecretsReply:
    """What a runner's container is to see. Only for the node that holds the runner's live assignment.

    PERMISSION_DENIED for any other; UNAVAILABLE while the node is held; NOT_FOUND where a secret was lost; CORRUPT
    where it was sealed with another key.
    """
    runner = leader.engine.assignment(node_id, request.runner_id)
    known = leader.view.runners.get(request.runner_id)
    if runner is None and known is not None and known.node == node_id and known.goal is Goal.RUN:
        what = f"runner {known.id} is not certain yet: its node is held, or its record is on its way to the store"
        raise FalError(Code.UNAVAILABLE, what, remedy="It is asked again; see `falctl node show`.")
    if runner is None or runner.goal is not Goal.RUN:
        raise FalError(
            Code.PERMISSION_DENIED,
            f"runner {request.runner_id[:128]!r} is not for this node to run",
            remedy="Nothing needs to be done: the node is told what it should run.",
        )
    state = leader.view
    spec = state.revisions[(runner.app, runner.revision)].spec
    values: dict[str, bytes] = {}
    for name, id_ in wanted(team_of(runner.app), spec).items():
        secret = state.secrets.get(id_)
        if secret is None:
            remedy = f"falctl secret set {id_.partition('/')[2]} --from-file FILE"
            raise FalError(Code.NOT_FOUND, f"secret {id_!r} is not set", remedy=remedy)
        values[name] = leader.ca.sealer.unseal(secret.sealed, purpose=PURPOSE + id_)
    return agent_pb2.GetSecretsReply(values=values)


def _checked_id(id_: str) -> str:
    team, slash, name = id_.partition("/")
    check_name(team, field="id")
    check_name(name if slash else "", field="id")
    return check_customer(id_, field="id")


def _view(leader: Leadership, secret: Secret) -> cluster_pb2.SecretView:
    return cluster_pb2.SecretView(
        id=secret.id,
        generation=secret.generation,
        created_at_s=secret.created_at_s,
        updated_at_s=secret.updated_at_s,
        updated_by=secret.updated_by,
        bytes=secret.bytes,
        apps=list(users_of(leader.view, secret.id)),
    )


__all__ = ["get_secrets", "list_secrets", "set_secret", "unset_secret"]
