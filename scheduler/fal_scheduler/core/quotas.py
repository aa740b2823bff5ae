"""GPUs that a team may hold: its quota, and what it may borrow. Pure.

A team within its quota is never refused for it, and nothing that it holds within it is ever taken for others. Above it,
a team that may borrow holds what nobody within their quota waits for; what it borrowed is the first to be taken back
(`preemption`). A team without a quota has no bound and no claim.
"""

from __future__ import annotations

from typing import Final

from fal_contract.errors import invalid, not_found
from fal_contract.ids import check_name, team_of
from fal_contract.limits import QUOTA_GPU_MILLI_MAX, TEAMS_MAX
from fal_scheduler.core.events import Reply
from fal_scheduler.core.explain import FREED_BY_STOPPING
from fal_scheduler.core.quota_events import QuotaCommand, SetQuota
from fal_scheduler.core.records import Quota, Runner, Spec
from fal_scheduler.core.state import State
from fal_scheduler.core.work import Work

FILTER: Final = "quota"


def command(work: Work, event: QuotaCommand) -> Reply:
    """Set or take away a quota. Raises INVALID, NOT_FOUND."""
    state = work.state
    have = state.quotas.get(event.team)
    if not isinstance(event, SetQuota):
        if have is None:
            raise not_found("quota", event.team, remedy="List them with `falctl quota list`.")
        work.drop(have)
        work.capacity_grew()
        work.log("QUOTA_UNSET", event.team, "no bound, and no claim")
        return Reply("done", event.team)
    check_name(event.team, field="team")
    if not 0 <= event.gpu_milli <= QUOTA_GPU_MILLI_MAX:
        remedy = f"Use 0 to {QUOTA_GPU_MILLI_MAX // 1000} GPUs."
        raise invalid("gpus", event.gpu_milli / 1000, "is out of bounds", remedy=remedy)
    if have is None and len(state.quotas) >= TEAMS_MAX:
        raise invalid("team", event.team, "is one too many", remedy=f"At most {TEAMS_MAX} teams have a quota.")
    generation = have.generation + 1 if have is not None else 1
    after = Quota(event.team, event.gpu_milli, event.borrow, generation)
    if have is not None and (have.gpu_milli, have.borrow) == (after.gpu_milli, after.borrow):
        return Reply("unchanged", event.team, have.generation)
    work.put(after, have)
    work.capacity_grew()
    work.log("QUOTA_SET", event.team, f"{event.gpu_milli / 1000:g} GPUs{'' if event.borrow else ', none borrowed'}")
    return Reply("created" if have is None else "changed", event.team, generation)


def milli_of(spec: Spec) -> int:
    """Thousandths of GPUs that a runner of `spec` holds."""
    return spec.num_gpus * (spec.gpu_milli or 1000)


def held_by(runner: Runner) -> int:
    """Thousandths of GPUs that a runner holds."""
    return len(runner.gpus) * (runner.gpu_milli or 1000)


def within(state: State, team: str, more_milli: int = 0) -> bool:
    """Whether the team, with so much more, is within its quota; one without a quota never is."""
    quota = state.quotas.get(team)
    return quota is not None and state.held_milli.get(team, 0) + more_milli <= quota.gpu_milli


def borrowed_milli(state: State, team: str) -> int:
    """What the team holds above its quota; without one all that it holds, which nobody has promised it."""
    quota = state.quotas.get(team)
    return max(0, state.held_milli.get(team, 0) - (quota.gpu_milli if quota is not None else 0))


def refusal(state: State, team: str, spec: Spec) -> str:
    """Why a runner of `spec` must wait for its team's quota; empty: it need not."""
    quota, need = state.quotas.get(team), milli_of(spec)
    if quota is None or not need or within(state, team, need):
        return ""
    held = state.held_milli.get(team, 0)
    holds = f"team {team} holds {held / 1000:g} GPUs of its quota of {quota.gpu_milli / 1000:g}"
    if not quota.borrow:
        return f"{holds}, {need / 1000:g} more asked, and it may not borrow"
    owner = _owner_waiting(state, team)
    return f"{holds}, and team {owner}, which is within its own, waits first" if owner else ""


def _owner_waiting(state: State, team: str) -> str:
    """A team within its quota that waits for GPUs; empty: none does."""
    for need, line in state.waiting.by_need.items():
        other = str(need[0])
        app = state.apps.get(line[0][1])
        if other == team or app is None:
            continue
        revision = state.revision_of(app)
        milli = milli_of(revision.spec)
        if milli and within(state, other, milli) and not _hopeless(state, app.id, revision.number):
            return other
    return ""


def _hopeless(state: State, app_id: str, number: int) -> bool:
    """Whether it waits for what no node has, whatever runs there: nobody helps it by holding back."""
    pending = state.pending.get((app_id, number))
    if pending is None or not pending.refused or pending.feasible:
        return False
    return not any(name == FILTER or name in FREED_BY_STOPPING for name, _ in pending.refused)


def team_of_runner(runner: Runner) -> str:
    """Whose it is."""
    return team_of(runner.app)
