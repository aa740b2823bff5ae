"""Starts and ends the processes of a development cluster and remembers them in its folder.

DIR/dev.json        what was started, with pids and start times
DIR/scheduler/      the scheduler's data folder        DIR/etcd/      etcd, with --store etcd
DIR/agents/n1 …     state folders of agents            DIR/logs/      output of everything
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from falctl import processes
from falctl.context import GLOBALS, unary
from falctl.operate import daemon
from falctl.processes import Process
from falctl.profile import Profile, profiles_dir, write_profile

Say = Callable[[str], None]

START_TIMEOUT_S: Final = 60.0
GRACE_S: Final = 10.0
PROFILE: Final = "dev"
# Two clouds and one machine room; nodes go round.
POOLS: Final = (
    {"name": "cloud-a", "cloud": "cloud-a", "region": "east", "zone": "a1", "gpu_hour_price": 3.2},
    {"name": "cloud-b", "cloud": "cloud-b", "region": "west", "zone": "b1", "gpu_hour_price": 2.4},
    {"name": "metal", "cloud": "metal", "region": "home", "zone": "m1", "gpu_hour_price": 1.1},
)


@dataclass(frozen=True, slots=True)
class DevOptions:
    """What `falctl dev up` was asked for."""

    nodes: int
    sim_gpus: str
    store: str
    driver: str
    credentials: str = ""  # file; empty: origins that need none
    warm_workers: int = 0  # of each node


def start_cluster(folder: Path, options: DevOptions, *, say: Say) -> dict[str, Any]:
    """Start everything and wait until all nodes are ready. On failure what was started is ended again."""
    _check(folder, options)
    started: list[Process] = []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        endpoint = _start_etcd(folder, started, say) if options.store == "etcd" else ""
        profile = _start_scheduler(folder, options, endpoint, started, say)
        GLOBALS.profile = str(write_profile(PROFILE, profile))
        _start_agents(folder, options, started, say)
        gateway = _start_gateway(folder, started, say)
        _remember(folder, options, started, gateway)
        _wait_for_nodes(options.nodes, say)
    except BaseException:
        _remember(folder, options, started, "")
        stop_cluster(folder, keep=True, say=lambda _: None)
        raise
    return {
        "dir": str(folder),
        "profile": PROFILE,
        "gateway": gateway,
        **asdict(options),
        "pids": {p.name: p.pid for p in started},
    }


def _check(folder: Path, options: DevOptions) -> None:
    if options.store not in ("sqlite", "etcd"):
        raise invalid("--store", options.store, "is no store", remedy="Use sqlite or etcd.")
    if options.driver not in ("auto", "oci", "process"):
        raise invalid("--driver", options.driver, "is no driver", remedy="Use auto, oci or process.")
    if options.credentials and not Path(options.credentials).is_file():
        raise FalError(
            Code.NOT_FOUND, f"--credentials {options.credentials} is no file", remedy="Name a readable TOML file."
        )
    if options.store == "etcd" and shutil.which("etcd") is None:
        raise FalError(Code.FAILED_PRECONDITION, "etcd is not installed", remedy="Install Debian's etcd-server.")
    if any(process.alive for process in _remembered(folder)):
        raise FalError(
            Code.ALREADY_EXISTS, f"A development cluster runs in {folder}", remedy="End it: falctl dev down."
        )
    if (folder / "scheduler").exists():
        raise FalError(
            Code.ALREADY_EXISTS,
            f"{folder} holds an earlier cluster",
            remedy="Remove it: falctl dev down. Or choose another folder with --dir.",
        )


def free_port() -> int:
    """A TCP port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start_etcd(folder: Path, started: list[Process], say: Say) -> str:
    client, peer = free_port(), free_port()
    url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    argv = ["etcd", "--name", "dev", "--data-dir", str(folder / "etcd"), "--listen-client-urls", url]
    argv += ["--advertise-client-urls", url, "--listen-peer-urls", peer_url]
    argv += ["--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"dev={peer_url}"]
    say(f"etcd at {url}")
    process = processes.start("etcd", argv, log=_log(folder, "etcd"))
    started.append(process)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", client)) == 0:
                return f"127.0.0.1:{client}"
        processes.reap(process)
        if not process.alive:
            raise processes.died("etcd", _log(folder, "etcd"))
        if time.monotonic() > deadline:
            raise FalError(Code.TIMEOUT, "etcd is not up", remedy=f"See {_log(folder, 'etcd')}.")
        time.sleep(0.05)


def _start_scheduler(folder: Path, options: DevOptions, endpoint: str, started: list[Process], say: Say) -> Profile:
    data = folder / "scheduler"
    argv = [daemon("fal-scheduler"), "init", "--data-dir", str(data), "--host", "localhost", "--ip", "127.0.0.1"]
    _run_to_end(argv)
    config = [f'data_dir = "{data}"', f'store = "{options.store}"', 'hosts = ["localhost", "127.0.0.1"]']
    config += [f'credentials_file = "{options.credentials}"'] if options.credentials else []
    config += ["[rpc]", "port = 0", "[join]", "port = 0", "[metrics]", "port = 0"]
    config += ["[etcd]", f'endpoints = ["{endpoint}"]'] if endpoint else []
    argv = [daemon("fal-scheduler"), "run", "--config", _write_config(data / "scheduler.toml", config)]
    log = _log(folder, "scheduler")
    process = processes.start("scheduler", argv, log=log)
    started.append(process)
    processes.wait_for_file(data / "ports.json", process, log=log, timeout_s=START_TIMEOUT_S)
    ports = json.loads((data / "ports.json").read_text())
    say(f"scheduler at 127.0.0.1:{ports['rpc']} ({options.store})")
    return Profile(PROFILE, (f"127.0.0.1:{ports['rpc']}",), data / "operator", "default")


def _start_agents(folder: Path, options: DevOptions, started: list[Process], say: Say) -> None:
    from fal_contract.manifest import PoolManifest
    from fal_contract.v1 import cluster_pb2 as pb

    ports = json.loads((folder / "scheduler" / "ports.json").read_text())
    pools = POOLS[: min(options.nodes, len(POOLS))]
    for pool in pools:
        unary("ApplyPool", pb.ApplyPoolRequest(pool=PoolManifest.model_validate(pool).to_proto()))
    for number in range(1, options.nodes + 1):
        pool = pools[(number - 1) % len(pools)]
        token = unary("CreateToken", pb.CreateTokenRequest(pool=str(pool["name"]), ttl_s=600, uses=1)).token
        name = f"n{number}"
        state = folder / "agents" / name
        state.mkdir(parents=True, mode=0o700)
        token_file = state / "join-token"
        token_file.touch(mode=0o600)
        token_file.write_text(token)
        config = [f'state_dir = "{state}"', f'node_name = "{name}"', f'driver = "{options.driver}"']
        config += [f'schedulers = ["127.0.0.1:{ports["rpc"]}"]', f'join_url = "https://127.0.0.1:{ports["join"]}"']
        config += [f'join_token_file = "{token_file}"', f'sim_gpus = "{options.sim_gpus}"', 'proxy_host = "127.0.0.1"']
        config += [f"warm_workers = {options.warm_workers}"]
        cache = ['bulk_host = "127.0.0.1"', 'addresses = ["default=127.0.0.1"]']
        cache += [f'credentials_file = "{options.credentials}"'] if options.credentials else []
        config += [f'fsd_config = "{_write_config(state / "cache.toml", cache)}"']
        argv = [daemon("fal-agent"), "run", "--config", _write_config(state / "agent.toml", config)]
        started.append(processes.start(f"agent-{name}", argv, log=_log(folder, f"agent-{name}")))
        say(f"agent {name} in pool {pool['name']}")


def _start_gateway(folder: Path, started: list[Process], say: Say) -> str:
    """A gateway on loopback that also takes tunnels; returns its URL."""
    data, home = folder / "scheduler", folder / "gateway"
    home.mkdir(mode=0o700)
    ports = json.loads((data / "ports.json").read_text())
    identity = home / "identity.pem"
    argv = [daemon("fal-scheduler"), "issue", "--data-dir", str(data), "--role", "serving", "--name", "dev-gateway"]
    _run_to_end([*argv, "--out", str(identity)])
    ports_file = home / "ports.json"
    config = [f'schedulers = ["127.0.0.1:{ports["rpc"]}"]', f'identity = "{identity}"', f"port = {free_port()}"]
    config += [f'ports_file = "{ports_file}"', 'tunnel_host = "127.0.0.1"', "tunnel_port = 0"]
    argv = [daemon("fal-gateway"), "run", "--config", _write_config(home / "gateway.toml", config)]
    log = _log(folder, "gateway")
    process = processes.start("gateway", argv, log=log)
    started.append(process)
    processes.wait_for_file(ports_file, process, log=log, timeout_s=START_TIMEOUT_S)
    url = f"http://127.0.0.1:{json.loads(ports_file.read_text())['http']}"
    say(f"gateway at {url}")
    return url


def _run_to_end(argv: list[str]) -> None:
    """Run one of our commands; its error becomes ours."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("error: ")
        raise FalError(Code.INTERNAL, f"{Path(argv[0]).name} {argv[1]} failed: {said}", remedy="See the message.")


def _wait_for_nodes(count: int, say: Say) -> None:
    from fal_contract.v1 import cluster_pb2 as pb

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        views = unary("ListNodes", pb.ListNodesRequest()).nodes
        ready = [view for view in views if view.health == "ready"]
        if len(ready) >= count:
            drivers = sorted({view.capabilities.driver for view in ready})
            say(f"{len(ready)} nodes ready, containers by driver: {', '.join(drivers)}")
            return
        if time.monotonic() > deadline:
            raise FalError(Code.TIMEOUT, f"{len(ready)} of {count} nodes are ready", remedy="See the agents' logs.")
        time.sleep(0.1)


def stop_cluster(folder: Path, *, keep: bool, say: Say) -> list[str]:
    """Delete its apps, end its processes, clean up after its agents. Returns the names of what was ended."""
    remembered = _remembered(folder)
    if not remembered and not folder.exists():
        raise FalError(Code.NOT_FOUND, f"There is no development cluster in {folder}", remedy="Name it with --dir.")
    by_name = {process.name: process for process in remembered}
    ended = []
    # Agents first: from then on nobody starts anything. Their containers outlive them by design, so each is purged.
    for name in sorted(by_name, key=lambda n: (not n.startswith("agent-"), n)):
        if processes.end(by_name[name], grace_s=GRACE_S):
            ended.append(name)
            say(f"ended {name}")
    for state in sorted((folder / "agents").glob("*")) if (folder / "agents").exists() else ():
        _run_to_end([daemon("fal-agent"), "purge", "--state-dir", str(state)])
    profile = profiles_dir(os.environ) / f"{PROFILE}.toml"
    if profile.exists() and str(folder) in profile.read_text():
        profile.unlink()
    if keep:
        (folder / "dev.json").unlink(missing_ok=True)
    else:
        _remove(folder)
    return ended


def _remove(folder: Path) -> None:
    """Remove a tree that holds read-only folders: without root these must be made writable first."""
    for below, _, _ in os.walk(folder):
        os.chmod(below, 0o700)
    shutil.rmtree(folder)


def restart_process(folder: Path, name: str, *, say: Say) -> Process:
    """End one process if it still runs, and start it again as it was started. Its ports stay the same."""
    remembered = _remembered(folder)
    old = next((process for process in remembered if process.name == name), None)
    if old is None:
        known = ", ".join(process.name for process in remembered) or "none"
        raise FalError(Code.NOT_FOUND, f"There is no process {name!r}", remedy=f"Processes of {folder}: {known}.")
    processes.end(old, grace_s=GRACE_S)
    new = processes.start(name, old.argv, log=_log(folder, name))
    data = json.loads((folder / "dev.json").read_text())
    data["processes"] = [asdict(new) if one["name"] == name else one for one in data["processes"]]
    _write_json(folder / "dev.json", data)
    say(f"{name} runs again, pid {new.pid}")
    return new


def cluster_status(folder: Path) -> list[dict[str, Any]]:
    """One row a process."""
    return [
        {"name": p.name, "pid": p.pid, "running": p.alive, "log": str(_log(folder, p.name))}
        for p in _remembered(folder)
    ]


def _write_config(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _remember(folder: Path, options: DevOptions, started: list[Process], gateway: str) -> None:
    _write_json(
        folder / "dev.json", {"options": asdict(options), "gateway": gateway, "processes": [asdict(p) for p in started]}
    )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=2))
    temporary.replace(path)


def _remembered(folder: Path) -> list[Process]:
    try:
        data = json.loads((folder / "dev.json").read_text())
    except FileNotFoundError:
        return []
    return [Process(one["name"], one["pid"], one["start_ticks"], tuple(one["argv"])) for one in data["processes"]]
