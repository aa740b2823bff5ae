"""Holds one command that runs beside a container's own: starts it, tells its end, ends it when nobody listens any more.

Runs as a script of its own (`python -I -S exec_helper.py CONTROL_FD`, standard library only). It is the command's
parent (a subreaper, as the runtime that starts it does not stay), so the exit code is certain; and the one that kills
the command when its caller is gone, which no signal to a runtime would do. Standard input, output and error are the
command's; with a terminal they are the null device and the terminal's master goes to the caller.

    control ← {"work_dir"}                then request.json there: argv, env, cwd, process, runtime, container,
                                          terminal, bound_to
    control → {"pid"} with the master     or {"error"} and the end
    control ← any message, or its end     the command and its session are killed
    control → {"exit"}                    128 + n after signal n
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
RUNTIME_TIMEOUT_S = 30.0
CONSOLE_TIMEOUT_S = 10.0
KILL_ROUNDS_MAX = 50
KILL_PAUSE_S = 0.02
MESSAGE_BYTES_MAX = 64 << 10


def session_of(pid: int) -> list[int]:
    """All processes of the session that `pid` leads or led."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] not in "ZX":
                found.append(int(name))
    return found


def kill_session(pid: int) -> None:
    """Until nobody of it is left; it may fork meanwhile."""
    for _ in range(KILL_ROUNDS_MAX):
        pids = session_of(pid)
        for one in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        if not pids:
            return
        reap_strangers(pid)
        time.sleep(KILL_PAUSE_S)


def reap_strangers(pid: int) -> None:
    """Descendants that became ours; the command itself is left for its exit code."""
    with contextlib.suppress(ChildProcessError):
        while True:
            done = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if done is None or done.si_pid == pid:
                return
            os.waitpid(done.si_pid, os.WNOHANG)


def start_in_container(request: dict[str, Any], work: Path) -> tuple[int, int]:
    """(pid, the terminal's master or -1) of a command that the runtime started."""
    argv = [*request["runtime"], "--log", "log", "--log-format", "json", "exec", "--detach"]
    argv += ["--pid-file", "pid", "--process", "process.json"]
    listener = None
    if request["terminal"]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("console")
        listener.listen(1)
        listener.settimeout(CONSOLE_TIMEOUT_S)
        argv += ["--console-socket", "console"]
    (work / "process.json").write_text(json.dumps(request["process"]))
    runtime = subprocess.Popen([*argv, request["container"]], start_new_session=True)
    try:
        code = runtime.wait(RUNTIME_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        runtime.kill()
        runtime.wait()
        raise RuntimeError(f"the runtime took more than {RUNTIME_TIMEOUT_S:.0f} s") from None
    if code:
        raise RuntimeError(last_error(work / "log") or f"the runtime ended with {code}")
    pid = int((work / "pid").read_text())
    master = -1
    if listener is not None:
        connection, _ = listener.accept()
        listener.close()
        _data, ancillary, _flags, _address = connection.recvmsg(4096, socket.CMSG_LEN(4))
        master = array.array("i", ancillary[0][2])[0]
        connection.close()
    return pid, master


def last_error(log: Path) -> str:
    """The runtime's last words."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return str(json.loads(log.read_text().strip().splitlines()[-1])["msg"])
    return ""


def start_plain(request: dict[str, Any]) -> tuple[int, int]:
    """The same for a command that is a plain process of this machine."""
    master = slave = -1
    if request["terminal"]:
        master, slave = os.openpty()
    stdio = slave if slave >= 0 else None

    def take_terminal() -> None:
        if slave >= 0:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    try:
        child = subprocess.Popen(
            request["argv"], env=request["env"], cwd=request["cwd"], stdin=stdio, stdout=stdio, stderr=stdio,
            start_new_session=True, preexec_fn=take_terminal,
        )  # fmt: skip
    except OSError as error:
        raise RuntimeError(f"{request['argv'][0]}: {os.strerror(error.errno or 0).lower()}") from None
    finally:
        if slave >= 0:
            os.close(slave)
    pid = child.pid
    child.returncode = 0  # reaped below, not by subprocess
    return pid, master


def start(request: dict[str, Any], work: Path) -> tuple[int, int]:
    pid, master = start_in_container(request, work) if request["runtime"] else start_plain(request)
    if master >= 0:
        rows, columns = request["terminal"]
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return pid, master


def let_go_of_stdio() -> None:
    """The command's input and output end with the command, not with us."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def hold(control: socket.socket, pid: int, bound_to: int) -> int:
    """Until the command has ended, which process `bound_to` (0: none) or the caller's word may bring; its exit code."""
    pidfd = os.pidfd_open(pid)
    enders = [control.fileno()]
    if bound_to:
        try:
            enders.append(os.pidfd_open(bound_to))
        except ProcessLookupError:
            kill_session(pid)
    poll = select.poll()
    for fd in (pidfd, *enders):
        poll.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _event in poll.poll()}
        if ready & set(enders):
            for fd in enders:
                poll.unregister(fd)
            enders = []
            kill_session(pid)
            with contextlib.suppress(OSError):  # what stays unread would reset the connection before our last word
                control.recv(MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
        if pidfd in ready:
            _pid, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    said = control.recv(MESSAGE_BYTES_MAX)
    if not said:
        return 1
    work = Path(json.loads(said)["work_dir"])
    os.chdir(work)  # a socket's path has at most 107 bytes
    try:
        request = json.loads((work / "request.json").read_text())
        pid, master = start(request, work)
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        control.send(json.dumps({"error": str(error)[:8192]}).encode())
        return 1
    let_go_of_stdio()
    with contextlib.suppress(OSError):  # the caller may be gone; then `hold` sees it
        descriptors = [master] if master >= 0 else []
        socket.send_fds(control, [json.dumps({"pid": pid}).encode()], descriptors)
    if master >= 0:
        os.close(master)
    code = hold(control, pid, request["bound_to"])
    with contextlib.suppress(OSError):
        control.send(json.dumps({"exit": code}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
