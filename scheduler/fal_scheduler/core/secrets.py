"""Secrets of teams, as records: who may be given which, and what stands in the way of forgetting one.

Pure. Values come sealed and leave sealed; nothing here can open them. A runner gets the secrets that its revision
names, of its own team; the task that packs an image gets the registry's credentials, of the image's team.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fal_contract.errors import Code, FalError, not_found
from fal_contract.ids import team_of
from fal_contract.limits import SECRETS_PER_TEAM_MAX
from fal_scheduler.core.events import Reply
from fal_scheduler.core.records import Secret, Spec
from fal_scheduler.core.secret_events import SecretCommand, SetSecret, UnsetSecret
from fal_scheduler.core.state import State
from fal_scheduler.core.work import Work

USERS_NAMED_MAX = 5


def command(work: Work, event: SecretCommand) -> Reply:
    """Do one of this module's commands."""
    match event:
        case SetSecret():
            return _set(work, event)
        case UnsetSecret():
            return _unset(work, event)


def _set(work: Work, event: SetSecret) -> Reply:
    state, wall_s = work.state, work.moment.wall_s
    have = state.secrets.get(event.id)
    if have is None:
        team = team_of(event.id)
        if sum(1 for id_ in state.secrets if team_of(id_) == team) >= SECRETS_PER_TEAM_MAX:
            what = f"team {team!r} has {SECRETS_PER_TEAM_MAX} secrets"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Unset some.", field="id")
        secret = Secret(event.id, event.sealed, 1, wall_s, wall_s, event.actor, event.bytes)
    else:
        secret = replace(
            have,
            sealed=event.sealed,
            generation=have.generation + 1,
            updated_at_s=wall_s,
            updated_by=event.actor,
            bytes=event.bytes,
        )
    work.put(secret, have)
    outcome = "created" if have is None else "changed"
    work.log("SECRET_SET", event.id, f"secret {outcome}; runners that start from now on get it")
    return Reply(outcome, event.id, secret.generation)


def _unset(work: Work, event: UnsetSecret) -> Reply:
    have = work.state.secrets.get(event.id)
    if have is None:
        raise not_found("secret", event.id, remedy="List them with `falctl secret list`.")
    if users := list(users_of(work.state, event.id)):
        more = f" and {len(users) - USERS_NAMED_MAX} more" if len(users) > USERS_NAMED_MAX else ""
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"secret {event.id!r} is named by {', '.join(users[:USERS_NAMED_MAX])}{more}",
            remedy="Apply them without it, or delete them, first.",
            field="id",
        )
    work.drop(have)
    work.log("SECRET_UNSET", event.id, "secret forgotten; runners that have it keep it until they end")
    return Reply("done", event.id)


def check_secrets(state: State, team: str, spec: Spec) -> None:
    """Raise NOT_FOUND where `spec`, of `team`, names a secret that is not set."""
    for name in spec.secrets:
        check_secret(state, f"{team}/{name}", field="secrets")
    if spec.build is not None and spec.build.auth_secret:
        check_secret(state, f"{team_of(spec.build.image)}/{spec.build.auth_secret}", field="auth_secret")


def check_secret(state: State, id_: str, *, field: str) -> None:
    """Raise NOT_FOUND, naming `field`, where there is no such secret."""
    if id_ not in state.secrets:
        raise FalError(
            Code.NOT_FOUND,
            f"secret {id_!r} is not set",
            remedy=f"falctl secret set {id_.partition('/')[2]} --from-file FILE",
            field=field,
        )


def wanted(team: str, spec: Spec) -> Mapping[str, str]:
    """Names that a runner of `spec` sees, and the ids of the secrets behind them."""
    found = {name: f"{team}/{name}" for name in spec.secrets}
    if spec.build is not None and spec.build.auth_secret:
        found[spec.build.auth_secret] = f"{team_of(spec.build.image)}/{spec.build.auth_secret}"
    return found


def users_of(state: State, id_: str) -> Iterator[str]:
    """Apps whose current revision names a secret, in order of id; and the app of a task that packs with it."""
    for app_id in sorted(state.apps):
        app = state.apps[app_id]
        if id_ in wanted(team_of(app_id), state.revision_of(app).spec).values():
            yield app_id


__all__ = ["check_secret", "check_secrets", "command", "users_of", "wanted"]
