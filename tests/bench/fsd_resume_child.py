"""Brings an artifact into a store in several threads until it is killed: `python fsd_resume_child.py ROOT COUNTERS`.

COUNTERS is a file of one little-endian 8-byte number a thread: bytes that the thread has been given so far.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys
import threading
from hashlib import sha256
from pathlib import Path

from blake3 import blake3

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.clock import SystemClock
from fal_fsd.disk.store import DiskStore

PIECE_BYTES = 4 << 20
PIECES = 192
THREADS = 4
BLOCK_BYTES = 1 << 20
COUNTER = struct.Struct("<Q")


def piece() -> bytes:
    """All pieces have the same bytes."""
    return random.Random(1).randbytes(PIECE_BYTES)


def artifact() -> Artifact:
    """What is brought."""
    data, hasher = piece(), sha256()
    for _ in range(PIECES):
        hasher.update(data)
    files = (ArtifactFile("weights", PIECES * PIECE_BYTES, "1", hasher.digest()),)
    digests = (blake3(data).digest(),) * PIECES
    return Artifact(listing_id("s3://b/m", files), "model", "s3://b/m", PIECE_BYTES, files, digests)


def main() -> None:
    data = memoryview(piece())
    store = DiskStore(Path(sys.argv[1]), bytes_max=None, clock=SystemClock())
    part = store.open_part(artifact(), model="bench/m", owner="bench")
    with open(sys.argv[2], "r+b") as file:
        counters = mmap.mmap(file.fileno(), THREADS * COUNTER.size)

    def bring(thread: int) -> None:
        given = 0
        for number in range(thread, PIECES, THREADS):
            writer = part.writer(number, source="bench")
            if writer is None:
                continue
            for at in range(0, PIECE_BYTES, BLOCK_BYTES):
                writer.write(data[at : at + BLOCK_BYTES])
                given += BLOCK_BYTES
                COUNTER.pack_into(counters, thread * COUNTER.size, given)
            writer.finish()

    threads = [threading.Thread(target=bring, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
