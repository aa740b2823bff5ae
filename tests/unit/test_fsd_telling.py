"""How much a cache tells at once: nothing is too much for a message, and nothing is left out."""

from __future__ import annotations

from fal_contract.clock import ManualClock
from fal_contract.limits import CACHED_ARTIFACTS_PER_NODE_MAX, MESSAGE_BYTES_MAX
from fal_contract.v1 import fsd_pb2, state_pb2, weights_pb2
from fal_fsd import views
from fal_fsd.news import News
from fal_fsd.node import _HELLO_BYTES_MAX


def view(number: int, owners: int = 0) -> fsd_pb2.CachedArtifact:
    return fsd_pb2.CachedArtifact(
        manifest_digest=f"{number:064x}", artifact_id=f"{number + 1:064x}", model=f"default/lora-{number}", kind="lora",
        bytes=number << 30, bytes_disk=number << 30, ready=True, pinned_by=[f"runner-{n:020}" for n in range(owners)],
    )  # fmt: skip


def test_a_hello_fits_into_a_message_however_much_is_here() -> None:
    told = [view(n, owners=4) for n in range(CACHED_ARTIFACTS_PER_NODE_MAX)] + [view(n) for n in range(10_000)]
    first, rest = views.that_fit(told[::-1], _HELLO_BYTES_MAX)
    assert len(first) + len(rest) == len(told)
    assert rest
    assert all(x.pinned_by for x in first)
    assert weights_pb2.CacheUp(hello=weights_pb2.CacheHello(artifacts=first)).ByteSize() <= MESSAGE_BYTES_MAX
    assert views.that_fit(told[:100], _HELLO_BYTES_MAX) == (told[:100], [])


def test_what_changed_is_told_in_reports_that_fit_until_all_is_told() -> None:
    news = News(ManualClock(), configured=True)
    news.begun()
    ids = {f"{n:064x}" for n in range(10_000)}
    for artifact_id in ids:
        news.changed(artifact_id, at_once=True)
    told: list[set[str]] = []
    while news.waiting.is_set():
        told.append(news.take_report()[0])
    assert set().union(*told) == ids
    assert sum(map(len, told)) == len(ids)
    assert max(map(len, told)) * 300 < MESSAGE_BYTES_MAX


def test_what_no_message_holds_is_said_and_not_sent() -> None:
    news = News(ManualClock(), configured=True)
    news.begun()
    files = [state_pb2.ModelFile(path="f", blake3=bytes(MESSAGE_BYTES_MAX))]
    news.attestation(weights_pb2.Attestation(artifact_id="a" * 64, files=files))
    news.manifest(state_pb2.ModelManifest(artifact_id="b" * 64, files=files))
    news.attestation(weights_pb2.Attestation(artifact_id="c" * 64))
    assert [x.attestation.artifact_id for x in news.take_messages()] == ["c" * 64]
    assert [(x.kind, x.subject) for x in news.take_report()[1]] == [
        ("TOO_LARGE_TO_TELL", "a" * 64),
        ("TOO_LARGE_TO_TELL", "b" * 64),
    ]
