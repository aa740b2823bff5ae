"""Where one oci driver keeps its containers, and what it shares among them. Holds paths and caches, decides nothing.

    STATE/containers/ID   records, log, exit code (see `record`); outlive the driver and the boot
    RUN/SCOPE/ID          mounts of one container;  RUN/SCOPE/runtime  the runtime's state;  RUN/SCOPE/etc-…, skeleton-…
                          shared read-only;  RUN/SCOPE/images  see `image_mounts`;  all until the next boot

Called by the modules of the oci driver.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from fal_runtime import host_image, socket_dir
from fal_runtime.cdi.model import NO_EDITS, Edits
from fal_runtime.cdi.reader import DIRECTORIES, Reader, complete
from fal_runtime.cdi.registry import resolve
from fal_runtime.driver import ContainerSpec
from fal_runtime.network.egress import EgressNetwork
from fal_runtime.network.egress import Settings as EgressSettings
from fal_runtime.oci import rootfs
from fal_runtime.oci.conmon import Runtime
from fal_runtime.oci.image_mounts import ImageMounts
from fal_runtime.oci.nursery import Nursery
from fal_runtime.oci.record import ContainerFiles
from fal_runtime.oci.userns import UsernsCache
from fal_runtime.uid_ranges import RANGE_IDS, UidRanges


class Place:
    """See the module's docstring. Agents of one machine share `run_dir` and the cgroup tree; `scope`, made from the
    state directory, tells them apart."""

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        egress: EgressSettings = EgressSettings(),
        cdi: Sequence[Path] = DIRECTORIES,
    ) -> None:
        self.containers = state_dir / "containers"
        self.prepared = state_dir / "prepared"
        self.containers.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.scope = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:8]
        self.run = run_dir / self.scope
        self.runtime_root = self.run / "runtime"
        self.ranges = UidRanges(run_dir / "uid_ranges.json")
        self.userns = UsernsCache(RANGE_IDS)
        self.nursery = Nursery()
        self.layout = host_image.this_layout()
        self.images = ImageMounts(self.run / "images", self.users_of_image)
        self.egress = EgressNetwork(run_dir, self.scope, egress)
        self.cdi = Reader(cdi)
        self.copied_etc: Path | None = None

    def files(self, id: str) -> ContainerFiles:
        return ContainerFiles(self.containers / id)

    def users_of_image(self, id: str) -> frozenset[str]:
        """The containers whose records name this image."""
        records = (self.files(path.name).record() for path in self.containers.iterdir())
        return frozenset(record.id for record in records if record is not None and record.image == id)

    def runtime(self, program: str) -> Runtime:
        return Runtime(program, self.runtime_root)

    def cgroup_path(self, id: str) -> str:
        return f"/{socket_dir.CGROUP_PARENT}/{socket_dir.cgroup_name(self.scope, id)}"

    def etc(self) -> Path:
        """The copy of the listed part of /etc; made once for each driver."""
        if self.copied_etc is None:
            self.copied_etc = host_image.make_etc(self.run)
        return self.copied_etc

    def edits(self, spec: ContainerSpec, *, user_namespace: bool) -> Edits:
        """What its CDI devices bring. INVALID, NOT_FOUND or FAILED_PRECONDITION, naming the device."""
        if not spec.cdi:
            return NO_EDITS
        return complete(resolve(spec.cdi, self.cdi.registry()), user_namespace=user_namespace)

    def skeleton(self, spec: ContainerSpec, edits: Edits = NO_EDITS) -> Path:
        """The empty root with the mount points that this spec and its devices need."""
        points = rootfs.extra_mount_points(spec, self.layout, edits)
        return host_image.make_skeleton(self.run, self.layout, points)
