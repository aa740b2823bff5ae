"""How a new proxy takes over from an old one without refusing or losing a request.

    successor                                   predecessor
    hello (role "successor")              →
                                          ←     welcome
    takeover {fds: path}                  →     stops accepting (connections wait in the kernel)
                                          ←     the listening socket, by SCM_RIGHTS over a socket at `path`
                                          ←     ok {runners with what is in flight, terms, gateways, instance}
    takes the control socket's name,
    accepts; serving                      →     closes its copy of the listener, ends its controllers
                                          ←     finished {runner, outcome}, for each request it had
                                          ←     (end of stream: it exited; what it still had is lost)

Requests that arrive at the predecessor on connections from before are answered DRAINING with `fal-retry: reconnect`;
they did not run. A successor that dies before `serving` changes nothing: the predecessor goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fal_agent.proxy.messages import (
    CONTROL_VERSION,
    GatewayEntry,
    ProxyInfo,
    encode,
    error_from_wire,
    gateway_from_wire,
    gateway_to_wire,
    info_from_wire,
    read_frame,
    revoked_from_wire,
    revoked_to_wire,
    runner_from_wire,
    runner_to_wire,
    take,
)
from fal_agent.proxy.slots import HandedRunner, Outcome
from fal_contract.errors import Code, FalError
from fal_contract.revocation import RevokedPeer

STEP_TIMEOUT_S: Final = 5.0
_MARK: Final = b"fal-proxy"


@dataclass(frozen=True, slots=True)
class Handed:
    """Everything but the socket."""

    instance: str
    runners: tuple[HandedRunner, ...]
    terms: tuple[int, int]
    gateways: tuple[GatewayEntry, ...]
    revoked: tuple[RevokedPeer, ...] = ()


def handed_to_wire(handed: Handed) -> dict[str, object]:
    """As the answer to `takeover`."""
    return {
        "instance": handed.instance,
        "terms": list(handed.terms),
        "gateways": [gateway_to_wire(gateway) for gateway in handed.gateways],
        "revoked": [revoked_to_wire(peer) for peer in handed.revoked],
        "runners": [
            {
                **runner_to_wire(runner.entry),
                "in_flight": runner.in_flight,
                "served": runner.served,
                "failed": runner.failed,
                "cancelled": runner.cancelled,
                "age_s": runner.last_used_age_s,
                "busy_s": runner.busy_s,
            }
            for runner in handed.runners
        ],
    }


def handed_from_wire(raw: Mapping[str, Any]) -> Handed:
    newest, before = take(raw, "terms", list)
    return Handed(
        instance=take(raw, "instance", str),
        terms=(int(newest), int(before)),
        gateways=tuple(gateway_from_wire(gateway) for gateway in take(raw, "gateways", list)),
        revoked=tuple(revoked_from_wire(peer) for peer in take(raw, "revoked", list, default=[])),
        runners=tuple(
            HandedRunner(
                runner_from_wire(runner),
                take(runner, "in_flight", int),
                take(runner, "served", int),
                take(runner, "failed", int),
                take(runner, "cancelled", int),
                float(take(runner, "age_s", (int, float))),
                float(take(runner, "busy_s", (int, float), default=0.0)),
            )
            for runner in take(raw, "runners", list)
        ),
    )


async def send_listener(path: str, listening: socket.socket) -> None:
    """Predecessor: pass the listening socket. Raises OSError or TimeoutError."""

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(STEP_TIMEOUT_S)
            sock.connect(path)
            socket.send_fds(sock, [_MARK], [listening.fileno()])

    await asyncio.get_running_loop().run_in_executor(None, send)


class Predecessor:
    """The successor's view of the old proxy, once everything was handed over."""

    def __init__(
        self,
        info: ProxyInfo,
        handed: Handed,
        listening: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Use `take_over`."""
        self.info = info
        self.handed = handed
        self.listening = listening
        self._reader = reader
        self._writer = writer

    async def confirm(self) -> None:
        """We are serving; the old one may let go."""
        self._writer.write(encode({"t": "serving", "id": 0}))
        await self._writer.drain()

    async def next_finished(self) -> tuple[str, Outcome] | None:
        """The next request that ended over there; None: it exited."""
        try:
            while True:
                message = await read_frame(self._reader)
                if message["t"] == "finished":
                    return take(message, "runner", str), Outcome(take(message, "outcome", str))
        except (OSError, asyncio.IncompleteReadError, FalError, ValueError):
            return None

    def disconnect(self) -> None:
        """It has nothing more to tell."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Give up; before `confirm`, the old proxy goes on."""
        self._writer.close()
        self.listening.close()


async def take_over(control: Path, scratch_dir: Path) -> Predecessor:
    """Get listener and table from the proxy at `control`. FalError when there is none or it does not follow."""
    fd_path = scratch_dir / f".takeover.{os.getpid()}"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(2 * STEP_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(control))
            writer.write(encode({"t": "hello", "min": CONTROL_VERSION, "max": CONTROL_VERSION, "role": "successor"}))
            info = info_from_wire(_checked(await read_frame(reader)))
            listening = await _receive_listener(fd_path, writer)
            try:
                handed = handed_from_wire(_checked(await read_frame(reader)))
            except BaseException:
                listening.close()
                raise
    except BaseException as exc:
        if writer is not None:
            writer.close()
        if isinstance(exc, OSError | asyncio.IncompleteReadError | TimeoutError):
            raise FalError(
                Code.UNAVAILABLE,
                f"the proxy at {control} did not hand over: {exc or type(exc).__name__}",
                remedy="Start without --takeover when no proxy runs.",
            ) from None
        raise
    finally:
        fd_path.unlink(missing_ok=True)
    return Predecessor(info, handed, listening, reader, writer)


async def _receive_listener(fd_path: Path, writer: asyncio.StreamWriter) -> socket.socket:
    fd_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
        waiting.settimeout(STEP_TIMEOUT_S)
        waiting.bind(str(fd_path))
        fd_path.chmod(0o600)
        waiting.listen(1)
        writer.write(encode({"t": "takeover", "id": 1, "fds": str(fd_path)}))

        def receive() -> socket.socket:
            connection, _ = waiting.accept()
            with connection:
                connection.settimeout(STEP_TIMEOUT_S)
                mark, fds, _flags, _address = socket.recv_fds(connection, len(_MARK), 1)
            if mark != _MARK or len(fds) != 1:
                for fd in fds:
                    os.close(fd)
                raise OSError("it passed no listener")
            return socket.socket(fileno=fds[0])

        listening = await asyncio.get_running_loop().run_in_executor(None, receive)
    listening.setblocking(False)
    return listening


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if message["t"] == "error":
        raise error_from_wire(message)
    return message


class Successor:
    """The predecessor's view of the new proxy."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def finished(self, runner_id: str, outcome: Outcome) -> None:
        """One of our last requests ended; lost when the successor is."""
        with contextlib.suppress(OSError):
            self._writer.write(encode({"t": "finished", "id": 0, "runner": runner_id, "outcome": outcome.value}))
