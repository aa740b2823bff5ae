"""Whether containers of images can be made here, found by making such a root: loop device, overlay, id map.

Called by `probe`; leaves nothing behind. Blocks.
"""

from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from typing import Final

from fal_contract.errors import FalError
from fal_runtime.driver import ContainerSpec, Image
from fal_runtime.images.layout import Format
from fal_runtime.oci import image_root, loop, mounts, rootfs
from fal_runtime.uid_ranges import FIRST_ID

# An empty root folder packed by mkfs.erofs 1.5 and mksquashfs 4.5.1 (both 4096 bytes), deflated: a node that only runs
# images needs neither tool.
_EMPTY: Final[dict[Format, bytes]] = {
    "erofs": (
        b"c-muN7zLwX6pU2x=;7A~<tcI>nSpE`1{DTIENU2OXg>=Ozjb6{kcRUA0|BzU3Y3;$V1lzHfowfJz0t@U1*2dTjDk@x3P!;w7zLw%L;wKEMGOi"
    ),
    "squashfs": (
        b"c-rmFtqp)M5QgFJpaRPVjE2OLF3_NnC?uOO5Hmp196zZ>zK^&!ZF0FGj?r|h@-(&D%@p+7ysP(gy}zfTv$sp8<2hi"
        b"TJGHk-Dt1HuSp)z80002~aRC!Y5qS"
    ),
}


def try_formats(run_dir: Path, userns_fd: int | None) -> dict[Format, str]:
    """For each format why it does not work; empty: it does."""
    return {format_: _try(format_, packed, run_dir, userns_fd) for format_, packed in _EMPTY.items()}


def _try(format_: Format, packed: bytes, run_dir: Path, userns_fd: int | None) -> str:
    place = run_dir / f"probe-images-{os.getpid()}"
    try:
        place.mkdir(parents=True, mode=0o711)
        mounted, file = place / "image", place / "file"
        mounted.mkdir()
        file.write_bytes(zlib.decompress(base64.b85decode(packed)))
        with open(file, "rb") as opened, loop.attached(opened.fileno(), format_, place) as device:
            mounts.mount(str(device), mounted, format_, mounts.MS_RDONLY)
        spec = ContainerSpec(id="probe", command=(), image=Image("probe", place))
        root = image_root.assemble(place, spec, mounted, uid_start=FIRST_ID, userns_fd=userns_fd, hostname="probe")
        (root / "probe").write_text("written over the image")
        owner = root.stat().st_uid
        return "" if owner == FIRST_ID else f"the root belongs to {owner}"
    except (FalError, OSError) as exc:
        return exc.what if isinstance(exc, FalError) else str(exc)
    finally:
        rootfs.dismantle(place)
