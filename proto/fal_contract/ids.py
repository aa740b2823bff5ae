"""Names and ids. Pure.

Every object that belongs to a tenant carries its team in its id: `team/name`. Ids are text that an operator can
type, a file system can hold (`path_of`) and a store key can contain.

    app        default/digits
    revision   default/digits@3
    runner     default/digits-7k2m9q4c        (app name, then 8 random characters)
    model      default/digits-model
    node       n-4f7a20c1d9e8                 (not a tenant's)
    GPU        GPU-8f0c… or MIG-…             (the device's own UUID)
"""

from __future__ import annotations

import re
from random import Random
from typing import Final, NewType

from fal_contract.errors import invalid
from fal_contract.limits import LABEL_CHARS_MAX, NAME_CHARS_MAX

AppId = NewType("AppId", str)
RevisionId = NewType("RevisionId", str)
RunnerId = NewType("RunnerId", str)
ModelId = NewType("ModelId", str)
NodeId = NewType("NodeId", str)
GpuId = NewType("GpuId", str)
AssignmentId = NewType("AssignmentId", str)

DEFAULT_TEAM: Final = "default"
SYSTEM_TEAM: Final = "system"  # owns build tasks and entries of compile caches; no customer's
# No i, l, o, u: read aloud over a phone without mistakes (Crockford's base 32, lower case).
_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LABEL: Final = re.compile(r"[^\s=\x00-\x1f\x7f]*[^\s=\x00-\x1f\x7f-]")
_SUFFIX_CHARS: Final = 8


def check_name(value: str, *, field: str) -> str:
    """Return `value` when it is a legal name, else raise INVALID naming `field`."""
    if len(value) > NAME_CHARS_MAX or not _NAME.fullmatch(value):
        raise invalid(
            field,
            value,
            "is not a name",
            remedy=f"Use 1 to {NAME_CHARS_MAX} of a-z, 0-9 and '-', starting and ending with a letter or digit.",
        )
    return value


def check_label(name: str, *, field: str) -> str:
    """A label's name, or FalError(INVALID): anything that `NAME=VALUE` and `NAME-` can say."""
    if not _LABEL.fullmatch(name) or len(name) > LABEL_CHARS_MAX:
        remedy = f"Use 1 to {LABEL_CHARS_MAX} characters, no spaces, no '=', and no '-' at the end."
        raise invalid(field, name, "is no name of a label", remedy=remedy)
    return name


def check_customer(owned: str, *, field: str) -> str:
    """Return a `team/name` that is not of the team which the scheduler keeps for itself, else raise INVALID."""
    if team_of(owned) == SYSTEM_TEAM:
        raise invalid(field, owned[:80], "is the scheduler's own", remedy=f"Use another team than {SYSTEM_TEAM!r}.")
    return owned


def random_suffix(rng: Random, chars: int = _SUFFIX_CHARS) -> str:
    """`chars` random characters; 8 of them are 40 bits."""
    return "".join(rng.choices(_ALPHABET, k=chars))


def app_id(team: str, name: str) -> AppId:
    return AppId(f"{check_name(team, field='team')}/{check_name(name, field='name')}")


def model_id(team: str, name: str) -> ModelId:
    return ModelId(f"{check_name(team, field='team')}/{check_name(name, field='name')}")


def revision_id(app: AppId, number: int) -> RevisionId:
    return RevisionId(f"{app}@{number}")


def runner_id(app: AppId, rng: Random) -> RunnerId:
    return RunnerId(f"{app}-{random_suffix(rng)}")


def node_id(rng: Random) -> NodeId:
    return NodeId(f"n-{random_suffix(rng, 12)}")


def team_of(owned: str) -> str:
    """The team of an app, revision, runner or model id."""
    return owned.split("/", 1)[0]


def name_of(owned: str) -> str:
    """The id without its team."""
    return owned.split("/", 1)[1]


def qualify(value: str, *, team: str, field: str) -> str:
    """`name` or `team/name` as an operator types it → `team/name`."""
    given_team, slash, name = value.partition("/")
    if not slash:
        given_team, name = team, value
    return f"{check_name(given_team, field=field)}/{check_name(name, field=field)}"


def path_of(owned: str) -> str:
    """A file or container name for an owned id: `team/name` → `team.name` (names hold no dot)."""
    return owned.replace("/", ".").replace("@", ".")


def owned_of(path: str) -> str:
    """The inverse of `path_of` for app, runner and model ids."""
    team, dot, name = path.partition(".")
    if not dot:
        raise ValueError(f"{path!r} is not the path of an owned id")
    return f"{team}/{name}"


__all__ = [
    "DEFAULT_TEAM",
    "SYSTEM_TEAM",
    "AppId",
    "AssignmentId",
    "GpuId",
    "ModelId",
    "NodeId",
    "RevisionId",
    "RunnerId",
    "app_id",
    "check_customer",
    "check_name",
    "model_id",
    "name_of",
    "node_id",
    "owned_of",
    "path_of",
    "qualify",
    "random_suffix",
    "revision_id",
    "runner_id",
    "team_of",
]
