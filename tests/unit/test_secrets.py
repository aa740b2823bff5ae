"""Secrets at the scheduler: sealed, named by apps, given to the one node that runs the runner, never told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fal_scheduler.api.service as service_module
from fal_agent import packing
from fal_contract.errors import Code, FalError
from fal_contract.limits import SECRET_BYTES_MAX
from fal_contract.v1 import agent_pb2, cluster_pb2, state_pb2
from fal_scheduler.api import apps, secrets
from fal_scheduler.leadership import Leadership
from fal_scheduler.store.memory import MemoryBackend, MemoryStore
from falctl import secrets as verbs
from falctl.main import app
from loopback import Loopback
from scheduler_rig import ACTOR, Agent, app_request, eventually, join, leading, ready

VALUE = b"hunter2-\xff\x00-is-the-value"


async def put(leader: Leadership, name: str = "token", value: bytes = VALUE) -> cluster_pb2.SecretView:
    return await secrets.set_secret(leader, cluster_pb2.SetSecretRequest(id=f"t/{name}", value=value), ACTOR)


async def unset(leader: Leadership, name: str = "token") -> cluster_pb2.SecretView:
    return await secrets.unset_secret(leader, cluster_pb2.UnsetSecretRequest(id=f"t/{name}"), ACTOR)


def naming(*names: str) -> cluster_pb2.ApplyAppRequest:
    request = app_request(runners=1)
    request.spec.secrets.extend(names)
    return request


def ask(leader: Leadership, node: str, runner: str) -> dict[str, bytes]:
    return dict(secrets.get_secrets(leader, agent_pb2.GetSecretsRequest(runner_id=runner), node).values)


def test_only_the_node_of_the_runner_gets_what_its_app_names(tmp_path: Path) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            await join(leader, "n1")
            with pytest.raises(FalError, match="secret 't/token' is not set") as missing:
                await apps.apply_app(leader, naming("token"), ACTOR)
            assert missing.value.field == "secrets"
            await put(leader)
            await put(leader, "other", b"not for this app")
            with pytest.raises(FalError, match="'t/lost' is not set"):
                apps.plan_app(leader, naming("token", "lost"))
            async with Agent(leader, "n1"):
                await apps.apply_app(leader, naming("token"), ACTOR)
                await eventually(lambda: ready(leader) == 1)
                (runner,) = leader.view.runners
                assert ask(leader, "n1", runner) == {"token": VALUE}
                for node, asked in (("n2", runner), ("n1", "t/a-00000000"), ("n1", "nonsense")):
                    with pytest.raises(FalError) as refused:
                        ask(leader, node, asked)
                    assert refused.value.code is Code.PERMISSION_DENIED
                await put(leader, value=b"changed")
                assert ask(leader, "n1", runner) == {"token": b"changed"}
                (listed,) = secrets.list_secrets(leader, cluster_pb2.ListSecretsRequest(team="t")).secrets[1:]
                assert (listed.generation, list(listed.apps), listed.bytes) == (2, ["t/a"], 7)
                with pytest.raises(FalError, match="is named by t/a"):
                    await unset(leader)
                await apps.apply_app(leader, app_request(runners=1), ACTOR)
                assert (await unset(leader)).id == "t/token"
                with pytest.raises(FalError) as gone:
                    await unset(leader)
                assert gone.value.code is Code.NOT_FOUND

    asyncio.run(body())


def test_the_value_is_nowhere_but_sealed_and_a_record_of_another_name_does_not_open(tmp_path: Path) -> None:
    async def body() -> None:
        backend = MemoryBackend()
        async with leading(tmp_path, MemoryStore(backend)) as leader:
            await put(leader)
            sealed = leader.view.secrets["t/token"].sealed
            assert VALUE not in sealed
            assert "hunter2" not in repr(leader.view.secrets["t/token"])
            assert "sealed" not in repr(leader.view.secrets["t/token"])
            leader.ca.sealer.unseal(sealed, purpose=secrets.PURPOSE + "t/token")
            with pytest.raises(FalError) as misplaced:
                leader.ca.sealer.unseal(sealed, purpose=secrets.PURPOSE + "t/other")
            assert misplaced.value.code is Code.CORRUPT
        async with leading(tmp_path, MemoryStore(backend)) as leader:  # another leader of the same cluster opens it
            again = leader.view.secrets["t/token"]
            assert leader.ca.sealer.unseal(again.sealed, purpose=secrets.PURPOSE + "t/token") == VALUE
        kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert b"t/token" in kept, "the events tell that it was set"
        assert b"hunter2" not in kept

    asyncio.run(body())


@pytest.mark.parametrize(
    ("id_", "value", "field"),
    [
        ("t/Token", b"x", "id"),
        ("token", b"x", "id"),
        ("t/../x", b"x", "id"),
        ("system/x", b"x", "id"),
        ("t/x", b"", "value"),
        ("t/x", b"y" * (SECRET_BYTES_MAX + 1), "value"),
    ],
)
def test_what_is_no_secret_is_refused_without_its_value(tmp_path: Path, id_: str, value: bytes, field: str) -> None:
    async def body() -> None:
        async with leading(tmp_path) as leader:
            with pytest.raises(FalError) as refused:
                await secrets.set_secret(leader, cluster_pb2.SetSecretRequest(id=id_, value=value), ACTOR)
            assert (refused.value.code, refused.value.field) == (Code.INVALID, field)
            assert "yyy" not in str(refused.value)
            assert not leader.view.secrets

    asyncio.run(body())


def test_a_task_gets_the_credentials_of_its_images_team(tmp_path: Path) -> None:
    from fal_scheduler.core.records import BuildTask, Spec
    from fal_scheduler.core.secrets import wanted

    task = BuildTask("image", "0" * 64, 1, image="acme/sdxl", source="docker://r/x", auth_secret="registry")
    assert wanted("system", Spec(image="host", build=task)) == {"registry": "acme/registry"}
    assert wanted("acme", Spec(image="host", secrets=("a", "b"))) == {"a": "acme/a", "b": "acme/b"}


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with Loopback(tmp_path_factory.mktemp("leader")) as made, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(service_module, "_actor", lambda: ACTOR)
        monkeypatch.setattr(verbs, "unary", made.unary)
        monkeypatch.setattr(verbs, "team", lambda: "t")
        monkeypatch.setattr(verbs, "owned", lambda name, field: name if "/" in name else f"t/{name}")
        yield made


def falctl(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["secret", *arguments], input=stdin)


def test_set_list_unset_by_hand(cluster: Loopback, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_bytes(VALUE)
    assert "set (23 bytes, generation 1)" in falctl("set", "hf", "--from-file", str(file)).output
    assert "generation 2" in falctl("set", "hf", stdin=b"from stdin\n").output
    shown = json.loads(falctl("list", "--json").output)["secrets"]
    assert [(one["id"], one["generation"], one["bytes"]) for one in shown] == [("t/hf", 2, 11)]
    assert "value" not in shown[0]
    assert "sealed" not in shown[0]
    assert "from stdin" not in json.dumps(shown)
    assert "t/hf" in falctl("list").output
    assert "is forgotten" in falctl("unset", "hf").output
    assert "No secrets" in falctl("list", "--all").output


TYPED = "from falctl.secrets import _value; raise SystemExit(_value(None) != b'hidden77')"


def test_on_a_terminal_the_value_is_not_shown() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", TYPED])
    said, typed = b"", False
    with os.fdopen(terminal, "rb+", buffering=0) as end, contextlib.suppress(OSError):  # EIO when the other end is gone
        while select.select([end], [], [], 20)[0]:
            said += end.read(4096)
            if b"Value: " in said and not typed:
                typed = True
                end.write(b"hidden77\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    assert b"It is not shown" in said
    assert b"hidden77" not in said


def test_no_secret_has_the_name_of_a_file_that_the_packer_is_given(cluster: Loopback) -> None:
    for name in (packing.AUTH_FILE, packing.CA_FILE, packing.PROXY_FILE):
        result = falctl("set", name, stdin=b"x")
        assert isinstance(result.exception, FalError), result.output
        assert "is not a name" in str(result.exception)


def test_wrong_use_is_refused(cluster: Loopback, tmp_path: Path) -> None:
    for arguments, stdin, words in (
        (("set", "hf"), b"", "is empty"),
        (("set", "hf", "--from-file", str(tmp_path / "none")), b"", "cannot be read"),
        (("set", "hf"), b"x" * (SECRET_BYTES_MAX + 1), "out of bounds"),
        (("unset", "none"), b"", "does not exist"),
    ):
        result = falctl(*arguments, stdin=stdin)
        assert isinstance(result.exception, FalError), result.output
        assert words in str(result.exception)
        assert result.exception.remedy
    assert falctl("set", "hf", "the-value-as-an-argument").exit_code == 2


def test_specs_carry_names_only() -> None:
    assert "secrets" in state_pb2.AppSpec.DESCRIPTOR.fields_by_name
    assert {field.name for field in cluster_pb2.SecretView.DESCRIPTOR.fields} == {
        "id", "generation", "created_at_s", "updated_at_s", "updated_by", "bytes", "apps"
    }  # fmt: skip
