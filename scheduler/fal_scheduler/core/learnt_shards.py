"""What was learnt goes to the store every SAVE_EVERY_S, a bounded number of keys, and back for the next leader.

Pure. All of a node's entries are in one of SHARDS shards, so that it costs one key at most, and it shares that key
with others: in SAVE_EVERY_S at most one key for each NODES_PER_KEY nodes is written, those that wait longest first, so
that a cluster of any size makes no more than 0.02 writes a node and minute (ADR 0023). Nothing learnt: nothing written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from zlib import crc32

from fal_scheduler.core.learning import Learning
from fal_scheduler.core.learnt_record import Learnt
from fal_scheduler.core.work import Work

SAVE_EVERY_S: Final = 300.0
SHARDS: Final = 64
NODES_PER_KEY: Final = 10
KEYS_AT_ONCE_MAX: Final = 40  # of the changes that one step may make


def shard_of(key: str) -> str:
    """Which shard an entry is in: a node's all in one, the others by family."""
    family, _, subject = key.partition("|")
    return f"{crc32((subject if subject.startswith('node/') else family).encode()) % SHARDS:02d}"


def save(work: Work) -> None:
    """Write what changed, when it is time and as far as the rate allows."""
    state, now_s = work.state, work.moment.now_s
    learning = state.learning
    if not learning.unsaved or now_s - learning.saved_at_s < SAVE_EVERY_S or work.full:
        return
    learning.saved_at_s = now_s
    due = dict.fromkeys(shard_of(key) for key in learning.unsaved)  # in the order in which they changed
    allowed = min(max(1, len(state.nodes) // NODES_PER_KEY), KEYS_AT_ONCE_MAX)
    chosen = dict.fromkeys(list(due)[:allowed])
    entries: dict[str, list[tuple[str, tuple[int, ...]]]] = {shard: [] for shard in chosen}
    for key, numbers in _entries(learning):
        if (shard := shard_of(key)) in entries:
            entries[shard].append((key, numbers))
    for shard, found in entries.items():
        before = state.learnt.get(shard)
        work.put(Learnt(shard, work.moment.wall_s, tuple(sorted(found))), before)
    for key in [key for key in learning.unsaved if shard_of(key) in chosen]:
        del learning.unsaved[key]


def _entries(learning: Learning) -> Iterable[tuple[str, tuple[int, ...]]]:
    for family, have in learning.families.items():
        yield family, tuple(number for point in have.points for number in point)
        for subject, ratios in (have.ratios or {}).items():
            yield f"{family}|{subject}", ((have.heard_s or {})[subject], *ratios)


def load(learning: Learning, records: Iterable[Learnt]) -> None:
    """Take over what an earlier leader learnt. Entries that this release does not know are left out."""
    entries = sorted(entry for record in records for entry in record.entries)
    for key, numbers in entries:
        family, bar, subject = key.partition("|")
        if not bar:
            learning.restore_line(family, tuple(zip(*[iter(numbers)] * 3, strict=False)))
    heard = [(numbers[0], key, numbers[1:]) for key, numbers in entries if "|" in key and len(numbers) > 1]
    for at_s, key, ratios in sorted(heard):  # the longest unheard first, as they were kept
        family, _, subject = key.partition("|")
        learning.restore_ratios(family, subject, ratios, at_s)


__all__ = ["KEYS_AT_ONCE_MAX", "NODES_PER_KEY", "SAVE_EVERY_S", "SHARDS", "load", "save", "shard_of"]
