"""What works on this machine, found by doing it: a trivial container is really run, trees are really mapped.

Called by the oci driver before its first container and by the agent for its inventory. Leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fal_contract.errors import FalError
from fal_runtime.driver import Capabilities, ContainerSpec, driver_failed
from fal_runtime.oci import cgroups, device_filter, image_probe, limits, mounts
from fal_runtime.oci.conmon import Mode
from fal_runtime.oci.place import Place
from fal_runtime.oci.userns import UsernsCache
from fal_runtime.socket_dir import CGROUP_PARENT
from fal_runtime.uid_ranges import FIRST_ID

RUNTIMES: Final = ("runc", "crun")
TIMEOUT_S: Final = 30.0
ID_PREFIX: Final = "falctl-probe-"  # a runner's id has a dot in it
_GOOD: Final = 42
_NO_FILTER: Final = 41
# Exits 42 when it runs under a seccomp filter, 41 when not.
_SCRIPT: Final = "while read -r k v; do [ $k = Seccomp: ] && [ $v = 2 ] && exit 42; done </proc/self/status; exit 41"


RunOnce = Callable[[Mode, ContainerSpec], Awaitable[int | None]]


async def find(run_once: RunOnce, userns: UsernsCache, run_dir: Path) -> tuple[Mode, Capabilities]:
    """The first runtime that runs a container, with a user namespace if that works; `run_once` runs one in a mode.

    DRIVER_FAILED when no combination does, with the reason of each.
    """
    details: dict[str, str] = {}
    if os.geteuid() != 0:
        raise driver_failed("the oci driver needs root", remedy="Run the agent as root, or use --driver process.")
    if shutil.which("conmon") is None:
        raise driver_failed("conmon is not installed", remedy="apt install conmon, or use --driver process.")
    cgroups.make_parent(f"/{CGROUP_PARENT}")
    idmap = await _idmap_works(userns, details)
    nosymfollow = _nosymfollow_works(run_dir, details)
    for runtime in RUNTIMES:
        program = shutil.which(runtime)
        if program is None:
            details[runtime] = "not installed"
            continue
        for user_namespace in (True, False) if idmap else (False,):
            mode = Mode(program, user_namespace)
            exit_code = await _try(run_once, mode, details)
            if exit_code is None:
                continue
            return mode, Capabilities(
                driver="oci",
                isolates=True,
                runtime=await _version(program),
                user_namespaces=user_namespace,
                idmapped_mounts=idmap,
                cgroup=cgroups.mode(),
                seccomp=exit_code == _GOOD,
                nosymfollow=nosymfollow,
                details=MappingProxyType(details),
            )
    reasons = "; ".join(f"{name}: {why}" for name, why in details.items())
    raise driver_failed(f"no container can be run here ({reasons})", remedy="Use --driver process, or fix the first.")


async def with_features(found: Capabilities, place: Place) -> Capabilities:
    """What was found, with what the driver can do beyond running a container; each was tried."""
    why_not = await asyncio.to_thread(place.egress.probe)
    features: tuple[str, ...] = () if why_not else ("egress",)
    userns_fd = await place.userns.get(FIRST_ID) if found.user_namespaces else None
    formats = await asyncio.to_thread(image_probe.try_formats, place.run, userns_fd)
    if not all(formats.values()):
        features = (*features, "images")
    io = limits.io_trouble()
    features = (*features, "cdi", *(("device-attach",) if device_filter.works() else ()))
    features = features if io else (*features, "io-limit")
    words = {f"images of {format_}": why or "works" for format_, why in formats.items()}
    details = {**found.details, "egress": why_not or "works", "io-limit": io or "works", **words}
    return replace(found, features=(*found.features, *features), details=MappingProxyType(details))


async def _try(run_once: RunOnce, mode: Mode, details: dict[str, str]) -> int | None:
    """Run one container in this mode; its exit code, or None with the reason in `details`."""
    name = Path(mode.program).name + (" with user namespace" if mode.user_namespace else "")
    spec = ContainerSpec(id=f"{ID_PREFIX}{os.getpid()}", command=("/bin/sh", "-c", _SCRIPT))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            exit_code = await run_once(mode, spec)
    except (FalError, TimeoutError) as error:
        details[name] = str(error) or "timed out"
        return None
    if exit_code not in (_GOOD, _NO_FILTER):
        details[name] = f"the container ended with {exit_code}"
        return None
    details[name] = "works"
    return exit_code


async def _idmap_works(userns: UsernsCache, details: dict[str, str]) -> bool:
    """Map the trees that the host image consists of."""
    try:
        fd = await userns.get(FIRST_ID)
        for source in (Path("/usr"), Path(sys.base_prefix), Path(__file__).parent):
            tree_fd = mounts.open_tree(source)
            try:
                mounts.mount_setattr(tree_fd, mounts.ATTR_RDONLY, userns_fd=fd)
            finally:
                os.close(tree_fd)
    except FalError as error:
        details["idmapped mounts"] = str(error)
        return False
    return True


def _nosymfollow_works(run_dir: Path, details: dict[str, str]) -> bool:
    """On a nosymfollow tmpfs a link must not be followed."""
    place = run_dir / f"probe-nosymfollow-{os.getpid()}"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        mounts.mount("falctl-probe", place, "tmpfs", mounts.MS_NOSYMFOLLOW, "size=4096")
        (place / "link").symlink_to("/etc/hostname")
        try:
            os.close(os.open(place / "link", os.O_RDONLY))
        except OSError as error:
            return error.errno == errno.ELOOP
    except FalError as error:
        details["nosymfollow"] = str(error)
        return False
    finally:
        mounts.unmount_all(place)
        place.rmdir()
    details["nosymfollow"] = "a link was followed"
    return False


async def _version(program: str) -> str:
    process = await asyncio.create_subprocess_exec(program, "--version", stdout=asyncio.subprocess.PIPE)
    out, _error = await process.communicate()
    words = out.decode("utf-8", "replace").splitlines()[0].split()
    return f"{Path(program).name} {words[2] if len(words) > 2 else '?'}"
