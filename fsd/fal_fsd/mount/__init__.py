"""Shows unfinished artifacts as read-only folders whose reads wait for their pieces (FUSE, our own).

`InFlightMounts` is what the node uses; `probe` says what works here. READY artifacts are never behind it.

What a reader sees: files of mode 0444 with their final sizes. A read waits until all pieces that it touches were
checked, moves them to the front, can be killed, and ends within `read_timeout_s` with EIO, which is logged. Files can
be mapped while they are unfinished; then a piece that does not come is SIGBUS to the process, as with any file that
cannot be read: loaders that must not die read unfinished files and map finished ones. What is open when the artifact is
finished reads on; what is opened after the runner's directory was switched is the plain file.
"""

from fal_fsd.mount.mounts import READ_TIMEOUT_S, InFlightMounts
from fal_fsd.mount.probe import probe
from fal_fsd.mount.sources import FolderPart

__all__ = ["READ_TIMEOUT_S", "FolderPart", "InFlightMounts", "probe"]
