"""Which container owns which range of user ids on this machine.

Invariant: no two containers that exist hold the same range, whichever agent of the machine made them. The journal is
one JSON file, replaced whole under a lock, by default below /run: like the containers it outlives agents and not the
boot. An entry whose container directory is gone is free. Called by the oci driver.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError

RANGE_IDS: Final = 65_536
# Above what systemd-nspawn (up to 0x6fffffff) and shadow's subuid (from 100,000) hand out, below 2**31.
FIRST_ID: Final = 0x7000_0000
RANGES_MAX: Final = 4096


class UidRanges:
    """The allocator over one journal file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)

    def allocate(self, directory: Path) -> int:
        """The first host id of the range of the container whose state is in `directory`; the same one when asked again.

        NO_CAPACITY when all ranges are taken, CORRUPT when the journal cannot be read.
        """
        with self._locked() as ranges:
            for start, owner in ranges.items():
                if owner == str(directory):
                    return start
            for start in [s for s, owner in ranges.items() if not os.path.exists(owner)]:
                del ranges[start]
            candidates = range(FIRST_ID, FIRST_ID + RANGES_MAX * RANGE_IDS, RANGE_IDS)
            free = next((start for start in candidates if start not in ranges), None)
            if free is None:
                raise FalError(
                    Code.NO_CAPACITY,
                    f"all {RANGES_MAX} user id ranges of this machine are taken",
                    remedy="Remove containers.",
                )
            ranges[free] = str(directory)
            return free

    def release(self, directory: Path) -> None:
        """The container is gone; unknown directories are fine."""
        with self._locked() as ranges:
            for start in [s for s, owner in ranges.items() if owner == str(directory)]:
                del ranges[start]

    def owners(self) -> dict[int, str]:
        """First id → container directory."""
        with self._locked() as ranges:
            return dict(ranges)

    @contextmanager
    def _locked(self) -> Iterator[dict[int, str]]:
        """The journal's content, written back if it was changed without an exception."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ranges = self._load()
            before = dict(ranges)
            yield ranges
            if ranges != before:
                fresh = self._path.with_suffix(".new")
                fresh.write_text(json.dumps({str(start): owner for start, owner in ranges.items()}))
                fresh.rename(self._path)

    def _load(self) -> dict[int, str]:
        try:
            return {int(start): str(owner) for start, owner in json.loads(self._path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            raise FalError(
                Code.CORRUPT,
                f"the journal of user id ranges {self._path} cannot be read: {error}",
                remedy="Stop all containers of this machine, then delete the file.",
            ) from error
