"""`falctl quota`: GPUs that teams may hold."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fal_contract.errors import invalid
from falctl.context import unary
from falctl.pools import JsonFlag

group = typer.Typer(help="GPUs that teams may hold.", no_args_is_help=True)


@group.command("set")
def set_quota(
    team: str,
    gpus: Annotated[float, typer.Option("--gpus", help="GPUs; fractions count, such as 2.5.")],
    borrow: Annotated[
        bool, typer.Option("--borrow/--no-borrow", help="It may hold more while nobody within a quota waits.")
    ] = True,
    json: JsonFlag = False,
) -> None:
    """Give a team a quota: it is never refused within it, and what it holds there is never taken for others."""
    from fal_contract.v1 import cluster_pb2 as pb

    if not 0 <= gpus <= 1_000_000:
        raise invalid("--gpus", gpus, "is out of bounds", remedy="Use 0 to 1000000.")
    if abs(gpus * 1000 - round(gpus * 1000)) > 1e-3:
        raise invalid("--gpus", gpus, "is finer than a thousandth of a GPU", remedy="Use three decimals at most.")
    request = pb.SetQuotaRequest(team=team, gpu_milli=round(gpus * 1000), no_borrowing=not borrow)
    _told(unary("SetQuota", request), json)


@group.command("list")
def list_quotas(json: JsonFlag = False) -> None:
    """Every team that has a quota, holds GPUs, or waits for some."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    views = unary("ListQuotas", pb.ListQuotasRequest()).quotas
    if json:
        print_json("quotas", [to_json(view) for view in views])
        return
    print_table(
        ("TEAM", "QUOTA", "HELD", "BORROWED", "MAY BORROW", "WAITING"),
        (
            (
                view.team, _gpus(view.quota.gpu_milli) if view.HasField("quota") else "none",
                _gpus(view.held_gpu_milli), _gpus(view.borrowed_gpu_milli),
                "no" if view.quota.no_borrowing else "yes", str(view.waiting),
            )
            for view in views
        ),
        empty="No team has a quota or holds GPUs.",
    )  # fmt: skip


@group.command("show")
def show(team: str, json: JsonFlag = False) -> None:
    """One team's quota and what it holds."""
    from fal_contract.ids import check_name
    from fal_contract.v1 import cluster_pb2 as pb

    check_name(team, field="TEAM")
    _told(unary("ListQuotas", pb.ListQuotasRequest(team=team)).quotas[0], json)


@group.command("unset")
def unset(team: str, json: JsonFlag = False) -> None:
    """Take a team's quota away: no bound, and no claim."""
    from fal_contract.v1 import cluster_pb2 as pb

    _told(unary("UnsetQuota", pb.UnsetQuotaRequest(team=team)), json)


def _told(view: Any, json: bool) -> None:
    from falctl.output import console, print_json, to_json

    if json:
        print_json("quota", to_json(view))
        return
    quota = f"quota of {_gpus(view.quota.gpu_milli)} GPUs" if view.HasField("quota") else "no quota"
    borrowing = ", none borrowed" if view.quota.no_borrowing else ""
    borrowed = f", {_gpus(view.borrowed_gpu_milli)} of them borrowed" if view.borrowed_gpu_milli else ""
    console().print(f"team {view.team}: {quota}{borrowing}; holds {_gpus(view.held_gpu_milli)}{borrowed}")


def _gpus(milli: int) -> str:
    return f"{milli / 1000:g}"
