"""Origins that lie, refuse, end or go away, below a real scheduler and real weight caches."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_contract.v1 import state_pb2
from fsd_rig import tree
from origin_servers import ConnectProxy, Faults, HttpOrigin, HubServer, make_authority
from weights_rig import PIECE, Node, asked, chain, contents_of, doing, flipped, run, write_secret


def test_a_byte_flipped_at_the_origin_is_refused_by_file_and_signer(tmp_path: Path) -> None:
    """It published SHA-256; nobody is shown a byte of it, and the node that vouched for the pieces is named."""
    contents = contents_of(3 * PIECE, PIECE // 2)
    with HttpOrigin(contents, Faults(etag="none")) as origin:

        async def main() -> None:
            async with chain(tmp_path, "n1") as c:
                origin.put_list(sha256=True)
                model = await c.add("m", origin.url)
                assert model.state == state_pb2.MODEL_STATE_REGISTERED
                origin.files["file-0.safetensors"] = flipped(contents["file-0.safetensors"], PIECE + 7)
                with pytest.raises(FalError, match="the origin says") as caught:
                    await c.stage("n1", model)
                assert (caught.value.code, caught.value.field) == (Code.CORRUPT, "file-0.safetensors")
                refused = state_pb2.MODEL_STATE_REFUSED

                async def is_refused() -> bool:
                    return (await c.model("m")).state == refused

                await c.until(is_refused)
                found = await c.model("m")
                assert "file-0.safetensors" in found.reason
                assert c.nodes["n1"].node_id in found.reason
                assert await c.events("ATTESTATION_FAILED")
                assert c.nodes["n1"].exposed() == []
                origin.files["file-0.safetensors"] = contents["file-0.safetensors"]
                again = await c.add("m", origin.url)
                assert again.state == state_pb2.MODEL_STATE_REGISTERED
                assert tree(await c.stage("n1", again)) == contents

        run(main())


def test_the_origin_goes_away_once_one_node_has_it(tmp_path: Path) -> None:
    contents = contents_of(5 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with chain(tmp_path, "n1 n2 n3") as c:
                origin.put_list(sha256=False)
                model = await c.add("m", origin.url)
                await c.stage("n1", model)
                origin.faults.answers += [(404, {}, "gone")] * 1000
                sent = origin.bytes_sent
                for path in await asyncio.gather(c.stage("n2", model), c.stage("n3", model)):
                    assert tree(path) == contents
                assert origin.bytes_sent == sent
                where = await c.where("m")
                assert {name: told.ready_in_s for name, told in where.items()} == {"n1": 0, "n2": 0, "n3": 0}

        run(main())


async def failing(node: Node, model: state_pb2.Model) -> FalError:
    with pytest.raises(FalError) as caught:
        await node.client.stage(asked(model), "runner")
    assert node.exposed() == []
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
    tmp_path: Path, fault: Faults, code: Code, says: str
) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with chain(tmp_path, "n1") as c:
                origin.put_list()
                model = await c.add("m", origin.url)
                if fault.redirect:
                    fault.redirect = f"{origin.url.rstrip('/')}{{path}}"
                good, origin.faults = origin.faults, fault
                error = await failing(c.nodes["n1"], model)
                assert (error.code, says in error.what) == (code, True), error
                assert error.remedy
                assert [e for e in await c.events("BAD_ORIGIN") if says in e.message]
                origin.faults = good
                assert tree(await c.stage("n1", model)) == contents

        run(main())


def test_a_truncated_file_and_one_that_changed_since_it_was_listed(tmp_path: Path) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with chain(tmp_path, "n1") as c:
                origin.put_list()
                model = await c.add("m", origin.url)
                origin.put("file-0.safetensors", contents["file-0.safetensors"][:-1])
                error = await failing(c.nodes["n1"], model)
                assert error.code is Code.CONFLICT
                assert await c.events("ORIGIN_CHANGED")
                origin.put_list()
                again = await c.add("m2", origin.url)
                assert tree(await c.stage("n1", again)) == {"file-0.safetensors": contents["file-0.safetensors"][:-1]}

        run(main())


def test_an_origin_that_asks_for_patience_is_asked_again(tmp_path: Path) -> None:
    contents = contents_of(2 * PIECE)
    with HttpOrigin(contents) as origin:

        async def main() -> None:
            async with chain(tmp_path, "n1") as c:
                origin.put_list()
                model = await c.add("m", origin.url)
                origin.faults.answers += [(429, {"Retry-After": "1"}, "slowly"), (503, {}, "busy")] * 2
                assert tree(await c.stage("n1", model)) == contents
                assert not origin.faults.answers
                assert not await c.events("BAD_ORIGIN")

        run(main())


def test_a_gated_repository_without_and_with_an_expired_token(tmp_path: Path) -> None:
    """The token is read from the file again: neither scheduler nor cache is started anew."""
    contents = contents_of(PIECE + 5)
    file = tmp_path / "credentials.toml"
    with HubServer() as hub:
        hub.add("org/m", contents)
        head = f'[hf]\nendpoint = "{hub.endpoint}"\n'

        async def main() -> None:
            async with chain(tmp_path, "n1", credentials=head) as c:
                hub.gated["org/m"] = "first-token"
                with pytest.raises(FalError) as caught:
                    await c.add("m", "hf://org/m")
                assert caught.value.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
                assert "token" in caught.value.remedy
                write_secret(file, f'{head}token = "first-token"\n')
                model = await c.add("m", "hf://org/m")
                hub.gated["org/m"] = "second-token"  # the first has expired
                error = await failing(c.nodes["n1"], model)
                assert error.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
                assert "token" in error.remedy
                write_secret(file, f'{head}token = "second-token"\n')
                assert tree(await c.stage("n1", model)) == contents
                for said in (c.nodes["n1"].log.decode(), c.scheduler.log.read_text(), str(error), str(caught.value)):
                    assert "-token" not in said

        run(main())


def test_a_token_that_expires_under_a_staging_is_read_anew(tmp_path: Path) -> None:
    contents = contents_of(6 * PIECE)
    file = tmp_path / "credentials.toml"
    with HttpOrigin(contents, Faults(authorization="Bearer first")) as origin:

        def told(token: str) -> str:
            return f'[https."127.0.0.1:{origin.port}"]\nbearer = "{token}"\n'

        async def main() -> None:
            async with chain(tmp_path, "n1", credentials=told("first")) as c:
                origin.put_list()
                model = await c.add("m", origin.url)
                origin.faults.stall_after = PIECE // 2
                async with doing(c.stage("n1", model)) as staging:
                    await c.until(lambda: has_asked(origin))
                    origin.faults.authorization = "Bearer second"
                    write_secret(file, told("second"))
                    origin.faults.stall_after = -1
                    origin.faults.go.set()
                    assert tree(await staging) == contents
                assert "Bearer second" in {r.headers.get("Authorization") for r in origin.requests}

        run(main())


async def has_asked(origin: HttpOrigin) -> bool:
    """Bytes of a file have left it."""
    return origin.bytes_sent > PIECE // 4


def test_a_private_authority_behind_a_proxy(tmp_path: Path) -> None:
    contents = contents_of(2 * PIECE)
    authority = make_authority(tmp_path)
    with HttpOrigin(contents, tls=authority.tls) as origin, ConnectProxy() as proxy:
        secrets = f'[tls]\nca_file = "{authority.ca_file}"\n[proxy]\nhttps = "{proxy.url}"\n'

        async def main() -> None:
            async with chain(tmp_path, "n1", credentials=secrets) as c:
                origin.put_list()
                model = await c.add("m", origin.url)
                before = len(proxy.connects)
                assert tree(await c.stage("n1", model)) == contents
                assert len(proxy.connects) > before > 0
                write_secret(tmp_path / "credentials.toml", f'[proxy]\nhttps = "{proxy.url}"\n')
                with pytest.raises(FalError) as caught:
                    await c.add("m2", origin.url)
                assert "certificate" in str(caught.value)

        run(main())
