"""The operators' API over a real engine and a store in memory: what it does, and every refusal it owes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.rpc_guard import STANDARD_METHODS, unguarded
from fal_contract.v1 import cluster_pb2, state_pb2
from fal_scheduler.api import apps, explain, join_tokens, nodes, pools, runners, status, weights
from fal_scheduler.api.roles import ROLES
from fal_scheduler.api.service import services
from fal_scheduler.leadership import CurrentLeadership
from scheduler_rig import ACTOR, Agent, Test, app_request, deployed, eventually, join, leading, ready, status_of


def api_test(folder: Path, test: Test) -> None:
    async def body() -> None:
        async with leading(folder) as leader:
            await test(leader)

    asyncio.run(body())


async def refused(call: object) -> FalError:
    async def make() -> None:
        result = call()  # type: ignore[operator]
        if asyncio.iscoroutine(result):
            await result

    with pytest.raises(FalError) as caught:
        await make()
    return caught.value


def test_deploy_list_scale_delete(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            reply = await apps.apply_app(leader, app_request(runners=2), ACTOR)
            assert (reply.outcome, reply.app.app.revision, list(reply.changes)) == ("created", 1, [])
            assert reply.app.revision.created_by == ACTOR
            await eventually(lambda: ready(leader) == 2)
            listed = runners.list_runners(leader, cluster_pb2.ListRunnersRequest(app="t/a"))
            assert [x.node_name for x in listed.runners] == ["name-n1"] * 2
            assert len({gpu for x in listed.runners for gpu in x.runner.gpus}) == 2
            view = await apps.scale_app(
                leader,
                cluster_pb2.ScaleAppRequest(id="t/a", scale=state_pb2.ScaleOverride(min_concurrency=3)),
                ACTOR,
            )
            assert view.wanted == 3
            await eventually(lambda: ready(leader) == 3)
            same = await apps.apply_app(leader, app_request(runners=2), ACTOR)
            assert same.outcome == "unchanged"
            assert any("scaling values set at run time" in x for x in same.warnings)
            changed = await apps.apply_app(leader, app_request(runners=2, env={"X": "1"}), ACTOR)
            assert (changed.outcome, changed.app.app.revision) == ("changed", 2)
            assert [(x.field, x.before, x.after) for x in changed.changes] == [("env.X", "", "1")]
            gone = await apps.delete_app(leader, cluster_pb2.DeleteAppRequest(id="t/a"), ACTOR)
            assert gone.runners >= 3
            await eventually(lambda: not leader.view.apps and not agent.statuses)

    api_test(tmp_path, test)


def test_plan_changes_nothing(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1"):
            plan = apps.plan_app(leader, app_request())
            assert (plan.outcome, plan.HasField("app"), plan.placement.feasible) == ("created", False, 1)
            assert not leader.view.apps
            await deployed(leader)
            plan = apps.plan_app(leader, app_request(num_gpus=16))
            assert plan.outcome == "changed"
            assert [x.field for x in plan.changes] == ["num_gpus"]
            assert plan.placement.feasible == 0
            assert any("no runner can be placed now" in x for x in plan.warnings)
            assert apps.plan_app(leader, app_request()).outcome == "unchanged"
            assert len(leader.view.revisions) == 1

    api_test(tmp_path, test)


def test_two_operators_at_once_the_second_sees_a_conflict(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await apps.apply_app(leader, app_request(expected=0), ACTOR)
        generation = leader.view.apps["t/a"].generation
        both = await asyncio.gather(
            apps.apply_app(leader, app_request(env={"A": "1"}, expected=generation), "operator/ada"),
            apps.apply_app(leader, app_request(env={"B": "1"}, expected=generation), "operator/bob"),
            return_exceptions=True,
        )
        conflicts = [x for x in both if isinstance(x, FalError)]
        assert [x.code for x in conflicts] == [Code.CONFLICT]
        assert len(leader.view.revisions) == 2
        app = leader.view.apps["t/a"]
        assert leader.view.revision_of(app).spec.env == {"A": "1"}
        again = await refused(lambda: apps.apply_app(leader, app_request(expected=0), ACTOR))
        assert again.code is Code.CONFLICT
        assert (await refused(lambda: apps.plan_app(leader, app_request(expected=0)))).code is Code.CONFLICT

    api_test(tmp_path, test)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        calls = [
            lambda: apps.delete_app(leader, cluster_pb2.DeleteAppRequest(id="t/no"), ACTOR),
            lambda: apps.get_app(leader, cluster_pb2.GetAppRequest(id="t/no")),
            lambda: apps.scale_app(leader, cluster_pb2.ScaleAppRequest(id="t/no"), ACTOR),
            lambda: runners.get_runner(leader, cluster_pb2.GetRunnerRequest(id="t/no-1")),
            lambda: runners.stop_runner(leader, cluster_pb2.StopRunnerRequest(id="t/no-1"), ACTOR),
            lambda: weights.get_model(leader, cluster_pb2.GetModelRequest(id="t/no")),
            lambda: nodes.list_nodes(leader, cluster_pb2.ListNodesRequest(node="no")),
            lambda: nodes.list_nodes(leader, cluster_pb2.ListNodesRequest(pool="no")),
            lambda: nodes.cordon_node(leader, cluster_pb2.CordonNodeRequest(node="no"), ACTOR),
            lambda: nodes.revoke_node(leader, cluster_pb2.RevokeNodeRequest(node="no"), ACTOR),
            lambda: join_tokens.revoke_token(leader, cluster_pb2.RevokeTokenRequest(id="no"), ACTOR),
            lambda: join_tokens.create_token(
                leader, cluster_pb2.CreateTokenRequest(pool="no", ttl_s=60, uses=1), ACTOR
            ),
            lambda: explain.explain(leader, cluster_pb2.ExplainRequest(subject="no")),
            lambda: apps.apply_app(leader, app_request(model="no-such-model"), ACTOR),
            lambda: apps.plan_app(leader, app_request(model="no-such-model")),
        ]
        for number, call in enumerate(calls):
            error = await refused(call)
            assert error.code is Code.NOT_FOUND, (number, error)
            assert error.remedy
        assert not leader.view.apps

    api_test(tmp_path, test)


@pytest.mark.parametrize(
    ("field", "value"),
    [("network", "lan"), ("num_gpus", 99), ("image", ""), ("machine_type", ["A", "A"]), ("termination_grace_s", -1.0)],
)
def test_a_bad_spec_is_refused_before_anything_changes(tmp_path: Path, field: str, value: object) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        request = app_request()
        if isinstance(value, list):
            getattr(request.spec, field).extend(value)
        else:
            setattr(request.spec, field, value)
        error = await refused(lambda: apps.apply_app(leader, request, ACTOR))
        assert error.code is Code.INVALID
        assert error.remedy
        assert not leader.view.apps

    api_test(tmp_path, test)


def test_ids_that_are_none_are_refused(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        for bad in ("", "noteam", "t/", "/a", "T/a", "t/a/b", "t/../x"):
            request = app_request()
            request.id = bad
            assert (await refused(lambda request=request: apps.apply_app(leader, request, ACTOR))).code is Code.INVALID
        assert not leader.view.apps

    api_test(tmp_path, test)


def test_a_gpu_that_no_node_has_waits_with_a_reason(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1"):
            reply = await apps.apply_app(leader, app_request(machine_type=["H200-141GB"]), ACTOR)
            assert any("H200-141GB" in x for x in reply.warnings)
            await eventually(lambda: "H200-141GB" in apps.get_app(leader, cluster_pb2.GetAppRequest(id="t/a")).reason)
            (view,) = runners.list_runners(leader, cluster_pb2.ListRunnersRequest()).runners
            assert view.state == state_pb2.RUNNER_STATE_PENDING
            assert "H100-80GB" in view.placement.nearest_miss
            why = explain.explain(leader, cluster_pb2.ExplainRequest(subject="t/a"))
            assert (why.kind, why.verdicts[0].node_name, why.verdicts[0].filter) == ("app", "name-n1", "gpu-model")
            why = explain.explain(leader, cluster_pb2.ExplainRequest(subject=view.runner.id))
            assert why.kind == "runner"
            assert "PENDING" in why.summary
            await apps.apply_app(leader, app_request("b", num_gpus=16), ACTOR)
            await eventually(lambda: "16" in apps.get_app(leader, cluster_pb2.GetAppRequest(id="t/b")).reason)

    api_test(tmp_path, test)


def test_models_are_listed_hashed_and_attested(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        folder = tmp_path / "m"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"w" * 1000)

        async def add(name: str, uri: str = f"file://{folder}", **more: str) -> cluster_pb2.ModelView:
            return await weights.add_model(leader, cluster_pb2.AddModelRequest(id=name, uri=uri, **more), ACTOR)  # type: ignore[arg-type]

        view = await add("t/m")
        assert view.model.state == state_pb2.MODEL_STATE_ATTESTED
        assert [(x.path, x.bytes) for x in view.files] == [("weights.safetensors", 1000)]
        assert (await add("t/m")).model.manifest_digest == view.model.manifest_digest  # the same again
        for bad in (
            lambda: add("t/x", "ftp://host/model"),
            lambda: add("t/x", "push://t/x"),
            lambda: add("t/x", kind="adapter"),
            lambda: add("t/x", revision="main"),
            lambda: add("x"),
        ):
            assert (await refused(bad)).code is Code.INVALID
        (folder / "more.safetensors").write_bytes(b"m")
        assert (await refused(lambda: add("t/m"))).code is Code.ALREADY_EXISTS
        (folder / "more.safetensors").unlink()
        (folder / "weights.safetensors").write_bytes(b"v" * 1000)
        assert (await refused(lambda: add("t/m"))).code is Code.ALREADY_EXISTS
        assert [x.model.id for x in weights.list_models(leader, cluster_pb2.ListModelsRequest(team="t")).models] == [
            "t/m"
        ]
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            await deployed(leader, model="m")
            (held,) = agent.held.values()
            assert held.artifacts[0].manifest_digest == view.model.manifest_digest
            assert held.artifacts[0].manifest.files[0].path == "weights.safetensors"
            assert weights.get_model(leader, cluster_pb2.GetModelRequest(id="t/m")).apps == ["t/a"]

    api_test(tmp_path, test)


def test_a_new_leader_goes_on_hashing(tmp_path: Path) -> None:
    from fal_scheduler.core.model_events import AddModel
    from fal_scheduler.core.records import Model
    from fal_scheduler.store.memory import MemoryBackend, MemoryStore

    async def body() -> None:
        folder = tmp_path / "m"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"w")
        backend = MemoryBackend()
        async with leading(tmp_path, MemoryStore(backend)) as leader:  # dies between the two commits
            await leader.engine.submit(AddModel(Model("t/m", "model", f"file://{folder}", bytes=1, files=1)))
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            await eventually(lambda: bool(leader.view.models["t/m"].manifest_digest))

    asyncio.run(body())


def test_a_standby_without_the_manifest_makes_it_anew(tmp_path: Path) -> None:
    from fal_scheduler.store.memory import MemoryBackend, MemoryStore

    async def body() -> None:
        folder = tmp_path / "m"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"w")
        backend = MemoryBackend()
        request = cluster_pb2.AddModelRequest(id="t/m", uri=f"file://{folder}")
        async with leading(tmp_path / "one", MemoryStore(backend)) as leader:
            id_ = (await weights.add_model(leader, request, ACTOR)).model.artifact_id
            await join(leader, "n1")
        (tmp_path / "two").mkdir()
        (tmp_path / "one" / "identity").rename(tmp_path / "two" / "identity")
        async with leading(tmp_path / "two", MemoryStore(backend)) as leader:
            await eventually(lambda: leader.manifests.has(id_))
            async with Agent(leader, "n1") as agent:
                await deployed(leader, model="m")
                (held,) = agent.held.values()
                assert held.artifacts[0].manifest.files[0].path == "weights.safetensors"
        (tmp_path / "two" / "blobs" / id_).unlink()
        (folder / "weights.safetensors").write_bytes(b"v")  # not what was attested: stays missing, and is told
        async with leading(tmp_path / "two", MemoryStore(backend)) as leader:
            view = weights.get_model(leader, cluster_pb2.GetModelRequest(id="t/m"))
            assert "does not exist on this scheduler" in view.model.reason
            await eventually(lambda: leader.models.idle)
            assert not leader.manifests.has(id_)
            assert leader.models.wanted == (id_,)

    asyncio.run(body())


def test_nodes_by_id_or_name_cordon_and_revoke(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        for node_id in ("n1", "n2"):
            await join(leader, node_id)
        async with Agent(leader, "n1"):
            views = nodes.list_nodes(leader, cluster_pb2.ListNodesRequest()).nodes
            assert [(x.node.name, x.health) for x in views] == [("name-n1", "ready"), ("name-n2", "joined")]
            assert len(views[0].gpus_free) == 8
            assert views[0].endpoints[0].port == 7443
            assert "not heard" in views[1].reason
            for name in ("n1", "name-n1"):
                (view,) = nodes.list_nodes(leader, cluster_pb2.ListNodesRequest(node=name)).nodes
                assert view.node.id == "n1"
            view = await nodes.cordon_node(
                leader, cluster_pb2.CordonNodeRequest(node="name-n1", cordon=True, reason="fan"), ACTOR
            )
            assert (view.node.cordoned, view.reason) == (True, "cordoned: fan")
            got = status.get_status(leader, cluster_pb2.GetStatusRequest())
            assert dict(got.nodes) == {"cordoned": 1, "joined": 1}
            view = await nodes.revoke_node(leader, cluster_pb2.RevokeNodeRequest(node="n1", reason="stolen"), ACTOR)
            assert (view.health, view.reason) == ("revoked", "revoked: stolen")
            await eventually(lambda: not leader.sessions.connected("n1"))
            (pool,) = pools.list_pools(leader, cluster_pb2.ListPoolsRequest()).pools
            assert (pool.nodes, pool.nodes_ready) == (1, 0)

    api_test(tmp_path, test)


def test_tokens_show_their_secret_once(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        pool = cluster_pb2.ApplyPoolRequest(pool=state_pb2.Pool(name="p", cloud="metal"))
        assert (await pools.apply_pool(leader, pool, ACTOR)).outcome == "created"
        assert (await pools.apply_pool(leader, pool, ACTOR)).outcome == "unchanged"
        pool.expected_generation = 0
        assert (await refused(lambda: pools.apply_pool(leader, pool, ACTOR))).code is Code.CONFLICT
        made = await join_tokens.create_token(
            leader, cluster_pb2.CreateTokenRequest(pool="p", ttl_s=60, uses=2), "admin/eve"
        )
        assert made.token.endswith(leader.ca.fingerprint)
        secret = made.token.split(".")[2]
        (view,) = join_tokens.list_tokens(leader, cluster_pb2.ListTokensRequest()).tokens
        assert (view.state, view.uses_left, view.created_by) == ("valid", 2, "admin/eve")
        assert secret not in str(view)
        assert (
            await join_tokens.revoke_token(leader, cluster_pb2.RevokeTokenRequest(id=view.id), ACTOR)
        ).state == "revoked"
        for ttl_s, uses in ((0, 1), (1e9, 1), (60, 0)):
            request = cluster_pb2.CreateTokenRequest(pool="p", ttl_s=ttl_s, uses=uses)
            error = await refused(lambda request=request: join_tokens.create_token(leader, request, ACTOR))
            assert error.code is Code.INVALID

    api_test(tmp_path, test)


def test_output_of_a_runner_that_has_ended_is_asked_of_its_last_node(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1"):
            await deployed(leader)
            (view,) = runners.list_runners(leader, cluster_pb2.ListRunnersRequest(node="name-n1")).runners
            await apps.delete_app(leader, cluster_pb2.DeleteAppRequest(id="t/a"), ACTOR)
            await eventually(lambda: view.runner.id not in leader.view.runners)
            request = cluster_pb2.RunnerLogsRequest(id=view.runner.id, tail_lines=10)
            lines = [line.text async for chunk in runners.runner_logs(leader, request) for line in chunk.lines]
            assert lines == ["first line", "second line"]

            async def of_nobody() -> None:
                request = cluster_pb2.RunnerLogsRequest(id="t/never-0")
                async for _ in runners.runner_logs(leader, request):
                    pass

            assert (await refused(of_nobody)).code is Code.NOT_FOUND

    api_test(tmp_path, test)


def test_logs_stop_and_crash(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1") as agent:
            await deployed(leader)
            (view,) = runners.list_runners(leader, cluster_pb2.ListRunnersRequest(node="name-n1")).runners
            request = cluster_pb2.RunnerLogsRequest(id=view.runner.id, tail_lines=10)
            lines = [line.text async for chunk in runners.runner_logs(leader, request) for line in chunk.lines]
            assert lines == ["first line", "second line"]
            stopping = await runners.stop_runner(
                leader, cluster_pb2.StopRunnerRequest(id=view.runner.id, reason="tired"), ACTOR
            )
            assert stopping.runner.goal == state_pb2.GOAL_STOP
            assert stopping.runner.goal_reason == "tired"
            await eventually(lambda: ready(leader) == 1 and view.runner.id not in leader.view.runners)
            agent.on_assignment = lambda a: status_of(
                a,
                state_pb2.RUNNER_STATE_TERMINATED,
                reason="the worker exited",
                exit_code=3,
                log_tail=["Traceback", "ValueError: no weights"],
            )
            await apps.apply_app(leader, app_request("crash"), ACTOR)

            def crashed() -> list[cluster_pb2.RunnerView]:
                listed = runners.list_runners(leader, cluster_pb2.ListRunnersRequest(app="t/crash")).runners
                return [x for x in listed if x.state == state_pb2.RUNNER_STATE_CRASH_BACKOFF]

            await eventually(lambda: bool(crashed()))
            (view,) = crashed()
            assert view.status.exit_code == 3
            assert "the worker exited" in view.reason
            assert list(view.status.log_tail) == ["Traceback", "ValueError: no weights"]
            assert view.backoff_until_s > leader.clock.wall_s()

            async def output() -> list[str]:
                chunks = runners.runner_logs(leader, cluster_pb2.RunnerLogsRequest(id=view.runner.id))
                return [line.text async for chunk in chunks for line in chunk.lines]

            assert await output() == ["first line", "second line"], "what its node has kept"
            agent.logs, agent.log_error = [], "it does not exist"
            assert await output() == ["Traceback", "ValueError: no weights"], "what it told"
            agent.hang_up()
            await eventually(lambda: not leader.sessions.connected("n1"))
            assert await output() == ["Traceback", "ValueError: no weights"]

    api_test(tmp_path, test)


def test_orphans_are_listed_explained_and_confirmed(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        orphan = status_of_orphan()
        agent = Agent(leader, "n1")
        agent.statuses[orphan.runner_id] = orphan
        async with agent:
            await eventually(lambda: bool(leader.view.orphans))
            (view,) = runners.list_runners(leader, cluster_pb2.ListRunnersRequest()).runners
            assert (view.orphan, view.runner.id, view.node_name) == (True, "t/lost-00000000", "name-n1")
            assert "orphan" in explain.explain(leader, cluster_pb2.ExplainRequest(subject=view.runner.id)).summary
            alarms = [x.kind for x in status.get_status(leader, cluster_pb2.GetStatusRequest()).alarms]
            assert alarms
            error = await refused(lambda: status.confirm(leader, cluster_pb2.ConfirmRequest(what="maybe"), ACTOR))
            assert error.code is Code.INVALID
            assert agent.statuses[orphan.runner_id].state == state_pb2.RUNNER_STATE_IDLE  # nobody stopped it

    api_test(tmp_path, test)


def status_of_orphan() -> object:
    from fal_contract.v1 import agent_pb2

    return agent_pb2.RunnerStatus(
        runner_id="t/lost-00000000", assignment_id="x", term=1, app="t/lost", revision=1,
        state=state_pb2.RUNNER_STATE_IDLE, gpus=["GPU-n1-0"],
    )  # fmt: skip


def test_events_are_numbered_filtered_and_followed(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1"):
            follower = status.events(leader, cluster_pb2.EventsRequest(follow=True, subject="t/a"))
            first = asyncio.ensure_future(anext(follower))
            await asyncio.sleep(0)
            await deployed(leader)
            async with asyncio.timeout(20):
                seen = [await first]
                while "RUNNER_PLACED" not in [x.kind for x in seen]:
                    seen.append(await anext(follower))
            assert [x.number for x in seen] == sorted(x.number for x in seen)
            assert all(x.subject.startswith("t/a") for x in seen)
            await follower.aclose()
            every = [x async for x in status.events(leader, cluster_pb2.EventsRequest())]
            numbers = [x.number for x in every]
            assert numbers == list(range(1, len(numbers) + 1))
            after = [x async for x in status.events(leader, cluster_pb2.EventsRequest(after=numbers[2]))]
            assert [x.number for x in after] == numbers[3:]
            of_node = [x async for x in status.events(leader, cluster_pb2.EventsRequest(subject="name-n1"))]
            assert {x.subject for x in of_node} == {"n1"}

    api_test(tmp_path, test)


def test_status_counts_everything(tmp_path: Path) -> None:
    async def test(leader):  # type: ignore[no-untyped-def]
        await join(leader, "n1")
        async with Agent(leader, "n1", gpus=4):
            await deployed(leader, runners=3)
            got = status.get_status(leader, cluster_pb2.GetStatusRequest())
            assert (got.gpus, got.gpus_free, got.apps, got.store, got.term) == (4, 1, 1, "memory", 1)
            assert dict(got.runners) == {"IDLE": 3}
            assert dict(got.nodes) == {"ready": 1}
            assert got.commits > 0
            why = explain.explain(leader, cluster_pb2.ExplainRequest(subject="name-n1"))
            assert (why.kind, why.subject) == ("node", "n1")
            assert "1 of 4 GPUs are free" in why.lines

    api_test(tmp_path, test)


def test_a_standby_answers_not_leader() -> None:
    with pytest.raises(FalError) as caught:
        CurrentLeadership().get()
    assert caught.value.code is Code.NOT_LEADER
    assert caught.value.retryable


def test_every_method_has_its_roles() -> None:
    assert unguarded(list(services()), ROLES) == frozenset()
    known = {f"/{s.full_name}/{m.name}" for s in services() for m in s.methods}
    assert ROLES.keys() == known
    assert not ROLES.keys() & STANDARD_METHODS.keys()
