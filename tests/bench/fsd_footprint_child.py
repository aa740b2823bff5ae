"""Processes of `bench_fsd_footprint`, each writes one JSON object to FILE when it ends.

    fsd FILE ARGUMENT…      the real `fal-fsd` with these arguments, its loop watched; ends on SIGTERM
    control FILE            a loop that does nothing but be watched; ends on SIGTERM
                            (both are watched from SIGUSR1 on)
    origin SIZE CERT KEY    an https server of one file; prints its URL; ends when its standard input does,
                            with the number of bytes that it sent

A loop is watched by a timer every STEP_S. How late it runs is the stall that a caller feels; of it, `wanted to run but
got no processor` (schedstat) is the machine's, `ran` is the loop's own work, and the rest is waiting: for the
interpreter's lock, for pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

STEP_S = 0.005
NICE = -15
BLOCK_BYTES = (32 << 20) + 4099  # no multiple of a piece: pieces differ


class Watch:
    """Of the running loop; `figures` when it is over."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float, float]] = []  # late, got no processor, ran: seconds
        self._file = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115

    async def run(self) -> None:
        """From SIGUSR1 until cancelled."""
        loop, begin = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, begin.set)
        await begin.wait()
        while True:
            due_s = loop.time() + STEP_S
            ran_s, starved_s = self._schedstat()
            await asyncio.sleep(STEP_S)
            late_s = loop.time() - due_s
            ran, starved = self._schedstat()
            self._late.append((late_s, starved - starved_s, ran - ran_s))

    def _schedstat(self) -> tuple[float, float]:
        self._file.seek(0)
        ran_ns, starved_ns, _ = self._file.read().split()
        return int(ran_ns) / 1e9, int(starved_ns) / 1e9

    def figures(self) -> dict[str, Any]:
        """Milliseconds, MiB, seconds."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines() if ":" in x)
        late = sorted(x[0] for x in self._late)
        own = sorted(max(x[0] - x[1], 0.0) for x in self._late)
        ran = sorted(x[2] for x in self._late)

        def at(values: list[float], share: float) -> float:
            return round(1000 * values[min(int(share * len(values)), len(values) - 1)], 1)

        worst = sorted(self._late, reverse=True)[:5]
        return {
            "peak_mib": round(int(status["VmHWM"].split()[0]) / 1024),
            "anon_mib": round(int(status["RssAnon"].split()[0]) / 1024),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "late_max_ms": at(late, 1.0),
            "late_p99_ms": at(late, 0.99),
            "own_max_ms": at(own, 1.0),  # without what it wanted a processor for and got none
            "own_p999_ms": at(own, 0.999),
            "own_p99_ms": at(own, 0.99),
            "ran_max_ms": at(ran, 1.0),
            "over_50": sum(1 for x in late if x > 0.05),
            "own_over_50": sum(1 for x in own if x > 0.05),
            "timers": len(late),
            "worst_late_starved_ran_ms": [[round(1000 * x, 1) for x in one] for one in worst],
        }


def fsd(file: Path, arguments: list[str]) -> int:
    """fal-fsd as it is, and a watch in its loop."""
    from fal_fsd import main

    serve = main.serve

    async def watched(options: Any) -> None:
        watch = Watch()
        task = asyncio.create_task(watch.run())
        try:
            await serve(options)
        finally:
            task.cancel()
            file.write_text(json.dumps(watch.figures()))

    main.serve = watched
    return main.main(arguments)


async def control(file: Path) -> None:
    """Nothing but the watch."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    watch = Watch()
    task = asyncio.create_task(watch.run())
    await stop.wait()
    task.cancel()
    file.write_text(json.dumps(watch.figures()))


class Repeated:
    """`size` bytes, one random block over and over: nothing is kept but the block."""

    def __init__(self, size: int) -> None:
        import random

        self._size = size
        self._block = random.Random(4).randbytes(BLOCK_BYTES)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> bytes:
        first, stop, _ = wanted.indices(self._size)
        out = bytearray()
        while first < stop:
            at = first % BLOCK_BYTES
            part = self._block[at : at + stop - first]
            out += part
            first += len(part)
        return bytes(out)


def origin(size: int, certificate: Path, key: Path) -> None:
    """Serve FILE until nobody listens."""
    from origin_servers import HttpOrigin

    class Seeded(HttpOrigin):
        def tag_of(self, path: str, data: Any) -> str:
            return f'"{path}-{len(data)}"'

    with Seeded({"weights.safetensors": Repeated(size)}, tls=(certificate, key)) as server:  # type: ignore[dict-item]
        print(server.url, flush=True)
        sys.stdin.read()
        print(server.bytes_sent, flush=True)


def go_first() -> None:
    """What else this machine does should count less; where this is not allowed, the idle loop tells how much."""
    with contextlib.suppress(PermissionError):
        os.nice(NICE)


if __name__ == "__main__":
    go_first()
    match sys.argv[1:]:
        case ["fsd", file, *rest]:
            sys.exit(fsd(Path(file), rest))
        case ["control", file]:
            asyncio.run(control(Path(file)))
        case ["origin", size, certificate, key]:
            origin(int(size), Path(certificate), Path(key))
