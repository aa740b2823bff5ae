"""A store file as release 0.1 wrote it: later releases read every record of it, and refuse a newer release's."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from fal_contract.errors import Code, FalError
from fal_scheduler.codec import decode, encode
from fal_scheduler.core.records import Model, Record, key_of
from fal_scheduler.recovery import recover
from fal_scheduler.store.interface import Loaded
from fal_scheduler.store.sqlite import SqliteStore
from store_samples import RECORDS, SETS, record

FOLDER = Path(__file__).parents[1] / "data" / "store"


def loaded(path: Path) -> tuple[int, Loaded]:
    """What a scheduler that takes over this file finds: its term, and the records."""

    async def body() -> tuple[int, Loaded]:
        store = SqliteStore(path)
        await store.open()
        try:
            guard = await store.campaign("test")
            return guard.term, await store.load()
        finally:
            await store.close()

    return asyncio.run(body())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of release 0.1's that may be opened; the recorded file is never written to."""
    return copied("v1", tmp_path)


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copyfile(FOLDER / name / "store.sqlite", folder / "store.sqlite"))


@pytest.mark.parametrize("name", SETS)
def test_a_store_of_version_1_is_read_as_it_was_meant(name: str, tmp_path: Path) -> None:
    term, found = loaded(copied(name, tmp_path))
    assert (term, found.revision) == (6, 1)  # recorded in term 5, with one commit
    assert {key: decode(key, value) for key, value in found.records.items()} == {key_of(x): x for x in SETS[name]}
    state, violations = recover(found.records, term=term, revision=found.revision, now_s=0.0)
    assert not violations
    models = sorted(one.id for one in SETS[name] if isinstance(one, Model))
    assert [one.id for one in state.catalog.page(limit=10)[0]] == models


def test_the_sample_has_every_kind_of_record_in_the_bytes_that_are_also_listed(copy: Path) -> None:
    _, found = loaded(copy)
    assert {type(one) for records in SETS.values() for one in records} == set(Record.__args__)
    raw = json.loads((FOLDER / "records_v1.json").read_text())
    assert {key: found.records[key].hex() for key in raw} == {key: one["bytes"] for key, one in raw.items()}


@pytest.mark.parametrize("sample", RECORDS, ids=lambda x: type(x).__name__)
def test_a_record_of_version_2_in_it_is_refused_by_name(sample: Record, copy: Path) -> None:
    """As a newer release would have left it: `version` is the first field of every record."""
    value = encode(sample)
    assert value[:2] == b"\x08\x01"
    with sqlite3.connect(copy) as db:
        db.execute("UPDATE record SET value = ? WHERE key = ?", (b"\x08\x02" + value[2:], key_of(sample)))
    db.close()
    term, found = loaded(copy)
    with pytest.raises(FalError) as refused:
        recover(found.records, term=term, revision=found.revision, now_s=0.0)
    assert refused.value.code is Code.VERSION_MISMATCH
    assert key_of(sample) in refused.value.what
    assert loaded(copy)[1] == found  # refusing changed nothing


def test_how_the_file_was_recorded_still_works(tmp_path: Path) -> None:
    asyncio.run(record(tmp_path / "store.sqlite"))
    _, found = loaded(tmp_path / "store.sqlite")
    assert {key: decode(key, value) for key, value in found.records.items()} == {key_of(x): x for x in RECORDS}
