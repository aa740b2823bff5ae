"""An engine for tests of the edges: a real State, scripted replies, effects given out by hand."""

from __future__ import annotations

from collections.abc import Callable

from fal_scheduler.core.events import AssignmentChanged, Command, Effect, News, NodeHello, Reply
from fal_scheduler.core.records import (
    App,
    AssignmentRef,
    Binding,
    Change,
    Goal,
    Meta,
    Node,
    Record,
    Revision,
    Runner,
    Spec,
    key_of,
)
from fal_scheduler.core.state import State


class FakeEngine:
    """Fulfils `EnginePort`. `submitted` and `offered` hold what came; `answer` may be replaced."""

    def __init__(self, cluster_id: str = "c-000000000000") -> None:
        self.view = State()
        self.view.term = 3
        self.view.store_revision = 10
        self.view.meta = Meta(cluster_id, 1, "i-1", 0.0)
        self.submitted: list[Command | NodeHello] = []
        self.offered: list[News] = []
        self.held: set[str] = set()
        self.answer: Callable[[Command | NodeHello], Reply] = lambda event: Reply("done", "")
        self._listeners: list[Callable[[Effect], None]] = []

    async def submit(self, event: Command | NodeHello) -> Reply:
        self.submitted.append(event)
        return self.answer(event)

    def offer(self, event: News) -> None:
        self.offered.append(event)

    def assignments(self, node_id: str) -> tuple[Runner, ...]:
        if node_id in self.held:
            return ()
        return tuple(self.view.runners[i] for i in sorted(self.view.runners_by_node.get(node_id, ())))

    def assignment(self, node_id: str, runner_id: str) -> Runner | None:
        return next((x for x in self.assignments(node_id) if x.id == runner_id), None)

    def subscribe(self, listener: Callable[[Effect], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- for tests

    def emit(self, effect: Effect) -> None:
        for listener in list(self._listeners):
            listener(effect)

    def put(self, record: Record) -> None:
        key = key_of(record)
        before = {key_of(x): x for x in self._like(record)}.get(key)
        self.view.apply(Change(key, before, record))

    def drop(self, record: Record) -> None:
        self.view.apply(Change(key_of(record), record, None))

    def _like(self, record: Record) -> list[Record]:
        tables = (
            self.view.pools, self.view.nodes, self.view.apps, self.view.revisions, self.view.models,
            self.view.runners, self.view.tokens, self.view.revocations,
        )  # fmt: skip
        return [x for table in tables for x in table.values() if type(x) is type(record)]

    def deploy(self, app: str = "t/a", spec: Spec = Spec("host", command=("true",))) -> None:
        self.put(Revision(app, 1, spec, f"{spec}"))
        self.put(App(app, 1))

    def run(self, runner_id: str, node_id: str = "n1", *, app: str = "t/a", goal: Goal = Goal.RUN) -> Runner:
        """Place a runner (durably, as far as sessions can tell) and say so."""
        if node_id not in self.view.nodes:
            self.put(Node(node_id, f"name-{node_id}", "p"))
        runner = Runner(
            runner_id,
            app,
            (Binding(app, 1),),
            0.0,
            node=node_id,
            assignment=AssignmentRef(f"a-{runner_id}", 3),
            goal=goal,
        )
        self.put(runner)
        self.emit(AssignmentChanged(node_id, runner_id))
        return runner
