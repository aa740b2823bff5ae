"""The fleet as numpy columns: what placement looks at, kept up to date by `State`.

Pure. A row is one (node, kind of GPU): model, size and MIG profile. A node with two kinds has two rows, one without
GPUs has one. Columns that belong to the node (memory, CPU, ready …) are repeated on its rows; those of single GPUs
have a second axis, in the driver's order. Free numbers count every container that is known to hold something, orphans
included. Row order is by node id, so that the row number breaks ties. Numbers that stand for words (teams, domains,
boards) are digests, so that they are the same in every process.

Only `State` writes; `place` reads. Must not decide anything.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import compress
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fal_contract.ids import team_of
from fal_scheduler.core.boards import Board, board_of, layout_of
from fal_scheduler.core.told import Gpu

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Shares = NDArray[np.int16]

_K = TypeVar("_K")

WHOLE: Final = 1000  # thousandths of a GPU
NOBODY: Final = 0  # in `teams`: no runner holds the GPU
CLOSED: Final = -1  # in `teams`: held whole, or sick, or not there
_TOUCHED_MAX = 100_000
_BOARDS_MAX = 1024


@dataclass(slots=True)
class NodeFacts:
    """What placement may know of one node; `State` rebuilds it when a record or the inventory changes."""

    node_id: str
    ready: bool
    cordoned: bool
    held: bool
    isolates: bool
    driver: str
    pool: str
    labels: Mapping[str, str]
    cpu_milli: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    features: frozenset[str] = frozenset()  # what its driver can do beyond the least
    host_network: bool = False  # its pool allows containers in the node's own network
    driver_version: str = ""  # of the GPU driver; empty without one
    cuda_version: str = ""
    domain: str = ""  # failure domain
    gpu_hour_price_micros: int = 0
    reclaim_per_hour_ppm: int = 0


@dataclass(slots=True)
class Occupancy:
    """What containers hold on one node."""

    holders: dict[str, dict[str, int]] = field(default_factory=dict)  # GPU id -> runner id -> thousandths, 0: all
    apps: dict[str, int] = field(default_factory=dict)  # app -> containers that serve it
    memory_bytes: int = 0
    cpu_milli: int = 0

    @property
    def gpus(self) -> dict[str, str]:
        """GPU id -> the runner that held it first."""
        return {gpu: next(iter(runners)) for gpu, runners in self.holders.items()}


GpuClass = tuple[str, int, str]  # model, memory in bytes, MIG profile
NO_GPU: GpuClass = ("", 0, "")


class Fleet:
    """Columns over all rows. `version` rises when rows are made anew or their static facts change.

    `touched` lists rows whose free numbers changed since `epoch` last rose, for those who keep columns of their own.
    """

    def __init__(self) -> None:
        self.facts: dict[str, NodeFacts] = {}
        self.occupancy: dict[str, Occupancy] = {}
        self.version = 0
        self.epoch = 0
        self.touched: list[int] = []
        self._stale = True
        self._distrusted = False
        self._news: dict[str, None] = {}  # nodes whose rows are not as they should be, or are to go
        self._kinds: dict[str, list[tuple[GpuClass, tuple[Gpu, ...], Board]]] = {}  # of each node
        self._profiles: dict[str, int] = {}  # of each node
        self._boards: dict[object, Board] = {}  # equal ones are one, with what was worked out for it
        self.node_ids: list[str] = []
        self._heads: list[bool] = []  # of each row whether it is the first of its node
        self.classes: list[GpuClass] = []
        self.gpus: list[tuple[Gpu, ...]] = []
        self.boards: list[Board] = []
        self.rows_of: dict[str, range] = {}
        self.nodes_of_app: dict[str, dict[str, int]] = {}  # app -> node -> containers
        self.domains_of_app: dict[str, dict[int, int]] = {}  # app -> number of the domain -> containers
        self._allocate(0, 0)

    def _allocate(self, rows: int, width: int) -> None:
        self.ready: Bools = np.zeros(rows, np.bool_)  # heard, not held, not cordoned
        self.first: Bools = np.zeros(rows, np.bool_)  # first row of its node: the one for runners without GPUs
        self.healthy: Ints = np.zeros(rows, np.int64)
        self.total: Ints = np.zeros(rows, np.int64)
        self.free: Ints = np.zeros(rows, np.int64)  # healthy and held by nobody
        self.profile: Ints = np.zeros(rows, np.int64)  # equal: nothing static tells their nodes apart
        self.kind: Ints = np.zeros(rows, np.int64)  # equal: GPUs of one class
        self.memory_free: Ints = np.zeros(rows, np.int64)
        self.cpu_free: Ints = np.zeros(rows, np.int64)
        self.domain: Ints = np.zeros(rows, np.int64)
        self.price: Ints = np.zeros(rows, np.int64)  # micros per GPU hour
        self.reclaim: Ints = np.zeros(rows, np.int64)  # ppm per hour
        self.shares: Shares = np.zeros((rows, width), np.int16)  # thousandths of each GPU that are free
        self.teams: Ints = np.full((rows, width), CLOSED, np.int64)  # whose fractional runners hold it

    def set_node(self, facts: NodeFacts) -> None:
        """Add a node or replace what is known of it."""
        have = self.facts.get(facts.node_id)
        if have == facts:
            return
        if have is None or have.domain != facts.domain:
            self._count_apps(facts.node_id, have.domain if have is not None else None, facts.domain)
        self.facts[facts.node_id] = facts
        if have is None or have.gpus != facts.gpus:
            same_rows = not self._stale and have is not None and _alike(have.gpus, facts.gpus)
            self._kinds[facts.node_id] = self._kinds_of(facts.gpus)
        else:
            same_rows = not self._stale
        changed = have is None or _static(have) != _static(facts)
        if changed:
            self._profiles[facts.node_id] = number_of(repr(_static(facts)))
        if changed or not same_rows:
            self.version += 1
        if same_rows and not self._stale:
            self._fill(facts.node_id)
        else:
            self._mark(facts.node_id)

    def drop_node(self, node_id: str) -> None:
        """Forget a node."""
        facts = self.facts.pop(node_id, None)
        if facts is not None:
            self._count_apps(node_id, facts.domain, None)
            del self._kinds[node_id], self._profiles[node_id]
            self.version += 1
            self._mark(node_id)

    def _mark(self, node_id: str) -> None:
        """Its rows are to be made anew."""
        self._news[node_id] = None
        self._stale = True

    def hold(
        self,
        node_id: str,
        runner_id: str,
        gpus: tuple[str, ...],
        memory_bytes: int,
        cpu_milli: int,
        gpu_milli: int = 0,
        apps: tuple[str, ...] = (),
    ) -> None:
        """A container holds these, `gpu_milli` thousandths of each GPU (0: all). What others hold already stays theirs.

        Records of an older store and the containers that really run may name the same GPU: then nothing of it is free.
        """
        held = self.occupancy.setdefault(node_id, Occupancy())
        for gpu in gpus:
            held.holders.setdefault(gpu, {})[runner_id] = gpu_milli
        for app in apps:
            held.apps[app] = held.apps.get(app, 0) + 1
            self._count_app(node_id, app, 1)
        held.memory_bytes += memory_bytes
        held.cpu_milli += cpu_milli
        self._refresh(node_id, memory_bytes, cpu_milli)

    def release(
        self,
        node_id: str,
        runner_id: str,
        gpus: tuple[str, ...],
        memory_bytes: int,
        cpu_milli: int,
        apps: tuple[str, ...] = (),
    ) -> None:
        """A container holds these no longer."""
        held = self.occupancy[node_id]
        for gpu in gpus:
            holders = held.holders.get(gpu, {})
            holders.pop(runner_id, None)
            if not holders:
                held.holders.pop(gpu, None)
        for app in apps:
            held.apps[app] -= 1
            if not held.apps[app]:
                del held.apps[app]
            self._count_app(node_id, app, -1)
        held.memory_bytes -= memory_bytes
        held.cpu_milli -= cpu_milli
        self._refresh(node_id, -memory_bytes, -cpu_milli)

    def _count_app(self, node_id: str, app: str, by: int) -> None:
        _add(self.nodes_of_app, app, node_id, by)
        facts = self.facts.get(node_id)
        if facts is not None:
            _add(self.domains_of_app, app, number_of(facts.domain), by)

    def _count_apps(self, node_id: str, before: str | None, after: str | None) -> None:
        """The node's containers change their failure domain; None: it is not known."""
        held = self.occupancy.get(node_id)
        for app, count in held.apps.items() if held is not None else ():
            if before is not None:
                _add(self.domains_of_app, app, number_of(before), -count)
            if after is not None:
                _add(self.domains_of_app, app, number_of(after), count)

    def _refresh(self, node_id: str, memory_bytes: int, cpu_milli: int) -> None:
        if node_id not in self.facts:
            return
        if self._stale:
            self._news[node_id] = None
            return
        held = self.occupancy[node_id]
        for row in self.rows_of[node_id]:
            self._fill_gpus(row, held)
            self.memory_free[row] -= memory_bytes
            self.cpu_free[row] -= cpu_milli
            self._touch(row)

    def _touch(self, row: int) -> None:
        self.touched.append(row)
        if len(self.touched) > _TOUCHED_MAX:
            self.touched.clear()
            self.epoch += 1

    def fresh(self) -> Fleet:
        """The fleet with its rows in order again where nodes came, went or changed their GPUs."""
        if self._stale:
            self._rebuild()
        return self

    def distrust(self) -> None:
        """The columns are to be made anew from what is known of nodes and containers."""
        self._stale = self._distrusted = True

    def _rebuild(self) -> None:
        """Rows of nodes with news are made anew, the others keep their values and move up or down."""
        if self._distrusted:
            self._news = dict.fromkeys((*self.rows_of, *self.facts))
            self.nodes_of_app, self.domains_of_app = {}, {}
            for node_id, held in self.occupancy.items():
                for app, count in held.apps.items():
                    self._count_app(node_id, app, count)
        before, moved_from = self._columns(), self._rows_without_news()
        self._arrange()
        moved_to = self._rows_without_news()
        self._allocate(len(self.node_ids), max(map(len, self.gpus), default=0))
        for name, column in self._columns().items():
            old = before[name]
            if column.ndim == 1:
                column[moved_to] = old[moved_from]
            else:  # no row that moved has more GPUs than the narrower one
                width = min(column.shape[1], old.shape[1])
                column[moved_to, :width] = old[moved_from, :width]
        self.epoch += 1
        self.touched.clear()
        for node_id in self._news:
            if node_id in self.facts:
                self._fill(node_id)
        self._news, self._stale, self._distrusted = {}, False, False

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        return {name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)}

    def _rows_without_news(self) -> NDArray[np.intp]:
        """In order of node id, so that those of before and those of after are the same rows."""
        kept: Bools = np.ones(len(self.node_ids), np.bool_)
        for node_id in self._news:
            rows = self.rows_of.get(node_id)
            if rows is not None:
                kept[rows.start : rows.stop] = False
        return np.flatnonzero(kept)

    def _arrange(self) -> None:
        """Which rows there are, in new lists: who keeps columns by a list sees that it is another one."""
        olds: tuple[list[Any], ...] = self.node_ids, self._heads, self.classes, self.gpus, self.boards
        news: tuple[list[Any], ...] = [], [], [], [], []
        at = 0
        for node_id in sorted(self._news):
            start = bisect_left(self.node_ids, node_id, at)
            for new, old in zip(news, olds, strict=True):
                new += old[at:start]
            at = bisect_right(self.node_ids, node_id, start)
            for number, kind in enumerate(self._kinds.get(node_id, ())):
                for new, value in zip(news, (node_id, number == 0, *kind), strict=True):
                    new.append(value)
        for new, old in zip(news, olds, strict=True):
            new += old[at:]
        self.node_ids, self._heads, self.classes, self.gpus, self.boards = news
        starts = list(compress(range(len(self._heads)), self._heads))
        ranges = map(range, starts, [*starts[1:], len(self._heads)])
        self.rows_of = dict(zip(compress(self.node_ids, self._heads), ranges, strict=True))

    def _kinds_of(self, gpus: tuple[Gpu, ...]) -> list[tuple[GpuClass, tuple[Gpu, ...], Board]]:
        """The kinds of GPU of a node, in order of first appearance; one empty kind where there are none."""
        kinds: dict[GpuClass, list[Gpu]] = {} if gpus else {NO_GPU: []}
        for gpu in gpus:
            kinds.setdefault(kind_of(gpu), []).append(gpu)
        if len(self._boards) >= _BOARDS_MAX:
            self._boards.clear()
        found = []
        for kind, of_kind in kinds.items():
            layout = layout_of(of_kind)
            board = self._boards.get(layout)
            if board is None:
                board = self._boards[layout] = board_of(of_kind)
            found.append((kind, tuple(of_kind), board))
        return found

    def _fill(self, node_id: str) -> None:
        facts = self.facts[node_id]
        held = self.occupancy.get(node_id) or Occupancy()
        rows = self.rows_of[node_id]
        domain = number_of(facts.domain)
        profile = self._profiles[node_id]
        for row, (kind, gpus, board) in zip(rows, self._kinds[node_id], strict=True):
            self.gpus[row], self.boards[row] = gpus, board
            self.profile[row], self.kind[row] = profile, number_of_kind(kind)
            self.ready[row] = facts.ready and not facts.held and not facts.cordoned
            self.first[row] = row == rows.start
            self.total[row] = len(gpus)
            self.healthy[row] = sum(1 for gpu in gpus if gpu.healthy)
            self.memory_free[row] = facts.memory_bytes - held.memory_bytes
            self.cpu_free[row] = facts.cpu_milli - held.cpu_milli
            self.domain[row] = domain
            self.price[row] = facts.gpu_hour_price_micros
            self.reclaim[row] = facts.reclaim_per_hour_ppm
            self._fill_gpus(row, held)
            self._touch(row)

    def _fill_gpus(self, row: int, held: Occupancy) -> None:
        found = [share_of(gpu, held) for gpu in self.gpus[row]]
        self.shares[row, : len(found)] = [share for share, _ in found]
        self.teams[row, : len(found)] = [team for _, team in found]
        self.free[row] = sum(1 for _, team in found if team == NOBODY)

    def free_gpus(self, node_id: str) -> tuple[str, ...]:
        """Ids of the node's healthy GPUs that nobody holds, in the driver's order."""
        facts = self.facts.get(node_id)
        if facts is None:
            return ()
        held = self.occupancy[node_id].holders if node_id in self.occupancy else {}
        return tuple(gpu.id for gpu in facts.gpus if gpu.healthy and gpu.id not in held)

    def shareable(self, team: str, gpu_milli: int) -> Bools:
        """Rows with a GPU that can give a fractional runner of `team` so many thousandths."""
        ours = (self.teams == NOBODY) | (self.teams == number_of(team))
        rows: Bools = (ours & (self.shares >= gpu_milli)).any(axis=1)
        return rows

    def rows_running(self, apps: tuple[str, ...]) -> Bools:
        """Rows of nodes where a container serves one of the apps."""
        found: Bools = np.zeros(len(self.node_ids), np.bool_)
        for app in apps:
            for node_id in self.nodes_of_app.get(app, ()):
                rows = self.rows_of.get(node_id)
                if rows is not None:
                    found[rows.start : rows.stop] = True
        return found


def share_of(gpu: Gpu, held: Occupancy) -> tuple[int, int]:
    """Thousandths of a GPU that are free, and the number of the team that may have them."""
    holders = held.holders.get(gpu.id)
    if not gpu.healthy:
        return 0, CLOSED
    if not holders:
        return WHOLE, NOBODY
    teams = {team_of(runner_id): None for runner_id in holders}
    if len(teams) > 1 or not all(holders.values()):
        return 0, CLOSED
    return max(0, WHOLE - sum(holders.values())), number_of(next(iter(teams)))


@lru_cache(maxsize=8192)
def number_of(word: str) -> int:
    """A positive number for a word, the same in every process."""
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big") >> 1 | 1


@lru_cache(maxsize=1024)
def number_of_kind(kind: GpuClass) -> int:
    """A number for a class of GPU, the same in every process."""
    return number_of(repr(kind))


def kind_of(gpu: Gpu) -> GpuClass:
    """What makes GPUs of one node the same to placement."""
    return gpu.model, gpu.memory_bytes, gpu.mig_profile


def _alike(one: tuple[Gpu, ...], other: tuple[Gpu, ...]) -> bool:
    """Whether both make the same rows, as wide."""
    return [kind_of(gpu) for gpu in one] == [kind_of(gpu) for gpu in other]


def _add(table: dict[str, dict[_K, int]], app: str, key: _K, by: int) -> None:
    counts = table.setdefault(app, {})
    counts[key] = counts.get(key, 0) + by
    if not counts[key]:
        del counts[key]
        if not counts:
            del table[app]


def _static(facts: NodeFacts) -> tuple[object, ...]:
    """What filters see of a node, whatever runs there: placement's cached masks depend on nothing else of it."""
    words = tuple(sorted(facts.labels.items())), tuple(sorted(facts.features))
    return facts.pool, facts.driver, facts.host_network, facts.driver_version, facts.cuda_version, *words
