"""Images: from a source (registry, OCI layout, archive, folder) to one read-only file system image and its facts.

`layout` reads what `pack` wrote; `process` says which process an image's configuration means. The command
`python -m fal_runtime.images pack` is what nodes and operators' machines run.
"""

from fal_runtime.images.layout import ImageConfig, ImageLayout, read_layout
from fal_runtime.images.process import ImageProcess, UserIds, home_of, process_of, user_of

__all__ = [
    "ImageConfig", "ImageLayout", "ImageProcess", "UserIds", "home_of", "process_of", "read_layout", "user_of",
]  # fmt: skip
