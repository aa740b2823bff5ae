"""Output of containers that were removed: kept for a while, so that an operator can read why one crashed.

    STATE/ended/ID/  log, log.1 as the container left them

Invariant: at most 256 MiB and 1000 containers, none for longer than a day; the oldest go first, and the newest is kept
whatever its size. An empty log is not kept. Files are moved, never copied, so a full disk does not matter. Called by
the drivers when they remove a container; nothing else depends on it, and nothing here raises.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fal_contract.limits import ENDED_LOGS_AGE_MAX_S, ENDED_LOGS_BYTES_MAX, ENDED_LOGS_MAX


class EndedLogs:
    """Those of one state directory."""

    def __init__(
        self, state_dir: Path, *, bytes_max: int = ENDED_LOGS_BYTES_MAX, age_max_s: float = ENDED_LOGS_AGE_MAX_S
    ) -> None:
        self._root = state_dir / "ended"
        self._bytes_max = bytes_max
        self._age_max_s = age_max_s

    def keep(self, id: str, log: Path, now_s: float) -> None:
        """Move `log` and what was rotated out of it; then let go of what is too much."""
        files = [path for path in (log, log.with_name(log.name + ".1")) if _size(path)]
        if not files:
            return
        with contextlib.suppress(OSError):
            folder = self._root / id
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            for path in files:
                path.rename(folder / path.name.replace(log.name, "log"))
            if log not in files:  # what is read begins with this name
                (folder / "log").touch()
            os.utime(folder, (now_s, now_s))
        self.trim(now_s)

    def find(self, id: str) -> Path | None:
        """Its log; None when it is not kept, or no longer."""
        path = self._root / id / "log"
        return path if "/" not in id and path.exists() else None

    def trim(self, now_s: float) -> None:
        """Let go of what is too old or too much."""
        with contextlib.suppress(OSError):
            folders = sorted(self._root.iterdir(), key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
            total = 0
            for number, folder in enumerate(folders):
                total += sum(_size(path) for path in folder.iterdir())
                old = now_s - folder.stat().st_mtime > self._age_max_s
                if old or (number and (total > self._bytes_max or number >= ENDED_LOGS_MAX)):
                    shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Forget all."""
        shutil.rmtree(self._root, ignore_errors=True)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
