"""Hashing what is on disk, in blocks of 1 MiB."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final, Protocol

from blake3 import blake3

from fal_contract.artifact import Artifact

_READ_BYTES: Final = 1 << 20


class Cancelled(Exception):
    """Nobody wants the work any more."""


class Places(Protocol):
    """A part."""

    @property
    def artifact(self) -> Artifact: ...

    def place(self, piece: int) -> tuple[int, int, int]: ...


def blake3_of(part: Places, piece: int) -> bytes | None:
    """Of one piece; None when its file is too short. Raises OSError."""
    hasher = blake3()
    whole = _feed(part, piece, hasher.update, memoryview(bytearray(_READ_BYTES)))
    return hasher.digest() if whole else None


def sha256_of(part: Places, file: int, wait_for: Callable[[int], None]) -> bytes:
    """Of one file; `wait_for` is called before each piece is read."""
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    for piece in part.artifact.layout.of_file(file):
        wait_for(piece)
        _feed(part, piece, hasher.update, buffer)
    return hasher.digest()


def _feed(part: Places, piece: int, update: Callable[[memoryview], object], buffer: memoryview) -> bool:
    fd, at, length = part.place(piece)
    end = at + length
    while at < end:
        count = os.preadv(fd, [buffer[: min(len(buffer), end - at)]], at)
        if count == 0:
            return False
        update(buffer[:count])
        at += count
    return True
