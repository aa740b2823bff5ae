"""A gateway's end of tunnels as a process, for tests that put it into a network namespace.

    python nat_gateway.py IDENTITY HOST PORT

Reads lines `ask NODE RUNNER ACTION BYTES` and prints one JSON object an answer; `{"ready": true}` first.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from fal_contract.clock import SystemClock
from fal_contract.datapath import TlsIdentity, TunnelListener
from fal_contract.identity import Identity


async def ask(listener: TunnelListener, node: str, runner: str, action: str, size: int) -> None:
    connection = await listener.acquire(node, 20.0)
    headers = [("host", "t"), ("fal-ticket", "term=1;lease=l")]
    answer = await connection.request("POST", f"/v1/runners/{runner}{action}", headers, bytes(size))
    body = await answer.read(1 << 24)
    print(json.dumps({"action": action, "status": answer.status, "bytes": len(body)}), flush=True)


async def main() -> None:
    listener = TunnelListener(TlsIdentity(Identity.load(Path(sys.argv[1])), SystemClock()))
    await listener.start(sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"ready": True}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as tasks:
        while line := (await reader.readline()).decode():
            _, node, runner, action, size = line.split()
            tasks.create_task(ask(listener, node, runner, action, int(size)))
    await listener.close()


asyncio.run(main())
