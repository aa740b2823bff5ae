"""The placement experiment of the FGD paper: its node and task lists, and the order of arrivals.

Tasks are sorted by name, shuffled with the seed, and followed by uniformly drawn
clones of them until the next would ask for more than `arrival` times the fleet's GPUs (the test adds one GPU's share
of the drawn task, as published). Ties between nodes go by a random order of the nodes, drawn from the same seed.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from fal_contract.errors import Code, FalError, invalid
from fal_scheduler.core.fragmentation import WHOLE, Demand, Shares

FILE_BYTES_MAX: Final = 256 << 20
GPUS_MAX: Final = 64
_NODE_COLUMNS: Final = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
_TASK_COLUMNS: Final = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")


class Node(NamedTuple):
    """A machine of the list."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    kind: int


class Trace(NamedTuple):
    """Nodes and tasks; `kinds` numbers the GPU models by name."""

    nodes: tuple[Node, ...]
    tasks: tuple[Demand, ...]  # by name
    kinds: Mapping[str, int]

    @property
    def capacity_milli(self) -> int:
        """All GPUs of the fleet, in thousandths."""
        return WHOLE * sum(node.gpus for node in self.nodes)


def load(nodes: Path, tasks: Path) -> Trace:
    """Read both lists. Raises FalError that names the file, the line and the column at fault."""
    rows = list(_rows(nodes, _NODE_COLUMNS, field="nodes"))
    models = sorted({row["model"] or "" for _, row in rows})
    kinds = {model: place for place, model in enumerate(models)}
    fleet = tuple(
        Node(
            row["sn"],
            _number(nodes, line, row, "cpu_milli", field="nodes"),
            _number(nodes, line, row, "memory_mib", field="nodes"),
            _number(nodes, line, row, "gpu", field="nodes", most=GPUS_MAX),
            kinds[row["model"] or ""],
        )
        for line, row in rows
    )
    named = sorted((row["name"] or "", line, row) for line, row in _rows(tasks, _TASK_COLUMNS, field="pods"))
    trace = Trace(fleet, tuple(_demand(tasks, line, row, kinds) for _, line, row in named), kinds)
    if not trace.capacity_milli:
        raise invalid("nodes", str(nodes), "has no GPU", remedy="Give a list of GPU nodes.")
    return trace


def _demand(path: Path, line: int, row: Mapping[str, str], kinds: Mapping[str, int]) -> Demand:
    count = _number(path, line, row, "num_gpu", field="pods", most=GPUS_MAX)
    share = _number(path, line, row, "gpu_milli", field="pods", most=WHOLE) if count else 0
    if count and not share:
        raise _wrong(path, line, "gpu_milli", row, field="pods", why=f"must be 1..{WHOLE} where num_gpu is above 0")
    asked = [name for name in (row.get("gpu_spec") or "").split("|") if name]
    # A model that no node has leaves the others; if none is left, nothing will do.
    known = tuple(sorted(kinds[name] for name in asked if name in kinds)) or ((-1,) if asked else ())
    return Demand(
        _number(path, line, row, "cpu_milli", field="pods"),
        share,
        count,
        known,
        _number(path, line, row, "memory_mib", field="pods"),
    )


def _rows(path: Path, columns: tuple[str, ...], *, field: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise invalid(field, str(path), f"is larger than {FILE_BYTES_MAX >> 20} MiB", remedy="Give a shorter list.")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise invalid(field, str(path), f"has no column {missing[0]}", remedy=f"Give {', '.join(columns)}.")
            count = 0
            for row in reader:
                count += 1
                yield reader.line_num, row
            if not count:
                raise invalid(field, str(path), "has no rows", remedy="Give a list with at least one.")
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise FalError(Code.NOT_FOUND, what, remedy=f"Name another file with --{field}.", field=field) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise invalid(field, str(path), f"is no CSV: {error}", remedy="Give a CSV file in UTF-8.") from None


def _number(path: Path, line: int, row: Mapping[str, str], column: str, *, field: str, most: int = 1 << 40) -> int:
    text = row[column] or ""
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise _wrong(path, line, column, row, field=field, why=f"is no number of 0..{most}")
    return int(text)


def _wrong(path: Path, line: int, column: str, row: Mapping[str, str], *, field: str, why: str) -> FalError:
    where = f"in column {column}, line {line} of {path}"
    return invalid(field, row[column] or "", f"{where} {why}", remedy="Correct that line.")


def shares_of(trace: Trace, seed: int) -> Shares:
    """The empty fleet, its rows in the seed's random order."""
    order = list(range(len(trace.nodes)))
    random.Random(f"nodes {seed}").shuffle(order)
    shares = Shares(len(order), max(node.gpus for node in trace.nodes))
    for row, place in enumerate(order):
        node = trace.nodes[place]
        shares.set_row(
            row, cpu_free=node.cpu_milli, memory_free=node.memory_mib, gpu_free=[WHOLE] * node.gpus, kind=node.kind
        )
    return shares


def arrivals(trace: Trace, seed: int, arrival: float) -> list[Demand]:
    """The tasks in the order in which they arrive."""
    chance = random.Random(f"tasks {seed}")
    tasks = list(trace.tasks)
    chance.shuffle(tasks)
    asked = sum(task.gpu_milli * task.num_gpus for task in tasks)
    limit = arrival * trace.capacity_milli
    if not asked:
        return tasks
    while True:
        task = trace.tasks[chance.randrange(len(trace.tasks))]
        if asked + task.gpu_milli > limit:
            return tasks
        tasks.append(task)
        asked += task.gpu_milli * task.num_gpus
