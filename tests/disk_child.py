"""A process that brings artifacts into a store for ever and says what it has done; to be killed.

For each line `ROOT SEED` on its standard input it forks such a process (imports are the slow part), says `pid PID`, and
`dead` when that one is. Lines of the process: `piece ARTIFACT PIECE` (it was counted), `pin ARTIFACT OWNER` (it is
durable), `ready ARTIFACT` (it was exposed), `gone ARTIFACT` (it is about to be unpinned and dropped).
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from disk_rig import artifact_of, bytes_of, content, put
from fal_contract.clock import SystemClock
from fal_fsd.disk import part as part_module
from fal_fsd.disk.store import DiskStore

BATCH_BYTES = 4 * (64 << 10)
MODELS = 3
SIZES = {"a/weights": 700_000, "b": 200_000, "config": 300, "empty": 0}


def files_of(number: int) -> dict[str, bytes]:
    """Content of model `number`; all share one file."""
    return {**content(number, SIZES), "shared": content(0, {"shared": 130_000})["shared"]}


def uri_of(number: int) -> str:
    return f"s3://b/{number}"


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main() -> None:
    for line in sys.stdin:
        root, seed = line.split()
        pid = os.fork()
        if pid == 0:
            bring_for_ever(Path(root), int(seed))
        say("pid", pid)
        os.waitpid(pid, 0)
        say("dead")


def bring_for_ever(root: Path, seed: int) -> None:
    part_module.SYNC_BATCH_BYTES = BATCH_BYTES  # type: ignore[misc]
    rng = random.Random(seed)
    store = DiskStore(root, bytes_max=None, clock=SystemClock(), reserve_bytes=0, sync_interval_s=0.01)
    number = rng.randrange(MODELS)
    while True:
        number = (number + 1) % MODELS
        files = files_of(number)
        attested = artifact_of(files, uri=uri_of(number))
        provisional = artifact_of(files, uri=uri_of(number), sha=False)
        part = store.open_part(rng.choice([attested, provisional]), model=f"t/{number}", owner="child")
        say("pin", attested.id, "child")
        missing = list(part.have.missing())
        rng.shuffle(missing)
        for piece in missing:
            put(part, piece, bytes_of(attested, files, piece))
            say("piece", attested.id, piece)
        store.pin(attested.id, f"owner-{number}")
        say("pin", attested.id, f"owner-{number}")
        store.attest(attested)
        store.finish(attested.id)
        say("ready", attested.id)
        part.close()
        if rng.random() < 0.5:
            assert store.verify(attested.id, threading.Event()) == []
        if rng.random() < 0.5:
            say("gone", attested.id)
            for owner in ("child", f"owner-{number}"):
                store.unpin(owner, attested.id)
            store.drop(attested.id, force=False)


if __name__ == "__main__":
    main()
