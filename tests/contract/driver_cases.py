"""What the contract suite needs from each driver: how to make one on a state directory, and programs to run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fal_runtime.driver import ContainerSpec, Driver, Prepared
from fal_runtime.fake import FakeDriver, Machine, Script
from fal_runtime.host_image import this_layout
from fal_runtime.oci.driver import OciDriver
from fal_runtime.process import ProcessDriver

# A Python program, given its behaviour as words; the fake driver is scripted by the same words.
PROGRAM = """
import os, signal, sys, time
words = sys.argv[1:]
if "ignore-term" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for word in words:
    key, _, value = word.partition("=")
    if key == "say":
        print(value, flush=True)
    elif key == "err":
        print(value, file=sys.stderr, flush=True)
    elif key == "exit":
        sys.exit(int(value))
    elif key == "sleep":
        time.sleep(float(value))
    elif key == "signal":
        os.kill(os.getpid(), int(value))
while "forever" in words:
    time.sleep(60)
"""


def script_of(spec: ContainerSpec) -> Script:
    """The fake's reading of the same words."""
    if spec.command[0] == "/no/such/program":
        return Script(refuse_start="no such file or directory")
    pairs = [word.partition("=")[::2] for word in spec.command[3:]]
    values = dict(pairs)
    sleep_s = float(values["sleep"]) if "sleep" in values else 0.0
    ends = "forever" not in values
    return Script(
        exit_after_s=sleep_s if ends else None,
        exit_code=int(values.get("exit") or 0),
        ignore_term="ignore-term" in values,
        lines=tuple(value for key, value in pairs if key in ("say", "err")),
    )


@dataclass
class Bench:
    """One driver under test; `again()` is the same node after the agent's restart."""

    name: str
    root: Path
    python: str
    make: Callable[[], Driver]
    prepares: bool = False  # every container was made ahead where it can be
    driver: Driver = field(init=False)

    def __post_init__(self) -> None:
        self.driver = self.make()

    def again(self) -> Driver:
        self.driver = self.make()
        return self.driver

    def spec(self, id: str, *words: str, **more: object) -> ContainerSpec:
        command = (self.python, "-c", PROGRAM, *words)
        id = f"{id}-{os.path.basename(self.root)[-8:].lower()}"
        if self.prepares:
            more.setdefault("socket_dir", self.root / f"s-{id}")  # only those with one can be made ahead
        return ContainerSpec(id=id, command=command, **more)  # type: ignore[arg-type]

    def was_prepared(self, id: str) -> bool:
        return (self.root / "state" / "containers" / id).is_symlink()


class PreparingDriver(OciDriver):
    """Has one ready of the very shape of each container that is created."""

    async def create(self, spec: ContainerSpec) -> None:
        if await self.status(spec.id) is None:
            await self.prepare([Prepared(spec, 1)])
        await super().create(spec)


def fake_bench(root: Path) -> Bench:
    machine = Machine(script_of=script_of)
    return Bench("fake", root, "python3", lambda: FakeDriver(machine))


def process_bench(root: Path) -> Bench:
    return Bench("process", root, sys.executable, lambda: ProcessDriver(root / "state"))


def oci_bench(root: Path) -> Bench:
    return Bench("oci", root, this_layout().python, lambda: OciDriver(root / "state"))


def prepared_bench(root: Path) -> Bench:
    return Bench("oci", root, this_layout().python, lambda: PreparingDriver(root / "state"), prepares=True)


def oci_missing() -> str:
    """Why containers cannot be tested on this machine; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("conmon") is None:
        return "needs conmon"
    if shutil.which("runc") is None and shutil.which("crun") is None:
        return "needs runc or crun"
    return ""
