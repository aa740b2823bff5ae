"""Small packed images for tests, as `fal_runtime.images` packs them: a static busybox and what a test adds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fal_runtime.driver import Image

BUSYBOX: Final = Path("/bin/busybox")
_APPLETS: Final = ("sh", "cat", "ls", "dd", "id", "sleep", "stat", "readlink", "head", "wc", "mount", "md5sum", "mkdir")
_PASSWD: Final = "root:x:0:0::/root:/bin/sh\nworker:x:1000:1000::/home/worker:/bin/sh\n"
_GROUP: Final = "root:x:0:\nworker:x:1000:\nvideo:x:44:worker\n"


def tools_missing() -> str:
    """Why no image can be made here; empty: it can."""
    missing = [name for name in ("mkfs.erofs", "mksquashfs") if shutil.which(name) is None]
    if not BUSYBOX.exists():
        missing.append(str(BUSYBOX))
    return ", ".join(missing)


def make_root(root: Path) -> Path:
    """A root file system of a few files."""
    for name in ("bin", "etc", "root", "home/worker", "var"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text(_PASSWD)
    (root / "etc/group").write_text(_GROUP)
    (root / "etc/only-root").write_text("secret of the image's root\n")
    (root / "etc/only-root").chmod(0o600)
    return root


def make_folder(
    folder: Path,
    *,
    format: str = "erofs",
    config: dict[str, Any] | None = None,
    change: Callable[[Path], None] = lambda root: None,
) -> Path:
    """The folder of an image; `change` may alter its root before it is packed."""
    root = make_root(folder.parent / f"{folder.name}.root")
    change(root)
    folder.mkdir()
    file = folder / f"image.{format}"
    erofs: list[str | Path] = ["mkfs.erofs", "-T0", file, root]
    squashfs: list[str | Path] = ["mksquashfs", root, file, "-quiet", "-no-progress"]
    subprocess.run(erofs if format == "erofs" else squashfs, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    facts = {
        "version": 1, "source": f"rootfs:{root}", "digest": "sha256:" + "0" * 64, "platform": "linux/amd64",
        "format": format, "layer_bytes": file.stat().st_size, "config": config or {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def image_of(folder: Path, *, finished: bool = True) -> Image:
    """As the agent names it; the id is one of its own, so that tests do not share mounts."""
    return Image(os.urandom(32).hex(), folder, finished)
