"""The serving process of `bench_fsd_inflight`: `python fsd_inflight_child.py MOUNTS-FOLDER DATA-FOLDER`.

Serves the artifact of DATA-FOLDER with its last piece missing, prints the folder of its mount, ends with its input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fsd_parts import artifact_of_folder

from fal_contract.pieces import Bitmap
from fal_contract.telemetry import configure_logging
from fal_fsd.mount import FolderPart, InFlightMounts


class Unfinished(FolderPart):
    """All but the last piece."""

    @property
    def have(self) -> Bitmap:
        return Bitmap(self.artifact.layout.count, range(self.artifact.layout.count - 1))

    def has(self, piece: int) -> bool:
        return piece < self.artifact.layout.count - 1


async def main(mounts_folder: Path, data: Path) -> None:
    part = Unfinished(artifact_of_folder(data), data)
    mounts = InFlightMounts(mounts_folder, on_wanted=lambda *_: None)
    await mounts.start()
    try:
        print(await mounts.open(part), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    finally:
        await mounts.stop(keep=False)
        part.close()


if __name__ == "__main__":
    configure_logging("fsd-inflight", level="warning")
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
