"""`image = "host"`: the node's own programs as a container's root, until real images come.

Invariant: a container sees /usr and the /lib*, /bin, /sbin that belong to it, a listed part of /etc (copies, no file
that others may not read), and the worker's environment; never the node's keys, state, homes or other checkouts.
The root is read-only, so bind mounts do and no overlay is needed. `Layout` says what goes where (pure, but for the look
at this interpreter in `this_layout`); `make_skeleton` and `make_etc` write files. Used by the oci driver.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fal_contract
import fal_runtime

PYTHON_INSIDE: Final = "/opt/falctl/python"
ENV_INSIDE: Final = "/opt/falctl/env"
SRC_INSIDE: Final = "/opt/falctl/src"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ROOT_LINKS: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRECTORIES: Final = (
    *("dev", "etc", "proc", "sys", "tmp", "usr", "models", "mnt", "var/lib", "var/cache"),
    *("run/fal", "run/fal-bind", "run/secrets"),
    *("opt/falctl/python", "opt/falctl/env", "opt/falctl/src/fal_runtime", "opt/falctl/src/fal_contract"),
)
# What programs look up and customers may see. Directories are copied with what lies in them.
ETC_LISTED: Final = (
    *("alternatives", "debian_version", "host.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime"),
    *("mime.types", "nsswitch.conf", "os-release", "protocols", "services", "ssl/certs", "ssl/openssl.cnf", "timezone"),
)
_PASSWD: Final = "root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/false\n"
_GROUP: Final = "root:x:0:\nnogroup:x:65534:\n"
_HOSTS: Final = "127.0.0.1 localhost\n::1 localhost\n"
_ETC_ENTRIES_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """How to run a Python module of ours: `argv` up to and without `-m MODULE`, and environment it needs."""

    argv: tuple[str, ...]
    env: dict[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Read-only binds that make the host image, as (host path, absolute path inside), and what Python needs."""

    binds: tuple[tuple[Path, str], ...]
    links: tuple[tuple[str, str], ...]  # (name in the root, target)
    python: str
    env: dict[str, str]


def this_layout() -> Layout:
    """The layout for this interpreter and this checkout or installation."""
    base = Path(sys.base_prefix)
    below_usr = base == Path("/usr") or Path("/usr") in base.parents
    binds = [(Path("/usr"), "/usr")]
    if not below_usr:
        binds.append((base, PYTHON_INSIDE))
    binds.append((Path(sysconfig.get_paths()["purelib"]), ENV_INSIDE))
    for package in (fal_runtime, fal_contract):
        assert package.__file__
        binds.append((Path(package.__file__).parent, f"{SRC_INSIDE}/{package.__name__}"))
    links = []
    for name in _ROOT_LINKS:
        path = Path("/") / name
        if path.is_symlink():
            links.append((name, os.readlink(path)))
        elif path.is_dir():
            binds.append((path, f"/{name}"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = f"{base}/bin/{version}" if below_usr else f"{PYTHON_INSIDE}/bin/{version}"
    env = {
        "PATH": _PATH if below_usr else f"{PYTHON_INSIDE}/bin:{_PATH}",
        "PYTHONPATH": f"{SRC_INSIDE}:{ENV_INSIDE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
    }
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and not below_usr:
        env["LD_LIBRARY_PATH"] = f"{PYTHON_INSIDE}/lib"
    return Layout(tuple(binds), tuple(links), python, env)


def worker_command(*, isolates: bool) -> WorkerCommand:
    """For `Driver.isolates`: the interpreter as a container of that driver finds it."""
    if isolates:
        layout = this_layout()
        return WorkerCommand((layout.python,), {})  # the driver sets the layout's environment itself
    roots: list[str] = []
    for package in (fal_runtime, fal_contract):
        assert package.__file__
        roots.append(str(Path(package.__file__).parent.parent))
    return WorkerCommand((sys.executable,), {"PYTHONPATH": ":".join(roots), "PYTHONUNBUFFERED": "1"})


def make_skeleton(parent: Path, layout: Layout, extra: tuple[tuple[str, bool], ...] = ()) -> Path:
    """A directory in `parent` with the empty directories, files and links of a container's root.

    `extra` are further mount points (path inside, is a directory). Made once for each set of them and shared read-only,
    as making it takes longer than all mounts together.
    """
    digest = hashlib.sha256(repr((layout, extra, _DIRECTORIES)).encode()).hexdigest()[:16]
    target = parent / f"skeleton-{digest}"
    if target.exists():
        return target
    fresh = parent / f".{target.name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    _fill_skeleton(fresh, layout, extra)
    return _put(fresh, target)


def _put(fresh: Path, target: Path) -> Path:
    """Rename a finished directory to its name, unless another agent of this machine was faster."""
    try:
        fresh.rename(target)
    except OSError:
        shutil.rmtree(fresh)
    return target


def _fill_skeleton(root: Path, layout: Layout, extra: tuple[tuple[str, bool], ...]) -> None:
    targets = [(path, True) for path in _DIRECTORIES]
    targets += [(inside, True) for _source, inside in layout.binds]
    made: set[Path] = set()
    for inside, is_directory in (*targets, *extra):
        path = root / inside.lstrip("/")
        parents = path if is_directory else path.parent
        parents.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not is_directory:
            path.touch(mode=0o644)
        made.update(p for p in (path, *path.parents) if root in p.parents or p == root)
    for name, target in (*layout.links, ("var/tmp", "/tmp"), ("var/run", "/run")):
        link = root / name
        if not link.is_symlink():
            link.symlink_to(target)
    for path in made:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (root / "tmp").chmod(0o1777)  # runc gives a tmpfs the mode of what it covers


def _etc_entries(etc: Path) -> list[tuple[str, os.stat_result]]:
    """(path below /etc, its lstat) of everything listed that others may read, links included."""
    found: list[tuple[str, os.stat_result]] = []

    def take(path: Path) -> None:
        try:
            info = path.lstat()
        except OSError:
            return
        if stat.S_ISDIR(info.st_mode):
            for child in sorted(path.iterdir()):
                take(child)
        elif stat.S_ISLNK(info.st_mode) or (stat.S_ISREG(info.st_mode) and info.st_mode & stat.S_IROTH):
            found.append((str(path.relative_to(etc)), info))

    for name in ETC_LISTED:
        take(etc / name)
    return found[:_ETC_ENTRIES_MAX]


def make_etc(parent: Path, *, etc: Path = Path("/etc")) -> Path:
    """A directory in `parent` with the listed part of `etc`, named after its content; made only when it is missing."""
    entries = _etc_entries(etc)
    digest = hashlib.sha256()
    for name, info in entries:
        digest.update(f"{name} {info.st_mode} {info.st_size} {info.st_mtime_ns}\n".encode())
    target = parent / f"etc-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    fresh = parent / f".{target.name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    fresh.chmod(0o755)
    for name, info in entries:
        copy = fresh / name
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        if stat.S_ISLNK(info.st_mode):
            copy.symlink_to(os.readlink(etc / name))
        else:
            shutil.copyfile(etc / name, copy)
            copy.chmod(0o644)
    for name, text in (("passwd", _PASSWD), ("group", _GROUP), ("hosts", _HOSTS), ("hostname", "runner\n")):
        (fresh / name).write_text(text)
    (fresh / "resolv.conf").touch()
    return _put(fresh, target)
