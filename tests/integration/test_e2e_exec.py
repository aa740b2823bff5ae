"""Into a runner's container as an operator does it: exec, shell on a terminal, top; and what a side's death does."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from e2e_cluster import FALCTL, Cluster, alive, processes, until, worker_pid

pytestmark = [pytest.mark.root, pytest.mark.oci, pytest.mark.slow]
WAIT_S = 60.0


class Terminal:
    """falctl on a terminal of its own, with somebody who types and reads."""

    def __init__(self, real: Cluster, *arguments: str, rows: int = 30, columns: int = 100) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            # Not by preexec_fn: gRPC's threads of this process do not survive a fork that runs Python.
            ["setsid", "--ctty", *FALCTL, *arguments],
            stdin=self._slave, stdout=self._slave, stderr=self._slave, env=real.falctl_env | {"TERM": "xterm"},
        )  # fmt: skip
        self._said = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, text: str) -> str:
        """Everything said up to and with `text`; forgets it."""
        wanted, deadline = text.encode(), time.monotonic() + WAIT_S
        while wanted not in self._said:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self._said!r}"
            self._said += os.read(self._master, 65536)
        at = self._said.index(wanted) + len(wanted)
        said, self._said = self._said[:at], self._said[at:]
        return said.decode(errors="replace")

    def end(self) -> int:
        """Its exit code; what it says meanwhile is read."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self._said
            if select.select([self._master], [], [], 0.05)[0]:
                with suppress(OSError):
                    self._said += os.read(self._master, 65536)
        assert termios.tcgetattr(self._slave) == self.before, "the terminal is as before"
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def terminal(real: Cluster, *arguments: str) -> Iterator[Terminal]:
    made = Terminal(real, *arguments)
    try:
        yield made
    finally:
        made.close()


def running(marker: str) -> list[int]:
    """Processes inside containers (not falctl's own) that have this word in their command."""
    mine = {os.getpid()}
    return [pid for pid, argv in processes() if pid not in mine and argv[:2] == ["sleep", marker] and alive(pid)]


@pytest.mark.parametrize("driver", ["oci", "process"])
def test_commands_in_a_runner(real: Cluster, driver: str) -> None:
    app = f"exec-{driver}"
    [runner] = real.apply(app, driver=driver)
    pid = worker_pid(runner)

    done = real.falctl("runner", "exec", app, "--", "sh", "-c", "echo out; echo wrong >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "wrong\n")
    short = runner.partition("/")[2][:-2]
    done = real.falctl("runner", "exec", short, "--", "/no/such/program")
    assert done.returncode == 1
    assert "no such file" in done.stderr
    data = os.urandom(700_000)
    copied = subprocess.run(
        [*FALCTL, "runner", "exec", runner, "--", "cat"], input=data, capture_output=True, env=real.falctl_env,
        timeout=120, check=False,
    )  # fmt: skip
    assert (copied.returncode, copied.stdout == data) == (0, True), copied.stderr
    killed = real.falctl("runner", "exec", runner, "--", "sh", "-c", "kill -9 $$")
    assert killed.returncode == 137

    top = real.ask("top", "runner", "top", runner)
    assert any("worker" in row["command"] for row in top["processes"])
    assert pid in {row["pid"] for row in top["processes"]}
    shown = real.falctl("runner", "top", runner)
    assert "COMMAND" in shown.stdout

    mine = [event for event in real.ask("events", "events") if event["kind"] == "EXEC" and event["subject"] == runner]
    assert len(mine) == 4
    assert "exit 7" in mine[0]["message"]
    assert mine[0]["actor"].startswith(("admin/", "operator/"))
    assert worker_pid(runner) == pid, "nothing of this touched the worker"


def test_a_shell_on_a_terminal(real: Cluster) -> None:
    [runner] = real.apply("exec-shell")
    with terminal(real, "runner", "shell", runner) as shell:
        shell.type("echo begin-$((1+1))\n")
        shell.until("begin-2")
        shell.type("stty size; echo $TERM\n")
        shell.until("30 100")
        shell.until("xterm")
        shell.resize(11, 222)
        os.kill(shell.process.pid, signal.SIGWINCH)
        shell.type("while ! stty size | grep -q '^11 222$'; do :; done; echo sized-$((2+1))\n")
        shell.until("sized-3")
        shell.type("sleep 86421\n")
        until(lambda: running("86421"), "the command runs")
        shell.type("\x03")
        until(lambda: not running("86421"), "Ctrl-C went to the command")
        assert shell.process.poll() is None
        shell.type("exit 5\n")
        assert shell.end() == 5
    with terminal(real, "runner", "shell", runner) as shell:
        shell.type("echo ready-$((2+2))\n")
        shell.until("ready-4")
        shell.type("\r~.")
        assert shell.end() == 1


def test_a_command_ends_with_its_operator_its_agent_and_its_container(real: Cluster) -> None:
    [runner] = real.apply("exec-ends")
    pid = worker_pid(runner)

    def began(marker: str) -> subprocess.Popen[bytes]:
        argv = [*FALCTL, "runner", "exec", runner, "--", "sleep", marker]
        asking = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=real.falctl_env)
        until(lambda: running(marker), f"sleep {marker} runs")
        return asking

    for number in (signal.SIGKILL, signal.SIGTERM):
        marker = f"8643{int(number)}"
        with began(marker) as asking:
            asking.send_signal(number)
            until(lambda marker=marker: not running(marker), "the command ended with its operator")
    agent = real.nodes["box"].process
    with began("86451") as asking:
        agent.end(signal.SIGKILL)
        until(lambda: not running("86451"), "the command ended with its agent")
        assert asking.wait(WAIT_S) == 1
        assert asking.stderr is not None
        assert b"broke" in asking.stderr.read()
    agent.start()
    until(lambda: real.falctl("runner", "top", runner).returncode == 0, "the agent is back")
    assert worker_pid(runner) == pid, "the container stayed"
    with began("86461") as asking:
        assert real.falctl("runner", "kill", runner).returncode == 0
        code = asking.wait(WAIT_S)
        assert asking.stderr is not None
        said = asking.stderr.read()
    # Its own end by the signal may be told before its node has seen why.
    assert code == 137 or (code == 1 and b"the container ended" in said), (code, said)
