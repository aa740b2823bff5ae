"""Images of the operator's own machine: packed here, then pushed into the cluster like a model's folder.

A local source never leaves this machine as it is: `python -m fal_runtime.images pack` makes one file system image of
it (a process of its own: falctl imports no runtime), and two nodes take that.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fal_contract.errors import Code, FalError
from fal_contract.limits import IMAGE_BYTES_MAX_DEFAULT, IMAGE_PACK_TIMEOUT_S

if TYPE_CHECKING:
    from fal_contract.v1 import cluster_pb2

LOCAL_SOURCES: Final = ("oci:", "docker-archive:", "rootfs:")
_STOP_S: Final = 60.0
_ERROR_CHARS_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class PushOptions:
    """`work`: folder for what is made on the way (default: the machine's temporary folder); it needs room for the
    unpacked files and the packed image. `pool`: only its nodes take it. `order`: paths in order of first use."""

    platform: str = "linux/amd64"
    pool: str = ""
    format: str = "auto"
    bytes_max: int = IMAGE_BYTES_MAX_DEFAULT
    bandwidth_bytes_s: int = 0
    work: Path | None = None
    order: Path | None = None
    timeout_s: float = IMAGE_PACK_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class PushedImage:
    """`facts` as the packer printed them; `bytes_sent` by this machine."""

    view: cluster_pb2.ModelView
    facts: dict[str, Any]
    bytes_sent: int


def is_local(source: str) -> bool:
    """Whether `source` is packed on this machine."""
    return source.startswith(LOCAL_SOURCES)


def push_image(
    profile: Any, id_: str, source: str, options: PushOptions, *, say: Callable[[str], None] = lambda text: None
) -> PushedImage:
    """Pack `source` and push it as image `id_` (`team/name`) with the identity of `profile`. `say` is told each step.

    Raises what the packer said as FAILED_PRECONDITION, and what a push raises.
    """
    with tempfile.TemporaryDirectory(prefix="falctl-image-", dir=options.work) as folder:
        output = Path(folder) / "image"
        facts = pack_here(source, output, options, say=say)
        return _push(profile, id_, output, facts, options, say)


def pack_here(
    source: str, output: Path, options: PushOptions, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run the packer; the facts of its last line. FAILED_PRECONDITION with its error."""
    argv = [
        sys.executable, "-m", "fal_runtime.images", "pack", source, "--output", str(output),
        "--work", str(output.with_name("work")), "--platform", options.platform, "--format", options.format,
        "--bytes-max", str(options.bytes_max), "--timeout-s", str(options.timeout_s),
    ]  # fmt: skip
    if options.order is not None:
        argv += ["--order", str(options.order)]
    last = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True) as packer,
    ):
        assert packer.stdout is not None
        try:
            for line in packer.stdout:  # it bounds its own time
                if last:
                    say(last)
                last = line.strip()
            code = packer.wait(timeout=_STOP_S)
        finally:
            _end(packer)
        errors.seek(0)
        said = errors.read(_ERROR_CHARS_MAX)
    if code:
        raise _failed(said, code)
    try:
        facts = json.loads(last)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise FalError(Code.INTERNAL, "the packer told no facts", remedy="Use one release of everything.")
    return facts


# --- inside -----------------------------------------------------------------------------------------------------------


def _end(packer: subprocess.Popen[str]) -> None:
    """SIGTERM lets it clean up; then SIGKILL."""
    if packer.poll() is None:
        packer.send_signal(signal.SIGTERM)
        try:
            packer.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            packer.kill()


def _failed(said: str, code: int) -> FalError:
    """Its `error: WHAT. REMEDY` as an error of ours."""
    lines = [line for line in said.splitlines() if line.strip()]
    text = lines[-1].removeprefix("error: ").strip() if lines else f"the packer ended with {code}"
    what, dot, remedy = text.rpartition(". ")
    return FalError(Code.FAILED_PRECONDITION, what if dot else text, remedy=remedy if dot else "", field="source")


def _push(
    profile: Any, id_: str, folder: Path, facts: dict[str, Any], options: PushOptions, say: Callable[[str], None]
) -> PushedImage:
    from random import SystemRandom

    from fal_contract.clock import SystemClock
    from fal_contract.identity import Identity
    from fal_contract.v1 import state_pb2
    from fal_fsd.push import PushSettings
    from fal_fsd.push import push as upload
    from falctl.context import call
    from falctl.weights_push import SchedulerApi, progress_line

    image = state_pb2.ImageFacts(
        source=facts["source"], digest=facts["digest"], format=facts["format"], platform=facts["platform"],
        layer_bytes=facts["layer_bytes"],
    )  # fmt: skip
    settings = PushSettings(
        id_, kind="image", pool=options.pool, bandwidth_bytes_s=options.bandwidth_bytes_s, image=image
    )
    identity = Identity.load(profile.identity)

    async def work(stub: Any) -> Any:
        return await upload(
            folder, settings, SchedulerApi(stub), identity, clock=SystemClock(), rng=SystemRandom(),
            on_progress=lambda progress: say(progress_line(progress)),
        )  # fmt: skip

    done = call(work)
    return PushedImage(done.view, facts, done.bytes_sent)
