"""Where an agent keeps what; the lock on it; which driver works there. Called by fal_agent.main and fal_agent.purge.

STATE/lock         one agent at a time       STATE/identity   certificate and key, one file
STATE/journal      standing and runners      STATE/driver     name of the driver that was chosen
STATE/c/           the driver's containers   STATE/r/         assignments beside them
STATE/proxy/       fal-proxy                 STATE/fsd/       fal-fsd          STATE/log/  output of both
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_agent.ports import Places
from fal_contract.errors import Code, FalError
from fal_contract.telemetry import get_logger
from fal_runtime.driver import Capabilities, Driver
from fal_runtime.network.egress import Settings as EgressSettings

# The mapped root of a user namespace must be able to walk to a container's sockets and models.
RUN_ROOT: Final = Path("/run/falctl")
_log = get_logger("fal.agent")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one state directory."""

    state_dir: Path

    @property
    def identity(self) -> Path:
        return self.state_dir / "identity"

    @property
    def journal(self) -> Path:
        return self.state_dir / "journal"

    @property
    def driver(self) -> Path:
        return self.state_dir / "driver"

    @property
    def proxy_control(self) -> Path:
        return self.state_dir / "proxy" / "proxy.sock"

    @property
    def fsd_socket(self) -> Path:
        return self.state_dir / "fsd" / "fsd.sock"

    def log(self, daemon: str) -> Path:
        return self.state_dir / "log" / f"{daemon}.log"

    def make(self) -> None:
        """Make the folders. Raises FAILED_PRECONDITION when the state directory cannot be written."""
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("c", "r", "proxy", "fsd", "log"):
                (self.state_dir / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as exc:
            raise FalError(
                Code.FAILED_PRECONDITION,
                f"the state directory {self.state_dir} cannot be written: {exc.strerror}",
                remedy="Give --state-dir a folder of this user.",
            ) from None

    @property
    def cdi(self) -> Path:
        """The node's own CDI specification; in the run directory, because device numbers end with the boot."""
        scope = hashlib.sha256(os.fsencode(self.state_dir.resolve())).hexdigest()[:8]
        return RUN_ROOT / f"agent-{scope}" / "cdi"

    def lock(self) -> int:
        """Hold the state directory until the returned descriptor is closed. ALREADY_EXISTS: another agent has it."""
        fd = os.open(self.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise FalError(
                Code.ALREADY_EXISTS,
                f"another agent runs in {self.state_dir}",
                remedy="One agent a state directory: end that one, or give another --state-dir.",
            ) from None
        return fd

    def places(self, *, isolates: bool) -> Places:
        """Where runners' files lie for this kind of driver."""
        from fal_runtime.host_image import worker_command

        root = self.state_dir
        if isolates:
            root = self.cdi.parent
            root.mkdir(parents=True, exist_ok=True, mode=0o711)
            root.chmod(0o711)
        command = worker_command(isolates=isolates)
        places = Places(
            sockets=root / "s",
            models=root / "m",
            runners=self.state_dir / "r",
            worker_command=(*command.argv, "-m", "fal_runtime.worker"),
            worker_env=command.env,
        )
        for folder in (places.sockets, places.models):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o711)
        return places

    async def open_driver(
        self, wanted: str, *, cdi_dirs: Sequence[Path] = (), egress: EgressSettings = EgressSettings()
    ) -> tuple[Driver, Capabilities]:
        """The driver that was asked for, or that works here. One that has containers stays the node's driver.

        `cdi_dirs`: folders with CDI specifications beside the node's own.
        """
        before = self.driver.read_text().strip() if self.driver.exists() else ""
        if wanted == "auto":
            wanted = before or ("oci" if os.geteuid() == 0 else "process")
            fall_back = not before
        else:
            fall_back = False
            if before and before != wanted and any((self.state_dir / "c").rglob("*.json")):
                raise FalError(
                    Code.FAILED_PRECONDITION,
                    f"this node has containers of the {before} driver, {wanted} was asked for",
                    remedy=f"Start with --driver {before}, or clear the node first: fal-agent purge.",
                )
        try:
            driver = _driver(wanted, self.state_dir / "c", (self.cdi, *cdi_dirs), egress)
            capabilities = await driver.probe()
        except FalError as exc:
            if not fall_back:
                raise
            _log.warning("oci_does_not_work", why=str(exc), instead="process, which does not isolate")
            driver = _driver("process", self.state_dir / "c", (), egress)
            capabilities = await driver.probe()
        self.driver.write_text(driver.name)
        return driver, capabilities

    def driver_as_left(self) -> Driver | None:
        """The driver that an agent chose here, not probed: enough to take containers away. None: none ever did."""
        before = self.driver.read_text().strip() if self.driver.exists() else ""
        return _driver(before, self.state_dir / "c", (self.cdi,), EgressSettings()) if before else None


def _driver(name: str, state_dir: Path, cdi: Sequence[Path], egress: EgressSettings) -> Driver:
    if name == "oci":
        from fal_runtime.oci.driver import OciDriver

        return OciDriver(state_dir, cdi=cdi, egress=egress)
    from fal_runtime.process import ProcessDriver

    return ProcessDriver(state_dir)
