"""`falctl sim whatif LOG --add-nodes 4xH200 --set app.keep_alive=300`: the requests of a log on another fleet.

Both sides of the comparison are the same model (`whatif_model`) around the production core; `baseline` has none of the
changes. Exit codes: 0 done, 1 the log or a change makes no sense.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import TypeAdapter, ValidationError

from fal_contract.errors import Code, FalError, invalid, not_found
from fal_contract.manifest import AppManifest
from fal_scheduler.core import snapshot
from fal_scheduler.core.events import ApplyApp, Event, NodeHello, ScaleApp
from fal_scheduler.core.log_codec import Packer, Unpacker
from fal_scheduler.core.log_entries import Entry, Loaded
from fal_scheduler.core.records import Change, Node, Revision, ScaleOverride, Scaling, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Capabilities, Gpu, Inventory
from fal_scheduler.decision_files import segments
from fal_scheduler.recovery import recover
from fal_scheduler.sim.whatif_log import Recorded, read
from fal_scheduler.sim.whatif_model import Fleet, Outcome

NODES_MAX: Final = 10_000
_NODES: Final = re.compile(r"(?P<count>\d{1,5})x(?P<model>[^:@]+)(:(?P<gpus>\d{1,2}))?(@(?P<pool>[^:@]+))?")
# Of nodes with a GPU that the log's fleet has not: bytes of one GPU, by what its name has in it; else 80 GB.
_MEMORY_GB: Final = (
    ("B300", 288),
    ("B200", 180),
    ("H200", 141),
    ("A100-40", 40),
    ("L40", 48),
    ("5090", 32),
    ("4090", 24),
)
_CPU_MILLI, _MEMORY_BYTES = 192_000, 2 << 40


@dataclass(frozen=True, slots=True)
class Added:
    """Nodes to add: `gpus` of each (None: as the log's nodes with such GPUs have); empty pool: theirs."""

    count: int
    model: str
    gpus: int | None = None
    pool: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is otherwise. `knobs`: fields of Scaling; `app`: whose, empty for all."""

    added: tuple[Added, ...] = ()
    removed: tuple[str, ...] = ()
    knobs: tuple[tuple[str, int | float], ...] = ()
    app: str = ""

    def concerns(self, app_id: str) -> bool:
        """Whether the knobs are set for this app."""
        return bool(self.knobs) and self.app in ("", app_id)


@dataclass
class Compared:
    """Figures of both sides."""

    baseline: Outcome
    changed: Outcome
    notes: list[str] = field(default_factory=list)

    @property
    def view(self) -> dict[str, object]:
        """For `--json`."""
        return {"baseline": figures(self.baseline), "changed": figures(self.changed), "notes": self.notes}


def figures(outcome: Outcome) -> dict[str, float | int]:
    """What a run comes to. Waits from arrival to the runner; p95 by nearest rank."""
    waits = sorted(outcome.waits)
    rank = -(-95 * len(waits) // 100) - 1
    return {
        "requests": len(waits),
        "mean_wait_s": round(sum(waits) / len(waits), 3) if waits else 0.0,
        "p95_wait_s": round(waits[max(0, rank)], 3) if waits else 0.0,
        "max_wait_s": round(waits[-1], 3) if waits else 0.0,
        "unserved": outcome.unserved,
        "refused": outcome.refused,
        "runner_starts": outcome.starts,
        "loads": outcome.loads,
        "loads_per_request": round(outcome.loads / len(waits), 4) if waits else 0.0,
        "gpu_hours": round(outcome.gpu_s / 3600, 4),
        "gpu_busy": round(outcome.busy_gpu_s / outcome.gpu_s, 4) if outcome.gpu_s else 0.0,
        "cost_micros": round(outcome.cost_micros),
        "hours": round(outcome.seconds / 3600, 4),
    }


def compare(recorded: Recorded, changes: Changes) -> Compared:
    """Run both sides. Raises FalError where a change names what is not there."""
    baseline = _run(recorded, Changes())
    changed = _run(recorded, changes)
    notes = [f"requests as told by {recorded.told_by}; nodes neither fail nor fall silent, runners never crash"]
    seen = {**recorded.durations.cold, **recorded.durations.warm}
    unknown = sorted({one.app for one in recorded.requests} - set(seen))
    if unknown:
        notes.append(f"the log saw no start of {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}: 30 s taken")
    return Compared(baseline, changed, notes)


# --- one side -------------------------------------------------------------------------------------------------------


def _run(recorded: Recorded, changes: Changes) -> Outcome:
    state, standing = _begin(recorded)
    fleet = Fleet(state, recorded.durations, start_s=recorded.start_s, offset_s=recorded.offset_s)
    hellos = {**standing, **{id_: one for id_, one in recorded.hellos.items() if id_ not in standing}}
    _check(state, recorded, changes)
    for name in changes.removed:
        node = state.find_node(name)
        if node is not None:
            fleet.leave(node.id)
    _set_knobs(state, changes)
    removed = set(changes.removed)
    for at_s, node in recorded.nodes:
        if not removed & {node.id, node.name}:
            fleet.at(at_s, fleet.join, node)
    for at_s, command in recorded.commands:
        fleet.at(at_s, fleet.command, _with_knobs(command, changes))
    for at_s, hello in hellos.values():
        fleet.at(at_s, fleet.hello, hello)
    for added in changes.added:
        for node, hello in _made(added, state, recorded, [one for _, one in hellos.values()]):
            at_s = _pool_from(recorded, state, node.pool)
            fleet.at(at_s, fleet.join, node)
            fleet.at(at_s, fleet.hello, hello)
    for number, request in enumerate(recorded.requests):
        fleet.at(request.at_s, fleet.request, request.app, number)
    return fleet.run(recorded.end_s)


def _begin(recorded: Recorded) -> tuple[State, dict[str, tuple[float, NodeHello]]]:
    """A state of its own for one side, and Hellos of the nodes that were connected when it was taken."""
    head = recorded.head
    if isinstance(head, Loaded):
        state = recover(head.records, term=head.term, revision=head.revision, now_s=head.now_s)[0]
        if recorded.founded is not None:
            state.apply(recorded.founded.change)
        return state, {}
    (taken,) = Unpacker().unpack(Packer().pack(head.state))
    state = snapshot.restore(taken)
    standing = {}
    for live in state.live.values():
        if live.connected and live.inventory is not None:
            hello = NodeHello(
                live.node_id, "", live.boot_id, 0.0, inventory=live.inventory, endpoints=live.endpoints,
                capabilities=live.capabilities, statuses=tuple(live.statuses.values()),
            )  # fmt: skip
            standing[live.node_id] = recorded.start_s, hello
    return state, standing


def _check(state: State, recorded: Recorded, changes: Changes) -> None:
    """Names in the changes are there at some time."""
    nodes = {one for _, node in recorded.nodes for one in (node.id, node.name)}
    for name in changes.removed:
        if state.find_node(name) is None and name not in nodes:
            raise not_found("node", name, remedy="Look at `falctl node list`.")
    apps = {command.id for _, command in recorded.commands if isinstance(command, ApplyApp)}
    if changes.app and changes.app not in {*state.apps, *apps}:
        raise not_found("app", changes.app, remedy="Name an app of the log: TEAM/NAME.")


def _set_knobs(state: State, changes: Changes) -> None:
    for revision in list(state.revisions.values()):
        if changes.concerns(revision.app):
            state.apply(Change(key_of(revision), revision, _with_scaling(revision, changes)))
    for app in list(state.apps.values()):
        if changes.concerns(app.id) and app.scale is not None:
            state.apply(Change(key_of(app), app, replace(app, scale=_overridden(app.scale, changes))))


def _with_scaling(revision: Revision, changes: Changes) -> Revision:
    scaling = _scaling(revision.app, revision.spec.scaling, changes)
    return replace(revision, spec=replace(revision.spec, scaling=scaling))


def _scaling(app: str, have: Scaling, changes: Changes) -> Scaling:
    """With the new values. INVALID where an app could not be deployed with them, as it would have no requests then."""
    knobs: dict[str, Any] = dict(changes.knobs)
    new = replace(have, **knobs)
    if new.min_concurrency > new.max_concurrency:
        what = f"gives {app} a min_concurrency of {new.min_concurrency} above its max_concurrency"
        value = ", ".join(f"app.{name.removesuffix('_s')}={one}" for name, one in changes.knobs)
        raise invalid("--set", value, f"{what}, {new.max_concurrency}", remedy="Set both, or name an app with --app.")
    return new


def _overridden(scale: ScaleOverride, changes: Changes) -> ScaleOverride:
    """Run-time values of the knobs give way to the new ones."""
    have: dict[str, Any] = {name: value for name, value in changes.knobs if getattr(scale, name, None) is not None}
    return replace(scale, **have) if have else scale


def _with_knobs(command: Event, changes: Changes) -> Event:
    if isinstance(command, ApplyApp) and changes.concerns(command.id):
        scaling = _scaling(command.id, command.spec.scaling, changes)
        return replace(command, spec=replace(command.spec, scaling=scaling))
    if isinstance(command, ScaleApp) and changes.concerns(command.id):
        return replace(command, scale=_overridden(command.scale, changes))
    return command


def _made(added: Added, state: State, recorded: Recorded, hellos: Sequence[NodeHello]) -> list[tuple[Node, NodeHello]]:
    """Nodes like the log's first with such GPUs, else of a plausible shape."""
    pattern = next((one for one in hellos if any(added.model in gpu.model for gpu in one.inventory.gpus)), None)
    records = {**{node.id: node for _, node in recorded.nodes}, **state.nodes}
    inventory, capabilities = _shape(added, pattern)
    pool = added.pool or (records[pattern.node_id].pool if pattern is not None and pattern.node_id in records else "")
    pools = [*state.pools, *(one.pool for one in records.values())]
    if pool not in pools and (added.pool or not pools):
        raise not_found("pool", added.pool, remedy="Name one of the log's: --add-nodes 4xH200@POOL.")
    made = []
    for number in range(1, added.count + 1):
        id_ = f"whatif-{added.model}-{number:05d}"
        gpus = {gpu.id: f"{id_}-{at}" for at, gpu in enumerate(inventory.gpus)}
        own = tuple(
            replace(
                gpu, id=gpus[gpu.id], healthy=True,
                links=tuple(replace(link, peer_id=gpus.get(link.peer_id, "")) for link in gpu.links),
            )
            for gpu in inventory.gpus
        )  # fmt: skip
        node = Node(id_, id_, pool or pools[0], joined_at_s=recorded.start_s)
        hello = NodeHello(
            id_, "", f"boot-{id_}", 0.0, inventory=replace(inventory, gpus=own), capabilities=capabilities
        )
        made.append((node, hello))
    return made


def _shape(added: Added, pattern: NodeHello | None) -> tuple[Inventory, Capabilities]:
    if pattern is not None:
        like = [gpu for gpu in pattern.inventory.gpus if added.model in gpu.model]
        count = len(like) if added.gpus is None else added.gpus
        gpus = tuple(replace(like[at % len(like)], id=f"g{at}", index=at) if at >= len(like) else like[at]
                     for at in range(count))  # fmt: skip
        return replace(pattern.inventory, gpus=gpus), pattern.capabilities
    memory = next((size for name, size in _MEMORY_GB if name in added.model), 80) * 10**9
    gpus = tuple(Gpu(f"g{at}", added.model, memory, index=at) for at in range(8 if added.gpus is None else added.gpus))
    return Inventory(1, gpus, cpu_milli=_CPU_MILLI, memory_bytes=_MEMORY_BYTES), Capabilities(features=("images",))


def _pool_from(recorded: Recorded, state: State, pool: str) -> float:
    """From when on a node of this pool can join: at once, or with the pool's first node."""
    if pool in state.pools:
        return recorded.start_s
    return min((at_s for at_s, node in recorded.nodes if node.pool == pool), default=recorded.start_s)


# --- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `fal_scheduler.sim.__main__`."""
    parser.add_argument("log", type=Path, help="a segment, or a folder of them (DATA/decisions)")
    parser.add_argument("--add-nodes", action="append", default=[], metavar="NxGPU[:GPUS][@POOL]", help="4xH200")
    parser.add_argument("--remove-node", action="append", default=[], metavar="NODE", help="id or name")
    parser.add_argument("--set", action="append", default=[], metavar="app.KNOB=VALUE", help="app.keep_alive=300")
    parser.add_argument("--app", default="", help="whose knobs are set; all apps' without it")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """See `fal_scheduler.sim.__main__`."""
    changes = Changes(
        tuple(parse_nodes(text) for text in args.add_nodes),
        tuple(args.remove_node),
        tuple(parse_knob(text) for text in args.set),
        args.app,
    )
    if not (changes.added or changes.removed or changes.knobs):
        raise FalError(
            Code.INVALID, "nothing is to be changed", remedy="Give --add-nodes, --remove-node or --set app.KNOB=VALUE."
        )
    compared = compare(read(_entries(args.log)), changes)
    print(json.dumps({"whatif": compared.view}) if args.json else _table(compared))
    return 0


def _entries(path: Path) -> Iterable[Entry]:
    for segment in segments(path):
        yield from segment.entries()


def parse_nodes(text: str) -> Added:
    """`4xH200`, `2xH100:4@east`. Raises INVALID."""
    found = _NODES.fullmatch(text)
    if found is None or not 1 <= int(found["count"]) <= NODES_MAX or found["gpus"] == "0":
        raise invalid(
            "--add-nodes", text, "is no NUMBERxGPU[:GPUS][@POOL]", remedy="For instance 4xH200 or 2xH100:4@p."
        )
    return Added(
        int(found["count"]), found["model"], int(found["gpus"]) if found["gpus"] else None, found["pool"] or ""
    )


def parse_knob(text: str) -> tuple[str, int | float]:
    """`app.keep_alive=300` as field of Scaling and value. Raises INVALID."""
    name, _, value = text.removeprefix("app.").partition("=")
    kinds = {one.name: type(one.default) for one in fields(Scaling)}
    known = name if name in kinds else f"{name}_s"
    if not text.startswith("app.") or known not in kinds:
        knobs = ", ".join(f"app.{one.removesuffix('_s')}" for one in kinds)
        raise invalid("--set", text, "names no knob", remedy=f"Knobs: {knobs}.")
    try:
        number = float(value) if kinds[known] is float else int(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 10**9:
        raise invalid("--set", text, "has no such value", remedy="Give a number, for instance app.keep_alive=300.")
    bounded: Any = Annotated[(kinds[known], *AppManifest.model_fields[known.removesuffix("_s")].metadata)]
    try:
        TypeAdapter(bounded).validate_python(number)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
        raise invalid("--set", text, f"has no such value: it {why}", remedy="Give what a manifest may say.") from None
    return known, number


def _table(compared: Compared) -> str:
    baseline, changed = figures(compared.baseline), figures(compared.changed)
    lines = [f"{'':<20}{'baseline':>14}{'changed':>14}{'change':>10}"]
    for name, before in baseline.items():
        after = changed[name]
        share = f"{(after - before) / before:+.0%}" if before and before != after else ""
        lines.append(f"{name:<20}{before:>14,}{after:>14,}{share:>10}")
    return "\n".join([*lines, *(f"note: {note}" for note in compared.notes)])


__all__ = ["Added", "Changes", "add_arguments", "compare", "figures", "parse_knob", "parse_nodes", "run"]
