"""`falctl cost`: what containers used and what it costs, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fal_contract.errors import Code, FalError, invalid
from falctl.context import unary
from falctl.pools import JsonFlag

BY: Final = ("app", "team", "pool", "machine")
COLUMNS: Final = ("gpu_seconds", "busy_gpu_seconds", "idle_gpu_seconds", "requests", "runners", "cost_usd")
DETAILS: Final = (
    "container", "app", "revision", "runner", "pool", "node", "machine", "gpus", "gpu_share", "started_at_s", "until_s",
    "ended",
)  # fmt: skip


def cost(
    by: Annotated[str, typer.Option(help="One row for each app, team, pool or machine (GPU model).")] = "app",
    since: Annotated[str, typer.Option(help="How far back: 90m, 24h, 7d. Beyond two days, whole days.")] = "7d",
    until: Annotated[str, typer.Option(help="How long ago it ends: 0, 24h.")] = "0",
    team: Annotated[str, typer.Option("--of-team", help="Only this team's.")] = "",
    details: Annotated[bool, typer.Option("--details", help="Single containers of the last two days.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write a Parquet file.")] = None,
    json: JsonFlag = False,
) -> None:
    """GPU seconds, price, and how much of it was idle; what runs now is counted up to now."""
    from fal_contract.clock import SystemClock
    from fal_contract.ids import check_name
    from fal_contract.units import parse_duration_s
    from falctl.output import print_json

    if by not in BY:
        raise invalid("--by", by, "is no way to sum", remedy=f"Use one of {', '.join(BY)}.")
    if details and by != BY[0]:
        raise invalid("--by", by, "means nothing with --details", remedy="Give one of them.")
    if team:
        check_name(team, field="--of-team")
    now_s = SystemClock().wall_s()
    since_s = max(0.0, now_s - parse_duration_s(since, field="--since"))
    until_s = now_s - (parse_duration_s(until, field="--until") if until != "0" else 0.0)
    if since_s >= until_s:
        raise invalid("--since", since, f"is not before --until {until}", remedy="Look further back.")
    rows = list(_details(since_s, until_s, team) if details else _sums(since_s, until_s, team, by))
    names = (*(DETAILS if details else (by,)), *COLUMNS)
    for file, write in ((csv, partial(_write_csv, names=names)), (parquet, _write_parquet)):
        if file is not None:
            _written(file, rows, write)
    if json:
        print_json("cost", {"by": "container" if details else by, "since_s": since_s, "until_s": until_s, "rows": rows})
    elif csv is None and parquet is None:
        _print(rows, "container" if details else by)


def _sums(since_s: float, until_s: float, team: str, by: str) -> Iterator[dict[str, Any]]:
    from fal_contract.v1 import cluster_pb2 as pb

    reply = unary("GetUsage", pb.GetUsageRequest(since_s=since_s, until_s=until_s, team=team))
    key: dict[str, Callable[[Any], str]] = {
        "app": lambda row: str(row.app),
        "team": lambda row: str(row.app).split("/", 1)[0],
        "pool": lambda row: str(row.pool),
        "machine": lambda row: str(row.machine_type or "none"),
    }
    found: dict[str, list[int]] = {}
    for row in reply.rows:
        have = found.setdefault(key[by](row), [0] * 5)
        for at, value in enumerate((row.gpu_ms, row.busy_gpu_ms, row.served, row.runners, row.cost_micros)):
            have[at] += value
    for name in sorted(found):
        yield {by: name, **_columns(*found[name])}


def _details(since_s: float, until_s: float, team: str) -> Iterator[dict[str, Any]]:
    from fal_contract.v1 import cluster_pb2 as pb

    after = ""
    while True:
        reply = unary(
            "GetUsage",
            pb.GetUsageRequest(since_s=since_s, until_s=until_s, team=team, details=True, after=after),
        )
        for one in reply.usages:
            after = one.assignment
            yield {
                "container": one.assignment,
                "app": one.app,
                "revision": one.revision,
                "runner": one.runner,
                "pool": one.pool,
                "node": one.node,
                "machine": one.machine_type,
                "gpus": one.gpus,
                "gpu_share": (one.gpu_milli or 1000) / 1000,
                "started_at_s": one.started_at_s,
                "until_s": one.until_s,
                "ended": one.ended,
                **_columns(one.gpu_ms, one.busy_gpu_ms, one.served, 1, one.gpu_ms * one.price_micros // 3_600_000),
            }
        if not reply.more:
            return


def _columns(gpu_ms: int, busy_ms: int, served: int, runners: int, micros: int) -> dict[str, Any]:
    values = (gpu_ms / 1000, busy_ms / 1000, (gpu_ms - busy_ms) / 1000, served, runners, micros / 1_000_000)
    return dict(zip(COLUMNS, values, strict=True))


def _print(rows: list[dict[str, Any]], by: str) -> None:
    from falctl.output import print_table

    print_table(
        (by.upper(), "GPU SECONDS", "BUSY", "REQUESTS", "RUNNERS", "USD", "USD/REQUEST"),
        (
            (
                str(row[by]), f"{row['gpu_seconds']:.1f}", _share(row["busy_gpu_seconds"], row["gpu_seconds"]),
                str(row["requests"]), str(row["runners"]), f"{row['cost_usd']:.4f}",
                f"{row['cost_usd'] / row['requests']:.6f}" if row["requests"] else "-",
            )
            for row in rows
        ),
        empty="Nothing has run in that time.",
    )  # fmt: skip


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _written(file: Path, rows: list[dict[str, Any]], write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
    """Beside it first, so that nobody reads half a file."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part, rows)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise invalid("file", str(file), f"cannot be written: {error.strerror}", remedy="Name another file.") from None
    typer.echo(f"wrote {len(rows)} rows to {file}", err=True)


def _write_csv(file: Path, rows: list[dict[str, Any]], *, names: Sequence[str]) -> None:
    import csv as csv_module

    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv_module.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FalError(
            Code.FAILED_PRECONDITION,
            "Parquet needs the package pyarrow, which is not installed",
            remedy="pip install 'falctl[export]', or write --csv.",
        ) from None
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


__all__ = ["cost"]
