"""Runs a container that has a device node which it may not open, lets it, and takes it away again.

    device_attach_child.py STATE here|v2

v2: on a tree of cgroup v2 alone, in a mount namespace of its own, whatever this machine has mounted. Its controllers
belong to v1 here, so the container has no limits; the device filter needs none. Prints what the container saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

LOOK = """
import os, time
last = None
while True:
    try:
        os.close(os.open("/dev/granted", os.O_RDWR | os.O_NONBLOCK))
        seen = 0
    except OSError as error:
        seen = error.errno
    if seen != last:
        last = seen
        print(seen, flush=True)
    time.sleep(0.01)
"""


async def main(state: Path) -> dict[str, object]:
    from fal_runtime import host_image
    from fal_runtime.driver import ContainerSpec
    from fal_runtime.oci import cgroups, device_filter
    from fal_runtime.oci.driver import OciDriver
    from fal_runtime.oci.spec import DeviceNode

    cdi = state / "cdi"
    cdi.mkdir(parents=True, mode=0o755)
    host_node = state / "granted"  # as the mapped root may open it; of a number that no container has by default
    os.mknod(host_node, stat.S_IFCHR | 0o666, os.makedev(10, 237))
    host_node.chmod(0o666)
    node = {"path": "/dev/granted", "hostPath": str(host_node), "permissions": "none"}
    device = {"name": "one", "containerEdits": {"deviceNodes": [node]}}
    (cdi / "a.json").write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "example.com/thing", "devices": [device]}))
    driver = OciDriver(state, cdi=(cdi,))
    spec = ContainerSpec(
        f"attach-{os.urandom(4).hex()}", (host_image.this_layout().python, "-c", LOOK), cdi=("example.com/thing=one",)
    )
    granted = DeviceNode("/dev/granted", "c", 10, 237)
    seen: list[str] = []
    try:
        found = await driver.probe()
        await driver.create(spec)
        await driver.start(spec.id)
        path = driver._place.cgroup_path(spec.id)
        async with aclosing(driver.logs(spec.id, tail_lines=9, follow=True)) as lines:
            async for line in lines:
                seen.append(line.text)
                if len(seen) == 1:
                    device_filter.allow(path, [granted])
                elif len(seen) == 2:
                    device_filter.deny(path, [granted], held=[granted])
                else:
                    break
        return {"seen": seen, "cgroup": cgroups.mode(), "features": found.features, "runtime": found.runtime}
    finally:
        await driver.clean(frozenset())
        driver.close()


def v2_alone() -> None:
    """A mount namespace whose only cgroup tree is v2."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    for command in (
        ("mount", "--make-rslave", "/"),
        ("umount", "-R", "/sys/fs/cgroup"),
        ("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"),
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[2] == "v2":
        v2_alone()

    async def bounded() -> dict[str, object]:
        async with asyncio.timeout(60):
            return await main(Path(sys.argv[1]))

    print(json.dumps(asyncio.run(bounded())))
