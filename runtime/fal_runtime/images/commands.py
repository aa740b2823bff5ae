"""Runs the programs that images are made with: bounded in time, CPU, file size and output, killed as a group.

What a program says is kept short and freed of credentials before anybody sees it. A program dies with us
(`setpriv --pdeathsig`), whatever ended us.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fal_contract.errors import Code, FalError

OUTPUT_BYTES_MAX: Final = 8 << 20
_TAIL_BYTES: Final = 16 << 10
_LINE_BYTES_MAX: Final = 8 << 10
_WATCH_S: Final = 0.25
_KILL_WAIT_S: Final = 20.0
_OPEN_FILES: Final = 4096

_USER_IN_URL: Final = re.compile(r"(://)[^/@\s\"]+@")
_QUERY: Final = re.compile(r"(https?://[^\s?\"]+)\?[^\s\"]+")
_AUTHORIZATION: Final = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended. `code` is negative after a signal. `stderr` is its end, redacted."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def last_line(self) -> str:
        """The last thing it complained about, in one line of at most 512 characters."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][-512:] if lines else f"it ended with {self.code}"


def redact(text: str) -> str:
    """Without user names and passwords in URLs, query strings (signed addresses), bearer tokens, control characters."""
    text = _USER_IN_URL.sub(r"\1…@", text)
    text = _QUERY.sub(r"\1?…", text)
    text = _AUTHORIZATION.sub(r"\1 …", text)
    return _CONTROL.sub("", text)


def require(program: str, package: str) -> str:
    """Path of a program. FAILED_PRECONDITION naming Debian's package."""
    found = shutil.which(program, path=_path())
    if found is None:
        what = f"{program} is not installed on this machine"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy=f"Install the package {package}.")
    return found


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    folder: Path,
    env: Mapping[str, str] | None = None,
    file_bytes_max: int = 0,
    watch: Callable[[], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Ran:
    """Run `argv` in `folder`, with a small environment and `env`.

    `watch` is called in a thread about four times a second, `on_line` with every line of stderr; what they raise ends
    the program. `file_bytes_max` bounds each file that it writes. Raises TIMEOUT, and CORRUPT for endless output.
    """
    limits = [f"--cpu={int(timeout_s) + 1}", "--core=0", f"--nofile={_OPEN_FILES}"]
    if file_bytes_max:
        limits.append(f"--fsize={file_bytes_max}")
    process = await asyncio.create_subprocess_exec(
        require("setpriv", "util-linux"), "--pdeathsig", "KILL", require("prlimit", "util-linux"), *limits, *argv,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=folder, env=_environment(folder, env or {}), start_new_session=True, limit=_LINE_BYTES_MAX,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            async with asyncio.TaskGroup() as group:
                out = group.create_task(_read(process.stdout), name="stdout")
                err = group.create_task(_tail(process.stderr, on_line), name="stderr")
                watcher = group.create_task(_watch(watch), name="watch") if watch is not None else None
                await asyncio.wait({out, err})
                code = await process.wait()
                if watcher is not None:
                    watcher.cancel()
    except TimeoutError:
        name = Path(argv[0]).name
        raise FalError(Code.TIMEOUT, f"{name} took longer than {timeout_s:g} s", remedy="Try again.") from None
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    finally:
        await _end(process)
    return Ran(code, out.result(), redact(err.result()))


# --- inside -----------------------------------------------------------------------------------------------------------


def _path() -> str:
    # mkfs.erofs is in sbin on some systems, which an ordinary user's PATH lacks.
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _environment(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the caller's but what names proxies and trusted authorities; temporary files go to `folder`."""
    kept = {name: value for name, value in os.environ.items() if name.lower() in _KEPT}
    base = {"PATH": _path(), "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder), "LC_ALL": "C"}
    # skopeo keeps a database of blobs in /var/lib when it is root's, which outlives us and is locked by one at a time.
    return {**kept, **base, "_CONTAINERS_ROOTLESS_UID": "1", **env}


_KEPT: Final = frozenset({"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir"})


async def _read(stream: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    size = 0
    while block := await stream.read(64 << 10):
        size += len(block)
        if size > OUTPUT_BYTES_MAX:
            raise FalError(Code.CORRUPT, "a program's answer has no end", remedy="Look at the source.")
        parts.append(block)
    return b"".join(parts)


async def _tail(stream: asyncio.StreamReader, on_line: Callable[[str], None] | None) -> str:
    tail, rest = b"", b""
    while block := await stream.read(_LINE_BYTES_MAX):
        tail = (tail + block)[-_TAIL_BYTES:]
        if on_line is not None:
            *lines, rest = (rest + block).split(b"\n")
            rest = rest[-_LINE_BYTES_MAX:]
            for line in lines:
                on_line(line.decode(errors="replace"))
    return tail.decode(errors="replace")


async def _watch(watch: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(_WATCH_S)
        await asyncio.to_thread(watch)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of its group and take its exit code, also while we are being cancelled."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # First the pipes: asyncio's wait is for their ends, too, and nobody reads any more.
    process._transport.close()  # type: ignore[attr-defined]
    with suppress(TimeoutError):
        async with asyncio.timeout(_KILL_WAIT_S):
            await process.wait()
