"""Shows unfinished artifacts as read-only folders whose reads wait for their pieces (FUSE, our own).

`InFlightMounts` is what the node uses; `probe` says what works here. READY artifacts are never behind it.
"""

from fal_fsd.mount.mounts import READ_TIMEOUT_S, InFlightMounts
from fal_fsd.mount.probe import probe
from fal_fsd.mount.sources import FolderPart

__all__ = ["READ_TIMEOUT_S", "FolderPart", "InFlightMounts", "probe"]
