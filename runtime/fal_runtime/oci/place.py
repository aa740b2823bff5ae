"""Where one oci driver keeps its containers, and what it shares among them. Holds paths and caches, decides nothing.

    STATE/containers/ID   records, log, exit code (see `record`); outlive the driver and the boot
    RUN/SCOPE/ID          mounts of one container;  RUN/SCOPE/runtime  the runtime's state;  RUN/SCOPE/etc-…, skeleton-…
                          shared read-only;  RUN/SCOPE/images  see `image_mounts`;  all until the next boot

Called by the modules of the oci driver.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fal_runtime import host_image, socket_dir
from fal_runtime.driver import ContainerSpec
from fal_runtime.oci import rootfs
from fal_runtime.oci.conmon import Runtime
from fal_runtime.oci.image_mounts import ImageMounts
from fal_runtime.oci.record import ContainerFiles
from fal_runtime.oci.userns import UsernsCache
from fal_runtime.uid_ranges import RANGE_IDS, UidRanges


class Place:
    """See the module's docstring. Agents of one machine share `run_dir` and the cgroup tree; `scope`, made from the
    state directory, tells them apart."""

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self.containers = state_dir / "containers"
        self.containers.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.scope = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:8]
        self.run = run_dir / self.scope
        self.runtime_root = self.run / "runtime"
        self.ranges = UidRanges(run_dir / "uid_ranges.json")
        self.userns = UsernsCache(RANGE_IDS)
        self.layout = host_image.this_layout()
        self.images = ImageMounts(self.run / "images", self.uses_image)
        self.copied_etc: Path | None = None

    def files(self, id: str) -> ContainerFiles:
        return ContainerFiles(self.containers / id)

    def uses_image(self, id: str) -> bool:
        """Whether a container's record names this image."""
        records = (self.files(path.name).record() for path in self.containers.iterdir())
        return any(record is not None and record.image == id for record in records)

    def runtime(self, program: str) -> Runtime:
        return Runtime(program, self.runtime_root)

    def cgroup_path(self, id: str) -> str:
        return f"/{socket_dir.CGROUP_PARENT}/{socket_dir.cgroup_name(self.scope, id)}"

    def etc(self) -> Path:
        """The copy of the listed part of /etc; made once for each driver."""
        if self.copied_etc is None:
            self.copied_etc = host_image.make_etc(self.run)
        return self.copied_etc

    def skeleton(self, spec: ContainerSpec) -> Path:
        """The empty root with the mount points that this spec needs."""
        return host_image.make_skeleton(self.run, self.layout, rootfs.extra_mount_points(spec, self.layout))
