"""Running CNI plugins as the specification says (version 1.0, section 3, execution protocol).

A plugin gets its parameters as environment variables and its configuration on stdin, and answers with a JSON object on
stdout; errors are JSON objects, too. A list of plugins is run in order for ADD, each with the result before it, and in
the opposite order for DEL. Blocking; called by `egress` in a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import FalError
from fal_runtime.driver import driver_failed

VERSION: Final = "1.0.0"
TIMEOUT_S: Final = 30.0
INTERFACE: Final = "eth0"
_OUTPUT_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Attachment:
    """One container and its namespace."""

    id: str
    netns: Path


class Plugins:
    """A network: its configuration list (`name`, `plugins`), and where the programs lie, first match wins."""

    def __init__(self, name: str, plugins: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> None:
        self._name = name
        self._plugins = plugins
        self._folders = folders

    def add(self, at: Attachment) -> dict[str, Any]:
        """Attach; returns the last plugin's result. What failed half way is taken back. DRIVER_FAILED."""
        result: dict[str, Any] = {}
        try:
            for plugin in self._plugins:
                result = self._run("ADD", plugin, at, result)
        except BaseException:
            with contextlib.suppress(FalError):
                self.delete(at, result)
            raise
        return result

    def check(self, at: Attachment, result: Mapping[str, Any]) -> None:
        """Raise DRIVER_FAILED unless all is as ADD left it."""
        for plugin in self._plugins:
            self._run("CHECK", plugin, at, result)

    def delete(self, at: Attachment, result: Mapping[str, Any]) -> None:
        """Detach, with ADD's result where it is known. One that is not attached (any more) is fine. DRIVER_FAILED."""
        for plugin in reversed(self._plugins):
            self._run("DEL", plugin, at, result)

    def programs(self) -> list[Path]:
        """The programs that it needs. DRIVER_FAILED when one is missing."""
        kinds = [kind for plugin in self._plugins for kind in (plugin["type"], plugin.get("ipam", {}).get("type"))]
        return [self._program(kind) for kind in kinds if kind]

    def _program(self, kind: str) -> Path:
        for folder in self._folders:
            if os.access(program := folder / kind, os.X_OK):
                return program
        where = " and ".join(map(str, self._folders)) or "no folder"
        raise driver_failed(
            f"CNI plugin {kind} is not in {where}",
            remedy="apt install containernetworking-plugins, or name its folder with --cni-plugin-dir.",
        )

    def _run(self, verb: str, plugin: Mapping[str, Any], at: Attachment, before: Mapping[str, Any]) -> dict[str, Any]:
        given = {"cniVersion": VERSION, "name": self._name, **plugin}
        if before:
            given["prevResult"] = before
        env = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": at.id,
            "CNI_NETNS": str(at.netns),
            "CNI_IFNAME": INTERFACE,
            "CNI_PATH": os.pathsep.join(map(str, self._folders)),
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        }
        program, what = self._program(plugin["type"]), f"CNI {plugin['type']} {verb} of {at.id}"
        try:
            done = subprocess.run(
                [program],
                input=json.dumps(given).encode(),
                env=env,
                capture_output=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise driver_failed(f"{what}: {error}", remedy="Try again.") from error
        return _answer(what, done)


def _answer(what: str, done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    text = done.stdout[:_OUTPUT_BYTES_MAX]
    try:
        answer = json.loads(text) if text.strip() else {}
    except ValueError:
        answer = None
    if done.returncode or not isinstance(answer, dict):
        error = answer if isinstance(answer, dict) else {}
        said = ": ".join(part for part in (error.get("msg"), error.get("details")) if part)
        said = said or (done.stderr or text).decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
        raise driver_failed(f"{what}: {said}", remedy="Look at the node's network settings.")
    return answer
