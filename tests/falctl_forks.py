"""Runs falctl many times at the price of one start: imported once, forked for each command line.

Each line on stdin is a JSON list of arguments; each line on stdout a JSON object with code, stdout, stderr. Nothing of
gRPC runs before a fork, so a child is as good as a fresh process. `Forks` is the test's side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CASE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Forks:
    """One server process; `close` ends it."""

    def __init__(self, env: Mapping[str, str], cwd: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=cwd, text=True
        )

    def __call__(self, *arguments: str) -> Done:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps(arguments) + "\n")
        self._popen.stdin.flush()
        return Done(**json.loads(self._popen.stdout.readline()))

    def close(self) -> None:
        self._popen.communicate(timeout=CASE_TIMEOUT_S)


def _serve() -> None:
    import grpc.aio  # noqa: F401  (what a child would import anyway)

    import falctl.main  # noqa: F401
    from fal_contract.v1 import cluster_pb2_grpc  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line), out.fileno(), err.fileno())
            _, status = os.waitpid(pid, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        answer = {"code": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}
        print(json.dumps(answer), flush=True)


def _child(arguments: list[str], out: int, err: int) -> None:
    from falctl.main import main

    signal.alarm(CASE_TIMEOUT_S)
    with open(os.devnull, "rb") as nothing:
        for source, target in ((nothing.fileno(), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
    sys.argv = ["falctl", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
