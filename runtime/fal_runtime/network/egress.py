"""A container's way to the outside: a namespace of its own, a veth pair by CNI, addresses, name servers and rules.

    RUN/net-SCOPE/netns/ID   the namespace      RUN/net-SCOPE/resolv/ID   its resolv.conf
    RUN/net-SCOPE/ipam/      leases (host-local, one file an address)     RUN/net-SCOPE/result/ID  what the plugin said
    RUN/net-SCOPE/sys/ID     sysfs of the namespace
    RUN/egress-forwarded-before   whether the node was a router before any agent came

Invariants: a namespace has a name only when it is made, and is handed out only with its rules in force; whatever a
kill -9 leaves has a name in one of these folders, so `clean` finds it. All until the next boot. Everything blocks, for
tens of milliseconds: call it by asyncio.to_thread. Called by the oci driver; calls for different ids may overlap.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import FalError
from fal_runtime.driver import Egress, driver_failed
from fal_runtime.network import namespaces, policy
from fal_runtime.network.cni import Attachment, Plugins
from fal_runtime.network.namespaces import command
from fal_runtime.network.node_view import IP_FORWARD, NodeView, look
from fal_runtime.network.policy import Jump, Network, Node
from fal_runtime.network.subnets import claim
from fal_runtime.oci import mounts

SUBNET_DEFAULT: Final = "10.222.0.0/16"
PLUGIN_FOLDERS: Final = ("/usr/lib/cni", "/opt/cni/bin")
NETWORK_NAME: Final = "fal-egress"
PROBE_ID: Final = "falctl-probe-net"
# IPv6 is off but on loopback; a server may listen on any port of its own namespace.
SYSCTLS: Final = {"ipv6/conf/default/disable_ipv6": "1", "ipv4/ip_unprivileged_port_start": "0"}
_NAMED: Final = ("netns", "result", "resolv", "sys")  # folders with an entry for each container
_SYS_FLAGS: Final = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
_WAIT: Final = ("-w", "10")  # seconds for others who change rules


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may choose."""

    subnet: str = SUBNET_DEFAULT
    plugin_folders: tuple[str, ...] = PLUGIN_FOLDERS


@dataclass(frozen=True, slots=True)
class NetworkSetup:
    """A container's network, ready to be joined."""

    netns: Path
    resolv_conf: Path
    sysfs: Path  # as seen from this network; the container's user namespace may not mount one
    address: str


class EgressNetwork:
    """The egress network of one agent. See the module's docstring."""

    def __init__(self, run_dir: Path, scope: str, settings: Settings = Settings()) -> None:
        self._folder = run_dir / f"net-{scope}"
        self._claims = run_dir / "egress-subnets.json"
        self._forwarded_before = run_dir / "egress-forwarded-before"
        self._scope = scope
        self._settings = settings
        self._whole = Network(settings.subnet)
        self._rules = ""  # those on the node, as written last
        self._changing = threading.Lock()

    def netns(self, id: str) -> Path:
        return self._folder / "netns" / id

    def probe(self) -> str:
        """Empty when a container could be given egress here, else why not; found by making one and taking it away."""
        try:
            self.open(PROBE_ID, Egress(deny=("203.0.113.0/24",)))
            self.check(PROBE_ID)
        except (FalError, OSError) as error:
            return str(error)
        finally:
            with contextlib.suppress(FalError, OSError):
                self.close(PROBE_ID)
                if not any((self._folder / "netns").iterdir()):
                    self._forget()
        return ""

    def open(self, id: str, egress: Egress) -> NetworkSetup:
        """Make the network of container `id` anew. DRIVER_FAILED; what was made stays until `close` or `clean`."""
        self.close(id)
        with self._alone():
            for name in (*_NAMED, "ipam"):
                (self._folder / name).mkdir(parents=True, exist_ok=True, mode=0o711)
            if not self._forwarded_before.exists():
                self._forwarded_before.write_text(IP_FORWARD.read_text())  # the plugin will switch it on
        view = look(self._whole)
        if view.clash:
            raise driver_failed(
                f"addresses of containers ({self._whole}) clash with the node's route to {view.clash}",
                remedy="Give the agent a free range with --egress-subnet.",
            )
        node = self._node(view)
        self._ensure_node_rules(node)
        namespaces.create(self.netns(id), SYSCTLS)
        result = self._plugins(node.ours, view.mtu).add(Attachment(id, self.netns(id)))
        (self._folder / "result" / id).write_text(json.dumps(result))
        address, interface = _result(result)
        self._no_spoofing(interface)
        rules = policy.container_rules(address, egress, node)
        namespaces.inside(self.netns(id), lambda: command(("iptables-restore", *_WAIT), given=rules))
        resolv_conf = self._folder / "resolv" / id
        resolv_conf.write_text(policy.resolv_conf_inside(view.resolvers, view.resolv_conf))
        resolv_conf.chmod(0o644)
        sysfs = self._folder / "sys" / id
        sysfs.mkdir(exist_ok=True, mode=0o700)
        namespaces.inside(self.netns(id), lambda: mounts.mount("falctl-sys", sysfs, "sysfs", _SYS_FLAGS))
        return NetworkSetup(self.netns(id), resolv_conf, sysfs, address)

    def check(self, id: str) -> None:
        """Raise DRIVER_FAILED unless the network of `id` is as `open` left it."""
        plugins = self._plugins(self._whole, 0)
        plugins.check(Attachment(id, self.netns(id)), self._said(id))

    def close(self, id: str) -> bool:
        """Take the network of `id` away, in whatever state it is; False when there was none."""
        netns, resolv_conf = self.netns(id), self._folder / "resolv" / id
        if not any((self._folder / name / id).exists() for name in _NAMED):
            return False
        if namespaces.exists(netns):
            with contextlib.suppress(FalError):  # the veth ends with its namespace; the lease is looked for below
                self._plugins(self._whole, 0).delete(Attachment(id, netns), self._said(id))
        namespaces.delete(netns)
        self._release(lambda holder: holder != id)
        mounts.unmount_all(self._folder / "sys" / id)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "sys" / id).rmdir()
        (self._folder / "result" / id).unlink(missing_ok=True)
        resolv_conf.unlink(missing_ok=True)
        return True

    def clean(self, keep: frozenset[str]) -> list[str]:
        """Take away every network but those of `keep`, with the last one the node's rules; what it was, in words."""
        if not self._folder.exists():
            return []
        found = {path.name for name in _NAMED for path in _entries(self._folder / name)}
        words = [f"network of {id}" for id in sorted(found - keep) if self.close(id) and id != PROBE_ID]
        words += [f"address {address}" for address in self._release(lambda holder: holder in keep)]
        if not found & keep:
            self._forget()
        return words

    # ---- inside

    def _node(self, view: NodeView) -> Node:
        ours = claim(self._claims, self._folder, self._whole)
        forwarded_before = self._forwarded_before.read_text().strip() == "1"
        return Node(self._whole, ours, view.addresses, view.resolvers, forwarded_before)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Agents of one machine begin and end one after the other: the first and the last change what they share."""
        self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        with (self._folder.parent / "egress.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _plugins(self, ours: Network, mtu: int) -> Plugins:
        ipam = {
            "type": "host-local",
            "dataDir": str(self._folder / "ipam"),
            "ranges": [[{"subnet": str(ours)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        ptp: dict[str, Any] = {"type": "ptp", "ipMasq": False, "mtu": mtu, "ipam": ipam}
        return Plugins(NETWORK_NAME, (ptp,), [Path(folder) for folder in self._settings.plugin_folders])

    def _no_spoofing(self, interface: str) -> None:
        """The node takes from this interface only what its one address sends. (A rule inside says the same.)"""
        (Path("/proc/sys/net/ipv4/conf") / interface / "rp_filter").write_text("1")

    def _ensure_node_rules(self, node: Node) -> None:
        """Ours are in force, first in their chains, even after somebody flushed them."""
        rules = policy.node_rules(self._scope, node)
        with self._changing:
            missing = [jump for jump in policy.jumps(self._scope) if not _jumps(jump)]
            if missing or rules != self._rules:
                command(("iptables-restore", "--noflush", *_WAIT), given=rules)
                for jump in missing:
                    command((*_iptables(jump), "-A" if jump.last else "-I", jump.builtin, "-j", jump.chain))
                self._rules = rules

    def _drop_node_rules(self) -> None:
        with self._changing:
            self._rules = ""
            for jump in policy.jumps(self._scope):
                for step in (("-D", jump.builtin, "-j", jump.chain), ("-F", jump.chain), ("-X", jump.chain)):
                    with contextlib.suppress(FalError):  # not there
                        command((*_iptables(jump), *step))

    def _forget(self) -> None:
        """Nobody uses the network any more: rules, claim and folder go. Forwarding is as it was before."""
        with self._alone():
            self._drop_node_rules()
            shutil.rmtree(self._folder, ignore_errors=True)
            if any(self._folder.parent.glob("net-*")) or not self._forwarded_before.exists():
                return  # another agent of this machine has such containers
            forwarded = self._forwarded_before.read_text().strip() == "1"
            # Whoever has rules for it, such as another container engine, began to rely on it since.
            if not forwarded and len(command(("iptables", *_WAIT, "-S", "FORWARD")).splitlines()) == 1:
                IP_FORWARD.write_text("0")
            self._forwarded_before.unlink()

    def _said(self, id: str) -> dict[str, Any]:
        """What the plugin answered to ADD; empty when it was killed before."""
        try:
            said = json.loads((self._folder / "result" / id).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _release(self, kept: Callable[[str], bool]) -> list[str]:
        """Give back the leases whose holder is not `kept`; returns the addresses."""
        released = []
        for lease in _entries(self._folder / "ipam" / NETWORK_NAME):
            try:
                ipaddress.IPv4Address(lease.name)
                holder = lease.read_text().splitlines()[0]
            except (ValueError, IndexError, OSError):
                continue  # the plugin's own notes
            if not kept(holder):
                lease.unlink(missing_ok=True)
                released.append(lease.name)
        return released


def _result(result: dict[str, Any]) -> tuple[str, str]:
    """The container's address and the node's end of its veth pair, from a CNI result."""
    try:
        address = str(ipaddress.IPv4Interface(result["ips"][0]["address"]).ip)
        interface = next(str(one["name"]) for one in result["interfaces"] if not one.get("sandbox"))
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise driver_failed(f"CNI answered without an address: {result}", remedy="Look at its plugins.") from error
    return address, interface


def _jumps(jump: Jump) -> bool:
    try:
        command((*_iptables(jump), "-C", jump.builtin, "-j", jump.chain))
    except FalError:
        return False
    return True


def _iptables(jump: Jump) -> Sequence[str]:
    return ("iptables", *_WAIT, "-t", jump.table)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def settings_of(subnet: str, plugin_dir: str) -> Settings:
    """Settings as an operator writes them. ValueError for what is no IPv4 network of at least 16 addresses."""
    network = Network(subnet)
    if network.prefixlen > 28:
        raise ValueError(f"{subnet} has fewer than 16 addresses")
    return Settings(str(network), tuple(filter(None, plugin_dir.split(os.pathsep))))
