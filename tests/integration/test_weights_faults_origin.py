"""Origins that lie, refuse, end or go away, below a real scheduler and real weight caches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2
from fsd_rig import tree
from origin_servers import ConnectProxy, Faults, HttpOrigin, HubServer, make_authority
from weights_rig import PIECE, Chain, Node, Shared, asked, contents_of, doing, flipped, write_secret


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("w"), "n1 n2 n3")
    yield made
    made.close()


def test_a_byte_flipped_at_the_origin_is_refused_by_file_and_signer(shared: Shared) -> None:
    """It published SHA-256; nobody is shown a byte of it, and the node that vouched for the pieces is named."""
    contents = contents_of(3 * PIECE, PIECE // 2)
    with HttpOrigin(contents, Faults(etag="none")) as origin:

        async def main(c: Chain) -> None:
            origin.put_list(sha256=True)
            model = await c.add("o1", origin.url)
            assert model.state == state_pb2.MODEL_STATE_REGISTERED
            origin.files["file-0.safetensors"] = flipped(contents["file-0.safetensors"], PIECE + 7)
            before = c.nodes["n1"].exposed()
            with pytest.raises(FalError, match="the origin says") as caught:
                await c.stage("n1", model)
            assert (caught.value.code, caught.value.field) == (Code.CORRUPT, "file-0.safetensors")
            refused = state_pb2.MODEL_STATE_REFUSED

            async def is_refused() -> bool:
                return (await c.model("o1")).state == refused

            await c.until(is_refused)
            found = await c.model("o1")
            assert "file-0.safetensors" in found.reason
            assert c.nodes["n1"].node_id in found.reason
            assert await c.events("ATTESTATION_FAILED")
            assert c.nodes["n1"].exposed() == before
            origin.files["file-0.safetensors"] = contents["file-0.safetensors"]
            again = await c.add("o1", origin.url)
            assert again.state == state_pb2.MODEL_STATE_REGISTERED
            assert tree(await c.stage("n1", again)) == contents

        shared.run(main)


def test_the_origin_goes_away_once_one_node_has_it(shared: Shared) -> None:
    contents = contents_of(5 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list(sha256=False)
            model = await c.add("o2", origin.url)
            await c.stage("n1", model)
            origin.faults.answers += [(404, {}, "gone")] * 1000
            sent = origin.bytes_sent
            for path in await asyncio.gather(c.stage("n2", model), c.stage("n3", model)):
                assert tree(path) == contents
            assert origin.bytes_sent == sent
            where = await c.where("o2")
            assert {name: told.ready_in_s for name, told in where.items()} == {"n1": 0, "n2": 0, "n3": 0}

        shared.run(main)


async def failing(node: Node, model: state_pb2.Model) -> FalError:
    """The one error that whoever stages it is told; nothing of it is READY."""
    before = node.exposed()
    with pytest.raises(FalError) as caught:
        await node.client.stage(asked(model), "runner")
    assert node.exposed() == before
    return caught.value


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (Faults(answers=[(404, {}, "gone")] * 1000), Code.NOT_FOUND, "file-0.safetensors"),
        (Faults(answers=[(403, {}, "no")] * 1000), Code.PERMISSION_DENIED, "403"),
        (Faults(redirect="{path}"), Code.INVALID, "redirect"),
        (Faults(more_bytes=100, ranges=False), Code.CORRUPT, "file-0.safetensors"),
    ],
    ids=["404", "403", "redirects", "over-long"],
)
def test_what_an_origin_refuses_is_one_error_and_staged_again_when_it_is_right(
    shared: Shared, fault: Faults, code: Code, says: str
) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add(f"o3-{code.value.lower().replace('_', '-')}-{len(says)}", origin.url)
            if fault.redirect:
                fault.redirect = f"{origin.url.rstrip('/')}{{path}}"
            good, origin.faults = origin.faults, fault
            error = await failing(c.nodes["n1"], model)
            assert (error.code, says in error.what) == (code, True), error
            assert error.remedy
            assert [e for e in await c.events("BAD_ORIGIN") if e.subject == model.id and says in e.message]
            origin.faults = good
            assert tree(await c.stage("n1", model)) == contents

        shared.run(main)


def test_a_truncated_file_and_one_that_changed_since_it_was_listed(shared: Shared) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("o4", origin.url)
            origin.put("file-0.safetensors", contents["file-0.safetensors"][:-1])
            error = await failing(c.nodes["n1"], model)
            assert error.code is Code.CONFLICT
            assert [e for e in await c.events("ORIGIN_CHANGED") if e.subject == model.id]
            origin.put_list()
            again = await c.add("o4-second", origin.url)
            assert tree(await c.stage("n1", again)) == {"file-0.safetensors": contents["file-0.safetensors"][:-1]}

        shared.run(main)


def test_an_origin_that_asks_for_patience_is_asked_again(shared: Shared) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main(c: Chain) -> None:
            origin.put_list()
            model = await c.add("o5", origin.url)
            origin.faults.answers += [(429, {"Retry-After": "1"}, "slowly"), (503, {}, "busy")] * 2
            assert tree(await c.stage("n1", model)) == contents
            assert not origin.faults.answers
            assert not [e for e in await c.events("BAD_ORIGIN") if e.subject == model.id]

        shared.run(main)


def test_a_gated_repository_without_and_with_an_expired_token(shared: Shared) -> None:
    """The token is read from the file again: neither scheduler nor cache is started anew."""
    contents = contents_of(PIECE + 5)
    with HubServer() as hub:
        hub.add("org/m", contents)
        head = f'[hf]\nendpoint = "{hub.endpoint}"\n'

        async def main(c: Chain) -> None:
            write_secret(c.secrets, head)
            hub.gated["org/m"] = "first-token"
            with pytest.raises(FalError) as caught:
                await c.add("o6", "hf://org/m")
            assert caught.value.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
            assert "token" in caught.value.remedy
            write_secret(c.secrets, f'{head}token = "first-token"\n')
            model = await c.add("o6", "hf://org/m")
            hub.gated["org/m"] = "second-token"  # the first has expired
            error = await failing(c.nodes["n1"], model)
            assert error.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
            assert "token" in error.remedy
            write_secret(c.secrets, f'{head}token = "second-token"\n')
            assert tree(await c.stage("n1", model)) == contents
            for said in (c.nodes["n1"].log.decode(), c.scheduler.log.read_text(), str(error), str(caught.value)):
                assert "-token" not in said

        shared.run(main)


def test_a_token_that_expires_under_a_staging_is_read_anew(shared: Shared) -> None:
    contents = contents_of(6 * PIECE)
    with HttpOrigin(contents, Faults(authorization="Bearer first")) as origin:

        def told(token: str) -> str:
            return f'[https."127.0.0.1:{origin.port}"]\nbearer = "{token}"\n'

        async def main(c: Chain) -> None:
            write_secret(c.secrets, told("first"))
            origin.put_list()
            model = await c.add("o7", origin.url)
            origin.faults.stall_after = PIECE // 2
            async with doing(c.stage("n1", model)) as staging:
                await c.until(lambda: has_asked(origin))
                origin.faults.authorization = "Bearer second"
                write_secret(c.secrets, told("second"))
                origin.faults.stall_after = -1
                origin.faults.go.set()
                assert tree(await staging) == contents
            assert "Bearer second" in {r.headers.get("Authorization") for r in origin.requests}

        shared.run(main)


async def has_asked(origin: HttpOrigin) -> bool:
    """Bytes of a file have left it."""
    return origin.bytes_sent > PIECE // 4


def test_a_private_authority_behind_a_proxy(shared: Shared, tmp_path: Path) -> None:
    contents = contents_of(2 * PIECE)
    authority = make_authority(tmp_path)
    with HttpOrigin(contents, tls=authority.tls) as origin, ConnectProxy() as proxy:
        secrets = f'[tls]\nca_file = "{authority.ca_file}"\n[proxy]\nhttps = "{proxy.url}"\n'

        async def main(c: Chain) -> None:
            write_secret(c.secrets, secrets)
            origin.put_list()
            model = await c.add("o8", origin.url)
            before = len(proxy.connects)
            assert tree(await c.stage("n1", model)) == contents
            assert len(proxy.connects) > before > 0
            write_secret(c.secrets, f'[proxy]\nhttps = "{proxy.url}"\n')
            with pytest.raises(FalError) as caught:
                await c.add("o8-second", origin.url)
            assert "certificate" in str(caught.value)

        shared.run(main)
