"""What FUSE can do on this machine, found out by mounting something. Blocks; a second at most."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Collection
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError, invalid
from fal_fsd.mount import kernel, wire

MODES: Final = ("fuse", "resend", "allow_mmap")
OFF_VARIABLE: Final = "FAL_FSD_MOUNT_OFF"
YES: Final = "yes"
_TIMEOUT_S: Final = 1.0


def switched_off() -> frozenset[str]:
    """Modes that the environment switches off, as `resend,allow_mmap`. INVALID for words that are no mode."""
    words = frozenset(filter(None, os.environ.get(OFF_VARIABLE, "").replace(",", " ").split()))
    if unknown := sorted(words.difference(MODES)):
        raise invalid(OFF_VARIABLE, unknown[0], "is no mode", remedy=f"Use some of {', '.join(MODES)}.")
    return words


def probe(folder: Path, *, off: Collection[str] = ()) -> dict[str, str]:
    """For each of `MODES`: "yes", or why not. `folder` exists; something is mounted below it for a moment."""
    found = dict.fromkeys(MODES, "switched off")
    if "fuse" in off:
        return {mode: "switched off" if mode == "fuse" else "there is no FUSE" for mode in MODES}
    try:
        offer, resend = _try(folder)
    except (FalError, OSError, wire.WireError) as exc:
        return {mode: str(exc) if mode == "fuse" else "there is no FUSE" for mode in MODES}
    found["fuse"] = YES
    if "resend" not in off:
        found["resend"] = YES if offer.resend and not resend else resend or "the kernel is older than Linux 6.9"
    if "allow_mmap" not in off:
        found["allow_mmap"] = YES if offer.allow_mmap else "the kernel is older than Linux 6.6"
    return found


def _try(folder: Path) -> tuple[wire.Offer, str]:
    """What the kernel offers, and why it would not send again."""
    path = folder / f".probe-{os.getpid()}"
    path.mkdir(exist_ok=True)
    try:
        fd = kernel.open_device()
        try:
            kernel.mount(fd, path)
            if not select.select([fd], [], [], _TIMEOUT_S)[0]:
                raise TimeoutError("the kernel says nothing on a new FUSE connection")
            request = wire.parse(memoryview(os.read(fd, wire.REQUEST_BYTES_MAX)))
            offer = wire.offer_of(request.body)
            os.write(fd, wire.init_reply(request.unique, offer))
            try:
                os.write(fd, wire.resend_notice())
            except OSError as exc:
                return offer, f"requests cannot be sent again: {exc.strerror}"
            return offer, ""
        finally:
            os.close(fd)
    finally:
        with contextlib.suppress(OSError):
            kernel.remove_mount_point(path)
