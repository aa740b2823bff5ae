"""The container of a task that packs an image: our packer in our own image, with what it needs to speak to a registry.

It has the node's network and, within its own user namespace, the capabilities that files of other owners need; nobody
else's code runs in it. Credentials are those of the task's secret, else the node's own, and are files in memory.
Only where containers have user namespaces, and skopeo, umoci and a packer are installed, a node says that it can pack.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from fal_agent import strangers
from fal_contract.errors import Code, FalError
from fal_contract.limits import SECRET_BYTES_MAX
from fal_contract.v1 import agent_pb2, state_pb2
from fal_runtime.driver import SECRETS_DIR_INSIDE, Capabilities, ContainerSpec, Driver
from fal_runtime.images.layout import CONFIG_FILE, image_file, read_layout

FEATURE: Final = "pack"
# Files keep their owners and modes; nothing that reaches beyond the container's own user namespace.
PRIVILEGES: Final = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETFCAP")
AUTH_FILE: Final = "registry-auth.json"
CA_FILE: Final = "registry-ca.pem"
PROXY_FILE: Final = "registry-proxies.json"
PROXY_VARIABLES: Final = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "ALL_PROXY")
_PROGRAMS: Final = (("skopeo",), ("umoci",), ("mkfs.erofs", "mksquashfs"))
_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"  # what a container sees of the node
_SPARE_S: Final = 5.0  # for the packer to end by itself, and say why


@dataclass(frozen=True, slots=True)
class Packer:
    """How this node packs. `python`: the interpreter inside a container; files are read when a task begins."""

    python: tuple[str, ...] = ()
    auth_file: Path | None = None
    ca_file: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)

    def completed(self, spec: ContainerSpec, message: agent_pb2.Assignment, driver: Driver) -> ContainerSpec:
        """The container of an assignment, completed where it packs an image; others as they are.

        Raises FAILED_PRECONDITION where a file of the node's cannot be read. Blocks for a moment.
        """
        task = message.spec.build
        if not task.image:
            return spec
        secrets = dict(spec.secrets)
        options = ["--platform", task.platform, "--bytes-max", str(task.bytes_max)]
        options += ["--timeout-s", f"{max(1.0, message.spec.scaling.startup_timeout_s - _SPARE_S):g}"]
        auth = task.auth_secret or self._add(secrets, AUTH_FILE, self.auth_file)
        ca = self._add(secrets, CA_FILE, self.ca_file)
        hidden = {name: url for name, url in self.proxies.items() if "@" in url}  # with a password: in memory only
        if hidden:
            secrets[PROXY_FILE] = json.dumps(hidden).encode()
        for option, name in (("--authfile", auth), ("--ca-file", ca), ("--proxy-file", PROXY_FILE if hidden else "")):
            if name:
                options += [option, driver.inside(spec, f"{SECRETS_DIR_INSIDE}/{name}")]
        output = spec.env["FAL_BUILD_OUTPUT"]
        command = (*self.python, "-m", "fal_runtime.images", "pack", task.source, "--output", output, *options)
        env = {**spec.env, **{name: url for name, url in self.proxies.items() if name not in hidden}}
        return replace(spec, command=command, env=env, secrets=secrets, privileges=PRIVILEGES)

    @staticmethod
    def _add(secrets: dict[str, bytes], name: str, file: Path | None) -> str:
        if file is None:
            return ""
        try:
            content = file.read_bytes()
        except OSError as exc:
            what = f"{file}, which this node is to use with registries, cannot be read: {exc.strerror}"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Correct the agent's options.") from None
        if len(content) > SECRET_BYTES_MAX:
            what = f"{file} has {len(content)} bytes, at most {SECRET_BYTES_MAX} are taken"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Name a smaller file in the agent's options.")
        secrets[name] = content
        return name


def proxies_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that name a proxy, in both spellings as they are set."""
    return {name: value for name, value in environ.items() if name.upper() in PROXY_VARIABLES and value}


def missing(found: Capabilities, *, host_network: bool = True, which: Callable[[str], str | None] | None = None) -> str:
    """Why this node cannot pack images; empty when it can. `host_network`: containers may have the node's own."""
    look = which or (lambda name: shutil.which(name, path=_PATH))
    if found.driver != "oci":
        return f"the {found.driver} driver keeps nothing apart"
    if not (found.user_namespaces and found.idmapped_mounts):
        return "containers have no user namespaces here"
    if not host_network:
        return "allow_host_network is off, and a registry is reached over the node's network"
    lacks = [" or ".join(names) for names in _PROGRAMS if not any(look(name) for name in names)]
    return f"{', '.join(lacks)} missing" if lacks else ""


def clear_rest(folder: Path) -> None:
    """Remove everything from a packer's output but the image and its configuration. Blocks."""
    for path in list(folder.iterdir()):
        if path.name in (CONFIG_FILE, image_file("erofs"), image_file("squashfs")):
            continue
        if path.is_dir() and not path.is_symlink():
            strangers.remove(path)
        else:
            path.unlink()


def facts_of(folder: Path) -> state_pb2.ImageFacts:
    """What the packer says of the image in `folder`. CORRUPT naming the field, NOT_FOUND. Blocks."""
    layout = read_layout(folder)
    return state_pb2.ImageFacts(
        source=layout.source,
        digest=layout.digest,
        format=layout.format,
        platform=layout.platform,
        layer_bytes=layout.layer_bytes,
    )


__all__ = ["FEATURE", "PRIVILEGES", "Packer", "clear_rest", "facts_of", "missing", "proxies_of"]
