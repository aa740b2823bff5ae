"""Processes that serve unfinished artifacts, for tests: `python mount_server.py CONTROL-SOCKET-FD`; see `mount_rig`.

Each takes commands on stdin and answers on stdout, one JSON object a line. Its parts lie in files, so
that a killed one's successor has what it had. It ends at once, loudly, when it touches a path below a mount.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fal_contract.artifact import Artifact, ArtifactFile, listing_id
from fal_contract.pieces import Bitmap
from fal_contract.telemetry import configure_logging
from fal_fsd.mount import FolderPart, InFlightMounts
from fal_fsd.ports import Part, PieceWriter

_WATCHED = ("open", "os.listdir", "os.scandir", "os.rename", "os.truncate", "os.chmod", "os.remove", "os.getxattr")
_BAD_CALL = 70  # exit code


def artifact_of(spec: dict[str, Any]) -> Artifact:
    """The artifact that `spec` (files: [[path, bytes], …], piece_bytes, seed) describes."""
    files = tuple(ArtifactFile(path, size, version=f"v{spec['seed']}") for path, size in sorted(spec["files"]))
    return Artifact(listing_id("file:///x", files), "model", "file:///x", spec["piece_bytes"], files)


def content_of(spec: dict[str, Any], path: str) -> bytes:
    """A file's bytes: random ones, or those of the spec's `folder`."""
    if "folder" in spec:
        return Path(spec["folder"], path).read_bytes()
    size = next(size for name, size in spec["files"] if name == path)
    return random.Random(f"{spec['seed']} {path}").randbytes(size)


class FilePart:
    """`ports.Part` over files below `folder`; `put` takes a piece's right bytes from the spec."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self.artifact = artifact_of(spec)
        self._folder = folder
        self._lock = threading.Lock()
        self._contents = {file.path: content_of(spec, file.path) for file in self.artifact.files}
        self._fds = []
        for index, file in enumerate(self.artifact.files):
            self.file_path(index).parent.mkdir(parents=True, exist_ok=True)
            self._fds.append(os.open(self.file_path(index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
            os.ftruncate(self._fds[-1], file.size_bytes)
        self._bits = folder / "bits"
        size = self.artifact.layout.count
        self._have = Bitmap.of_bytes(size, self._bits.read_bytes()) if self._bits.exists() else Bitmap(size)

    @property
    def have(self) -> Bitmap:
        with self._lock:
            return Bitmap.of_bytes(self._have.size, bytes(self._have))

    def has(self, piece: int) -> bool:
        return piece in self._have

    def writer(self, piece: int, *, source: str, expect: bytes | None = None) -> PieceWriter | None:
        raise NotImplementedError

    def locate(self, piece: int) -> tuple[int, int, int] | None:
        span = self.artifact.layout.span(piece)
        return (self._fds[span.file], span.offset, span.length) if self.has(piece) else None

    def digest_of(self, piece: int) -> bytes | None:
        return None

    def file_path(self, file: int) -> Path:
        return self._folder / "data" / self.artifact.files[file].path

    def put(self, piece: int) -> None:
        span = self.artifact.layout.span(piece)
        data = self._contents[self.artifact.files[span.file].path][span.offset : span.offset + span.length]
        os.pwrite(self._fds[span.file], data, span.offset)
        with self._lock:
            self._have.add(piece)
            beside = self._bits.with_suffix(".new")
            beside.write_bytes(bytes(self._have))
            beside.replace(self._bits)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def forbid_looks_below(folder: Path) -> None:
    """From now on a call that names a mount point or anything below it ends this process."""
    below = re.compile(re.escape(str(folder)) + r"/[0-9a-f]{64}(/|$)")

    def check(what: str, path: object) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if below.match(text):
            os.write(2, f"FORBIDDEN: {what} of {text}\n".encode())
            os._exit(_BAD_CALL)

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            check(name, path)
            return real(path, *more, **named)

        return call

    sys.addaudithook(lambda event, words: check(event, words[0]) if event in _WATCHED and words else None)
    for name in ("stat", "lstat", "access", "readlink", "statvfs"):  # no audit event
        setattr(os, name, watched(name, getattr(os, name)))


async def until(condition: Callable[[], bool]) -> None:
    """Threads and other processes make it true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await asyncio.sleep(0)  # what they said before that is heard now


class Serving:
    """The commands."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.parts = [FilePart(spec, Path(config["data"]) / str(n)) for n, spec in enumerate(config["artifacts"])]
        self.by_id = {part.artifact.id: part for part in self.parts}
        self.finished: dict[str, FolderPart] = {}
        self.wanted: dict[str, dict[int, bool]] = {artifact_id: {} for artifact_id in self.by_id}
        self.mounts = InFlightMounts(
            Path(config["folder"]), on_wanted=self.on_wanted, off=config.get("off", []), **config.get("options", {})
        )

    def on_wanted(self, artifact_id: str, pieces: Any, wanted: bool) -> None:
        self.wanted[artifact_id].update(dict.fromkeys(pieces, wanted))
        if wanted and self.config.get("give"):  # as a node whose peers are fast
            for piece in pieces:
                if piece not in self.config.get("withheld", []):
                    self.put(self.by_id[artifact_id], piece)

    def put(self, part: FilePart, piece: int) -> None:
        part.put(piece)
        self.mounts.arrived(part.artifact.id, piece)

    def part_of(self, artifact_id: str) -> Part | None:
        part = self.by_id.get(artifact_id)
        if part is None or artifact_id not in self.config.get("finished", []):
            return part
        return self.finished.setdefault(artifact_id, FolderPart(part.artifact, part.file_path(0).parent))

    def waiting(self) -> int:
        return sum(len(connection._waiting) for connection in self.mounts._all)

    async def do(self, op: str, words: dict[str, Any]) -> Any:
        part = self.parts[words.get("artifact", 0)]
        mounts, artifact_id = self.mounts, part.artifact.id
        match op:
            case "open":
                return str(await mounts.open(part))
            case "put":
                for piece in words["pieces"]:
                    self.put(part, piece)
            case "fail":
                mounts.fail(artifact_id, words["reason"])
            case "cancel":
                return mounts.cancel_reads(words["pids"])
            case "give":
                self.config["give"] = words["on"]
            case "close":
                await mounts.close(artifact_id)
            case "forget_part":  # as a node that has finished it and moved the files
                part.close()
                for index in range(len(part.artifact.files)):
                    part.file_path(index).unlink()
            case "until_waiting":
                await until(lambda: self.waiting() == words["count"])
            case "until_waiting_for":
                await until(lambda: any(words["piece"] in connection._by_piece for connection in mounts._all))
            case "until_lingering":
                await until(lambda: mounts.lingering == words["count"])
            case "until_held":
                await until(lambda: mounts._lease is not None and mounts.holder_pid != words["not_pid"])
            case "until_unwanted":
                await until(lambda: self.wanted[artifact_id].get(words["piece"]) is False)
            case "look":
                Path(self.config["folder"], artifact_id, "a.bin").exists()
            case "stop":
                await mounts.stop(keep=words["keep"])
            case _:
                raise ValueError(op)
        return None

    def status(self) -> dict[str, Any]:
        return {
            "available": self.mounts.available,
            "modes": self.mounts.modes,
            "holder": self.mounts.holder_pid,
            "artifacts": self.mounts.artifacts,
            "waiting": self.waiting(),
            "lingering": self.mounts.lingering,
            "threads": threading.active_count(),
            "wanted": {one: [x for x, wanted in of_it.items() if wanted] for one, of_it in self.wanted.items()},
        }

    async def run(self) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        taken = await self.mounts.start(self.part_of)
        self.say({"ok": True, "taken": taken, "status": self.status()})
        while line := await reader.readline():
            words = json.loads(line)
            try:
                result = await self.do(words.pop("op"), words)
                self.say({"ok": True, "result": result, "status": self.status()})
            except Exception as exc:
                self.say({"ok": False, "why": str(exc), "status": self.status()})
        await self.mounts.stop(keep=False)

    def say(self, answer: object) -> None:
        print(json.dumps(answer), flush=True)


def main(config: dict[str, Any]) -> None:
    configure_logging("mount-server", level="debug", format="json")
    if "cgroup" in config:
        Path(config["cgroup"], "cgroup.procs").write_text("0")
    forbid_looks_below(Path(config["folder"]))
    asyncio.run(Serving(config).run())


def fork_servers(control: socket.socket) -> None:
    """Imported once, forked for each server: a message is a config, with it come its stdin, stdout and stderr."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        raw, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not raw:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
                os.close(fd)
            try:
                main(json.loads(raw))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        for fd in fds:
            os.close(fd)
        control.send(str(pid).encode())


if __name__ == "__main__":
    fork_servers(socket.socket(fileno=int(sys.argv[1])))
