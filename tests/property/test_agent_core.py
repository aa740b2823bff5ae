"""The agent's core: chained sets, admission, and a task's life under any order of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_agent.core.admission import GpuView, NodeView, admit
from fal_agent.core.assignments import Assignment, Assignments, Complete, Delta, Gap, Goal, receive
from fal_agent.core.standing import Leader, Standing, distrust, obey, stale, works_for
from fal_agent.core.tasks import (
    Action,
    Exit,
    Phase,
    RunnerState,
    Task,
    advance,
    assign,
    collected,
    exited,
    fail,
    ready,
    started,
    state_of,
    step,
    why,
)
from fal_contract.v1 import state_pb2

RUNNERS = ["t/a-1", "t/b-2", "t/c-3"]
runner_ids = st.sampled_from(RUNNERS)


def assignment(runner: str = "t/a-1", **changes: object) -> Assignment:
    return replace(Assignment(id=f"as-{runner}", term=1, runner_id=runner), **changes)  # type: ignore[arg-type]


assignments = st.builds(
    lambda runner, n, goal: assignment(runner, id=f"as-{n}", goal=goal),
    runner_ids, st.integers(0, 3), st.sampled_from(Goal),
)  # fmt: skip


def test_the_numbers_are_those_of_the_wire() -> None:
    assert {f"GOAL_{g.name}": g.value for g in Goal}.items() <= dict(state_pb2.Goal.items()).items()
    assert {f"RUNNER_STATE_{s.name}": s.value for s in RunnerState}.items() <= dict(
        state_pb2.RunnerState.items()
    ).items()


# ---- the chained set


@given(st.lists(st.tuples(st.lists(assignments, max_size=3), st.lists(runner_ids, max_size=2)), max_size=8))
def test_deltas_build_the_same_set_as_the_scheduler_holds(
    changes: list[tuple[list[Assignment], list[str]]],
) -> None:
    wanted: dict[str, Assignment] = {}
    have = receive(Assignments(), Complete(1, 1, 1, ()))
    for n, (put, drop) in enumerate(changes, start=1):
        for id in drop:
            wanted.pop(id, None)
        wanted |= {a.runner_id: a for a in put}
        have = receive(have, Delta(n, n + 1, 1, 1, tuple(put), tuple(drop)))
    assert dict(have.by_runner) == wanted
    assert have.revision == len(changes) + 1


@given(st.integers(0, 5), st.integers(0, 5))
def test_a_delta_for_another_revision_is_a_gap(have: int, base: int) -> None:
    if have == base and have:
        assert receive(Assignments(have), Delta(base, base + 1, 1, 1)).revision == base + 1
    else:
        with pytest.raises(Gap):
            receive(Assignments(have), Delta(base, base + 1, 1, 1))


# ---- whom to obey


def test_a_new_node_joins_and_a_foreign_or_older_cluster_is_not_obeyed() -> None:
    ours = obey(Standing(), Leader("c1", 2, 5, "i1"), 5)
    assert ours == Standing("c1", 2, 5)
    assert distrust(ours, Leader("c1", 2, 5, "i1")) == ""
    assert "epoch 1" in distrust(ours, Leader("c1", 1, 9, "i1"))
    assert "c2" in distrust(ours, Leader("c2", 9, 9, "i2"))
    assert distrust(ours, Leader("", 9, 9, "i2"))
    taken = Leader("c2", 1, 9, "i2", accepted_clusters=("c1",))
    assert distrust(ours, taken) == ""
    assert obey(ours, taken, 9) == Standing("c2", 1, 9)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20))
def test_standing_never_falls(words: list[tuple[int, int]]) -> None:
    standing = Standing("c", 1, 1)
    for epoch, term in words:
        leader = Leader("c", epoch, term, "i")
        if distrust(standing, leader) or stale(standing, term):
            continue
        after = works_for(obey(standing, leader, term), leader, term)
        assert (after.epoch, after.term, after.store_revision) >= (standing.epoch, standing.term, 0)
        assert after.term >= standing.term
        assert after.epoch >= standing.epoch
        standing = after


def test_the_store_revision_is_of_one_store() -> None:
    leader = Leader("c", 1, 1, "i1")
    seen = works_for(Standing("c", 1, 1), leader, 50)
    assert works_for(seen, leader, 40).store_revision == 50
    assert works_for(seen, replace(leader, incarnation="i2"), 3) == replace(seen, incarnation="i2", store_revision=3)


# ---- admission

GPUS = {f"GPU-{i}": GpuView(f"GPU-{i}") for i in range(4)}
NODE = NodeView(gpus=GPUS, memory_bytes=1000, cpu_milli=4000, term_seen=3)


@given(
    st.lists(
        st.builds(
            lambda n, gpus, memory: assignment(f"t/r-{n}", gpus=tuple(gpus), memory_bytes=memory),
            st.integers(0, 9), st.sets(st.sampled_from(sorted(GPUS)), max_size=3), st.integers(0, 600),
        ),
        max_size=12,
    ),
    st.sets(st.integers(0, 9)),
)  # fmt: skip
def test_no_gpu_and_no_byte_is_given_twice(asked: list[Assignment], over: set[int]) -> None:
    tasks: dict[str, Task] = {}
    for wish in asked:
        if wish.runner_id in tasks and tasks[wish.runner_id].live:
            continue
        if admit(wish, NODE, tasks.values(), leader_term=3) is None:
            gone = int(wish.runner_id[-1]) in over
            tasks[wish.runner_id] = Task(wish, phase=Phase.GONE if gone else Phase.SERVING)
    held = [gpu for task in tasks.values() if task.live for gpu in task.assignment.gpus]
    assert len(held) == len(set(held))
    assert sum(t.assignment.memory_bytes for t in tasks.values() if t.live) <= NODE.memory_bytes


@pytest.mark.parametrize(
    ("wish", "node", "leader_term", "code", "words"),
    [
        (assignment(), NODE, 2, "STALE_TERM", "term 3 was seen"),
        (assignment(term=9), NODE, 3, "STALE_TERM", "term 9"),
        (assignment(), replace(NODE, distrust="foreign"), 3, "FAILED_PRECONDITION", "foreign"),
        (assignment(goal=Goal.STOP), NODE, 3, "NOT_FOUND", "nothing runs here"),
        (assignment(gpus=("GPU-9",)), NODE, 3, "NOT_FOUND", "GPU-9"),
        (assignment(gpus=("GPU-1", "GPU-1")), NODE, 3, "INVALID", "twice"),
        (assignment(gpus=("GPU-0",)), NODE, 3, "CONFLICT", "held by runner t/held"),
        (assignment(image="x"), NODE, 3, "FAILED_PRECONDITION", "image 'x'"),
        (assignment(network="egress"), replace(NODE, networks=frozenset({"none"})), 3, "FAILED_PRECONDITION", "egress"),
        (assignment(memory_bytes=2000), NODE, 3, "NO_CAPACITY", "MiB asked"),
        (assignment(cpu_milli=9000), NODE, 3, "NO_CAPACITY", "9000 mCPU"),
        (assignment(gpus=("GPU-1",)), replace(NODE, gpus={"GPU-1": GpuView("GPU-1", "ECC")}), 3,
         "FAILED_PRECONDITION", "ECC"),
        (assignment(gpus=("GPU-1",)), replace(NODE, gpus={"GPU-1": GpuView("GPU-1", pids=(7,))}), 3,
         "CONFLICT", "process 7"),
        (assignment(gpus=("GPU-1",)), replace(NODE, gpus={"GPU-1": GpuView("GPU-1", "", 2 << 30)}), 3,
         "CONFLICT", "2048 MiB"),
    ],
)  # fmt: skip
def test_refusals_name_the_reason(wish: Assignment, node: NodeView, leader_term: int, code: str, words: str) -> None:
    # An orphan of which only the container and its side file are known holds its GPU like any runner.
    orphan = Task(assignment("t/held", gpus=("GPU-0",)), phase=Phase.STARTED, orphan=True)
    refusal = admit(wish, node, [orphan], leader_term=leader_term)
    assert refusal is not None
    assert refusal.code == code
    assert words in refusal.reason


def test_an_older_placement_in_a_new_leaders_set_is_admitted() -> None:
    assert admit(assignment(term=1), NODE, [], leader_term=3) is None


# ---- a task's life

moves = st.sampled_from(["step", "exit", "fail", "drain", "stop", "kill", "run", "old", "time"])


@given(st.lists(moves, max_size=40))
def test_phases_only_rise_and_only_goals_or_failures_stop(events: list[str]) -> None:
    task, now_s = Task(assignment(startup_timeout_s=5)), 0.0
    stop_wanted = False
    for event in events:
        before = task
        match event:
            case "step":
                action = step(task, now_s)
                if action in (Action.STOP, Action.KILL, Action.DRAIN):
                    assert stop_wanted or task.failure
                task = perform(task, action, now_s)
            case "exit":
                task = exited(task, Exit(1))
            case "fail":
                task = fail(task, "it broke")
            case "time":
                now_s += 3
            case "old":
                task = assign(task, replace(task.assignment, term=0, goal=Goal.KILL))
                assert task == before
            case _:
                goal = Goal[event.upper()]
                stop_wanted |= goal > Goal.RUN and task.phase < Phase.EXITED
                task = assign(task, replace(task.assignment, goal=goal))
        assert task.phase >= before.phase
        assert task.goal >= before.goal or task.phase >= Phase.EXITED
        assert state_of(task, 0) >= state_of(before, 0)
        assert why(task) or task.phase in (Phase.READY, Phase.SERVING, Phase.DRAINED) or task.phase >= Phase.EXITED


def perform(task: Task, action: Action | None, now_s: float) -> Task:
    """What the edge does, always successful."""
    match action:
        case Action.STAGE:
            return advance(task, Phase.STAGED, move=action)
        case Action.CREATE:
            return advance(task, Phase.CREATED, move=action)
        case Action.START:
            return started(task, now_s=now_s, started_at_s=1.0, seconds=0)
        case Action.PROBE:
            return ready(task, ready_at_s=2.0, seconds=0)
        case Action.EXPIRE:
            return fail(task, "not ready in time")
        case Action.REGISTER:
            return advance(task, Phase.SERVING)
        case Action.DRAIN:
            return advance(task, Phase.DRAINED)
        case Action.STOP | Action.KILL:
            return exited(task, Exit(0))
        case Action.COLLECT:
            return collected(task, ("bye",))
        case Action.REMOVE:
            return advance(task, Phase.REMOVED)
        case Action.RELEASE:
            return advance(task, Phase.GONE)
        case None:
            return task


@pytest.mark.parametrize("goal", list(Goal))
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("failure", ["", "it broke"])
def test_every_task_comes_to_rest(goal: Goal, phase: Phase, failure: str) -> None:
    task = Task(assignment(goal=goal), phase=phase, ready_by_s=10, failure=failure)
    actions = []
    while (action := step(task, 0.0)) is not None:
        actions.append(action)
        task = perform(task, action, 0.0)
        assert len(actions) < 12
    resting = Phase.SERVING if goal is Goal.RUN and not failure and phase <= Phase.SERVING else Phase.GONE
    if goal is Goal.RUN and not failure and phase is Phase.DRAINED:
        resting = Phase.DRAINED
    assert task.phase is resting
    assert len(actions) == len(set(actions))


def test_a_container_of_which_only_the_id_is_known_is_left_alone_until_told() -> None:
    orphan = Task(Assignment("", 0, "t/x-1"), phase=Phase.STARTED, known=False, orphan=True)
    assert step(orphan, 1e9) is None
    assert state_of(orphan, 3) is RunnerState.SETUP
    stopped = assign(orphan, assignment("t/x-1", goal=Goal.STOP))
    assert step(stopped, 0.0) is Action.STOP
    assert not stopped.orphan


def test_adoption_keeps_what_the_container_holds() -> None:
    task = Task(assignment(gpus=("GPU-1",), memory_bytes=7), phase=Phase.SERVING, orphan=True)
    adopted = assign(task, assignment(id="as-new", term=4, gpus=("GPU-2",), memory_bytes=9))
    assert (adopted.assignment.id, adopted.assignment.gpus, adopted.assignment.memory_bytes) == (
        "as-new",
        ("GPU-1",),
        7,
    )
    assert adopted.phase is Phase.SERVING


def test_requests_make_the_difference_between_idle_and_running() -> None:
    task = Task(assignment(), phase=Phase.SERVING)
    assert (state_of(task, 0), state_of(task, 1)) == (RunnerState.IDLE, RunnerState.RUNNING)
