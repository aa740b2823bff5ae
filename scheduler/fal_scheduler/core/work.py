"""One step under way: the changes it makes, the effects it will have, the apps it touched.

Pure. Made by `step`, handed to commands, news, liveness and reconcile, which change the state only through it. All
that it changed in records can be taken back (`undo`); what was told stays told.
"""

from __future__ import annotations

from fal_scheduler.core import expectations, usage
from fal_scheduler.core.events import (
    AlarmsChanged,
    AppChanged,
    AssignmentChanged,
    Effect,
    IdSource,
    Logged,
    ModelChanged,
    Moment,
    NodeChanged,
    RouteChanged,
    WishesChanged,
)
from fal_scheduler.core.records import App, Change, Model, Node, Record, Revision, Runner, Wish, key_of
from fal_scheduler.core.state import State
from fal_scheduler.core.told import Alarm

# Changes of one step. The store takes 100 operations in a commit; a command adds a few of its own to these.
CHANGES_PER_STEP_MAX = 80


class Work:
    """Collects what one step does. `by_operator` is the operator's name while one of their commands is carried out."""

    def __init__(self, state: State, moment: Moment, ids: IdSource, *, by_operator: str = "") -> None:
        self.state = state
        self.moment = moment
        self.ids = ids
        self.by_operator = by_operator
        self.changes: list[Change] = []
        self.effects: dict[Effect | int, Effect] = {}

    @property
    def full(self) -> bool:
        """True when this step may change no more; the rest is another step's."""
        return len(self.changes) >= CHANGES_PER_STEP_MAX

    def put(self, record: Record, before: Record | None) -> None:
        """Make `record`, or change it from `before`."""
        self._change(Change(key_of(record), before, record))

    def drop(self, record: Record) -> None:
        """Remove `record`."""
        self._change(Change(key_of(record), record, None))

    def _change(self, change: Change) -> None:
        self.state.apply(change)
        self.changes.append(change)
        before, after = change.before, change.after
        match after if after is not None else before:
            case Runner() as runner:
                assert before is None or isinstance(before, Runner)
                assert after is None or isinstance(after, Runner)
                self._runner_changed(runner, before, after)
            case Node() as node:
                self.emit(NodeChanged(node.id))
            case App() as app:
                self.emit(AppChanged(app.id))
            case Revision() as revision:
                self.emit(AppChanged(revision.app))
            case Model() as model:
                self.emit(ModelChanged(model.id))
            case Wish() as wish:
                self.emit(WishesChanged(wish.model))
            case _:
                pass

    def _runner_changed(self, runner: Runner, before: Runner | None, after: Runner | None) -> None:
        state = self.state
        if before is not None and _assignment_ends(before, after):
            usage.note_end(self, before)
        if before is not None and before.node and (after is None or after.node != before.node):
            self.emit(AssignmentChanged(before.node, runner.id))
            self.capacity_grew(before.node)
            self._lived(before)
        if after is not None and after.node:
            self.emit(AssignmentChanged(after.node, runner.id))
            if before is None or after.assignment != before.assignment:
                expectations.placed(state, after, now_s=self.moment.now_s)
        else:
            expectations.forget(state, runner.id)
        if after is None or after.node:
            state.failures.pop(runner.id, None)
        if after is None:
            state.abandoned.pop(runner.id, None)
            state.returned.pop(runner.id, None)
        if after is None or not after.node:
            state.demand.forget_runner(runner.id)
        for one in (before, after):
            if one is not None:
                state.dirty.update(dict.fromkeys(one.apps))
        self.emit(RouteChanged(runner.id))

    def _lived(self, gone: Runner) -> None:
        """A runner left its node: how long it was there counts for what its app's next ones are expected to cost."""
        state = self.state
        if gone.app not in state.apps:
            return
        status = state.status_of(gone)
        began_s = status.started_at_s if status is not None and status.started_at_s else gone.created_at_s
        lived_s = max(1, int(self.moment.wall_s - began_s))
        state.lifetimes[gone.app] = (3 * state.lifetimes.get(gone.app, lived_s) + lived_s) // 4

    def capacity_grew(self, node_id: str = "") -> None:
        """Something became free on a node, or (without one) something was allowed that may concern everybody.

        Runners that wait for a node and could be admitted by it are tried again (`core.waiting`).
        """
        if node_id:
            self.state.freed[node_id] = None
        else:
            self.state.freed_all = True
        self.state.capacity_at_s = self.moment.now_s

    def emit(self, effect: Effect) -> None:
        """Give `effect` out after the commit; the same one counts once."""
        self.effects[effect] = effect

    def log(self, kind: str, subject: str, message: str, **facts: str) -> None:
        """An event that an operator may read."""
        event = Logged(kind, subject, message, self.moment.wall_s, self.by_operator, facts)
        self.effects[-len(self.effects) - 1] = event

    def alarm(self, kind: str, subject: str, message: str, remedy: str) -> None:
        """Raise an alarm, or bring its text up to date; it is logged once."""
        have = self.state.alarms.get((kind, subject))
        if have is not None and have.message == message:
            return
        since_s = have.since_s if have is not None else self.moment.wall_s
        self.state.alarms[kind, subject] = Alarm(kind, subject, message, remedy, since_s)
        self.emit(AlarmsChanged())
        if have is None:
            self.log(kind, subject, f"{message}. {remedy}")

    def settle(self, kind: str, subject: str) -> bool:
        """Take an alarm back; True where it stood."""
        if self.state.alarms.pop((kind, subject), None) is None:
            return False
        self.emit(AlarmsChanged())
        return True

    def undo(self) -> None:
        """Take every change of records back."""
        while self.changes:
            self.state.apply(self.changes.pop().undone())


def _assignment_ends(before: Runner, after: Runner | None) -> bool:
    if before.assignment is None:
        return False
    return after is None or after.assignment is None or after.assignment.id != before.assignment.id
