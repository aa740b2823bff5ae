"""A world for swarms in virtual time: links, an origin, the scheduler's word, faults; the real Swarm and SwarmView.

Links: every node has an uplink and a downlink of its own rate. An uplink serves those who wait for it in turn, a chunk
each (fair queueing); a receiver whose downlink has more than `BUFFER_S` before it is passed over until it drained. The
origin is served like an uplink, a turn for each read. Latency is one number within a region, another between regions.

The checker looks at every action: what is asked is held by a connected peer, missing, and asked nowhere else; what is
withdrawn was asked. Bytes are counted as they leave, so that what is thrown away counts, too.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any

from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import (
    ORIGIN,
    Ask,
    DropPeer,
    Lease,
    Member,
    Place,
    ReadOrigin,
    StopOrigin,
    Tell,
    Withdraw,
)
from fal_fsd.core.swarm import Policy, Swarm
from fal_scheduler.core.neighbours import SwarmMember, SwarmView

BUFFER_S = 0.02
MEMBERSHIP_S = 0.2


@dataclass(slots=True)
class Flow:
    """A request or a read, being sent. `pieces` left to send, in order; bytes of the first that are sent."""

    to: Node
    urgent: bool = False
    lease: Lease | None = None
    pieces: deque[int] = field(default_factory=deque)
    sent: int = 0
    last: int = -1  # of a read
    stopped: bool = False


class Uplink:
    """Serves flows in turn, a chunk each; `owner` None: the origin."""

    def __init__(self, world: World, owner: Node | None, rate: float) -> None:
        self.world = world
        self.owner = owner
        self.rate = rate
        self.turns: deque[Flow] = deque()
        self.busy = False
        self.bytes = 0

    def add(self, flow: Flow) -> None:
        (self.turns.appendleft if flow.urgent else self.turns.append)(flow)
        if not self.busy:
            self.next()

    def next(self) -> None:
        world, now_s = self.world, self.world.now_s
        wake_s = float("inf")
        for _ in range(len(self.turns)):
            flow = self.turns[0]
            if flow.stopped or not flow.pieces:
                self.turns.popleft()
                continue
            if flow.to.down_free_s - now_s <= BUFFER_S:
                self._send(flow)
                return
            wake_s = min(wake_s, flow.to.down_free_s - BUFFER_S)
            self.turns.rotate(-1)
        self.busy = bool(self.turns)
        if self.busy:
            world.at(max(wake_s, now_s + 1e-6), self.next)

    def _send(self, flow: Flow) -> None:
        world, now_s, to = self.world, self.world.now_s, flow.to
        piece = flow.pieces[0]
        length = world.lengths[piece]
        size = min(world.chunk, length - flow.sent)
        flow.sent += size
        self.bytes += size
        if to.alive:
            world.count(self.owner, to, size)
        sent_s = now_s + size / self.rate
        to.down_free_s = max(to.down_free_s, now_s) + size / to.down
        here_s = max(sent_s, to.down_free_s)
        if flow.sent >= length:
            flow.pieces.popleft()
            flow.sent = 0
            delay_s = world.latency(self.owner, to)
            world.at(here_s + delay_s, world.piece_here, self.owner, to, piece, flow)
        self.turns.rotate(-1)
        self.busy = True
        world.at(sent_s, self.next)


class Node:
    """One node: its swarm, its links, what it holds."""

    def __init__(self, world: World, place: Place, up: float, down: float) -> None:
        self.world = world
        self.place = place
        self.id = place.node_id
        self.up = Uplink(world, self, up)
        self.down = down
        self.down_free_s = 0.0
        self.nat = False
        self.bad = False
        self.alive = True
        self.island = 0
        self.have: set[int] = set()
        self.peers: dict[str, Node] = {}
        self.flows: dict[str, Flow] = {}  # what is asked of this node, by who asked
        self.asked: dict[int, str] = {}  # what this node asks, of whom
        self.reads: dict[Lease, Flow] = {}
        self.news: list[int] = []  # pieces that peers are not told of yet
        self.deciding = False
        self.timer_s = float("inf")
        self.done_s: float | None = None
        self.swarm = self._new_swarm()

    def _new_swarm(self) -> Swarm:
        count = len(self.world.lengths)
        return Swarm(self.place, self.world.lengths, Bitmap(count, self.have), policy=self.world.policy)

    def restart(self) -> None:
        """It lost its memory, not its disk."""
        self.alive = True
        self.asked, self.reads, self.flows, self.peers = {}, {}, {}, {}
        self.timer_s = float("inf")
        self.swarm = self._new_swarm()


class World:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        nodes: int,
        pieces: int,
        length: int = 4 << 20,
        rate: float = 100e6,
        origin_rate: float | None = None,
        regions: int = 1,
        chunks: int = 8,
        batch_s: float = 0.0,
        latency_s: float = 0.0005,
        far_latency_s: float = 0.05,
        origin_latency_s: float = 0.005,
        detect_s: float = 0.5,
        policy: Policy | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.now_s = 0.0
        self.lengths = [length] * (pieces - 1) + [length // 2 + 1]
        self.bytes = sum(self.lengths)
        self.chunk = max(length // chunks, 1)
        self.rate = rate
        self.batch_s = batch_s
        self.latency_s, self.far_latency_s, self.origin_latency_s = latency_s, far_latency_s, origin_latency_s
        self.detect_s = detect_s
        self.regions = regions
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._seq = 0
        self.origin = Uplink(self, None, origin_rate or rate)
        self.origin_up = True
        self.scheduler_up = True
        self.view = SwarmView("artifact")
        self.nodes: dict[str, Node] = {}
        self.faults: list[str] = []
        self.crossed: dict[str, int] = defaultdict(int)  # bytes into a region from another or the origin
        self.wasted = 0  # bytes of pieces that were here already
        self._told = False
        self._left = 0  # living nodes that are not complete
        self._to_tell: set[str] = set()
        for n in range(nodes):
            region = f"r{n % regions}" if regions > 1 else ""
            self.add(Node(self, Place(f"n{n:04d}", pool=f"p{n % regions}", region=region), rate, rate))

    # ---- building and faults

    def add(self, node: Node) -> Node:
        self.nodes[node.id] = node
        self._left += 1
        return node

    def start(self, at_s: Callable[[int], float] = lambda n: 0.0) -> None:
        """All nodes ask for the artifact, node n at at_s(n)."""
        for n, node in enumerate(self.nodes.values()):
            self.at(at_s(n), self.join, node)

    def join(self, node: Node) -> None:
        self._member(node, put=True)
        self.kick(node)

    def kill(self, node: Node) -> None:
        """Its process is gone; peers see it after `detect_s`, the scheduler after twice that."""
        self._left -= node.done_s is None
        node.alive = False
        for flow in [*node.reads.values()]:
            flow.stopped = True
        for other in list(node.peers.values()):
            for flow in (other.flows.pop(node.id, None), node.flows.pop(other.id, None)):
                if flow is not None:
                    flow.stopped = True
            self.at(self.now_s + self.detect_s, self.disconnect, other, node)
        node.peers = {}
        self.at(self.now_s + 2 * self.detect_s, self._member, node, put=False)

    def revive(self, node: Node) -> None:
        node.restart()
        self._left += node.done_s is None
        self.join(node)

    def heal(self) -> None:
        """Routes between all nodes; who is linked connects."""
        for node in self.nodes.values():
            node.island = 0
        for node in self.nodes.values():
            for x in self.view.neighbours_of(node.id):
                self.connect(node, self.nodes[x.node_id])

    def split(self, islands: Callable[[Node], int]) -> None:
        """No route between nodes of different islands from now on."""
        for node in self.nodes.values():
            node.island = islands(node)
        for node in self.nodes.values():
            for other in list(node.peers.values()):
                if other.island != node.island:
                    self.disconnect(node, other)

    # ---- time

    def at(self, at_s: float, call: Callable[..., None], *args: Any, **named: Any) -> None:
        self._seq += 1
        if named:
            heapq.heappush(self._events, (at_s, self._seq, lambda: call(*args, **named), ()))
        else:
            heapq.heappush(self._events, (at_s, self._seq, call, args))

    def run(self, until_s: float = 3600.0, *, stop: Callable[[], bool] | None = None) -> None:
        """Until all living nodes are complete (or `stop` says so, or nothing happens any more)."""
        stop = stop or self.all_done
        while self._events and not stop():
            at_s, _, call, args = heapq.heappop(self._events)
            if at_s > until_s:
                self.faults.append(f"not done after {until_s} s: {self.unfinished()[:5]}")
                return
            self.now_s = at_s
            call(*args)

    def all_done(self) -> bool:
        return self._left == 0 and self._told

    def unfinished(self) -> list[tuple[str, int, str]]:
        return [
            (node.id, node.swarm.missing, node.swarm.waits_for)
            for node in self.nodes.values()
            if node.alive and node.done_s is None
        ]

    def latency(self, one: Node | None, other: Node) -> float:
        if one is None:
            return self.origin_latency_s
        return self.latency_s if one.place.region == other.place.region else self.far_latency_s

    # ---- the scheduler

    def _member(self, node: Node, *, put: bool) -> None:
        if not self.scheduler_up:
            return
        if put:
            told = self.view.put(SwarmMember(node.id, region=node.place.region, dialled=not node.nat))
        else:
            told = self.view.drop(node.id)
        if not self._to_tell:
            self.at(self.now_s + (MEMBERSHIP_S if self._told else 0.0), self._tell)
        self._to_tell |= told

    def _tell(self) -> None:
        told, self._to_tell, self._told = self._to_tell, set(), True
        for node_id in sorted(told) if self.scheduler_up else ():
            node = self.nodes[node_id]
            if node_id not in self.view or not node.alive:
                continue
            linked = self.view.neighbours_of(node_id)
            members = [Member(self.nodes[x.node_id].place, seed=x.seed) for x in linked]
            count = self.view.region_members(node.place.region)
            node.swarm.set_members(members, seed=node_id in self.view.seeds, region_members=count)
            for x in linked:
                self.connect(node, self.nodes[x.node_id])
            self.kick(node)

    def connect(self, one: Node, other: Node) -> None:
        if other.id in one.peers or not (one.alive and other.alive):
            return
        if (one.nat and other.nat) or one.island != other.island:
            return
        one.peers[other.id], other.peers[one.id] = other, one
        for here, there in ((one, other), (other, one)):
            delay_s = 2 * self.latency(here, there)
            self.at(self.now_s + delay_s, self._up, here, there, Bitmap(len(self.lengths), there.have))

    def _up(self, node: Node, peer: Node, have: Bitmap) -> None:
        if node.peers.get(peer.id) is peer and node.alive:
            node.swarm.peer_up(peer.id, have, self.now_s)
            node.swarm.peer_has(peer.id, tuple(peer.have - set(have)))
            self.kick(node)

    def disconnect(self, one: Node, other: Node) -> None:
        for here, there in ((one, other), (other, one)):
            here.peers.pop(there.id, None)
            if (flow := here.flows.pop(there.id, None)) is not None:
                flow.stopped = True
            for piece in [piece for piece, of in here.asked.items() if of == there.id]:
                del here.asked[piece]
            if here.alive:
                here.swarm.peer_down(there.id, self.now_s)
                self.kick(here)

    # ---- bytes

    def count(self, source: Node | None, to: Node, size: int) -> None:
        if source is None or source.place.region != to.place.region:
            self.crossed[to.place.region] += size

    def piece_here(self, source: Node | None, to: Node, piece: int, flow: Flow) -> None:
        """The last byte of a piece came."""
        if not to.alive or flow.stopped:
            return
        if source is None:
            if piece in to.have:
                self.wasted += self.lengths[piece]
            self._arrived(to, piece, ORIGIN)
            if piece == flow.last and flow.lease is not None and to.reads.pop(flow.lease, None) is not None:
                to.swarm.origin_done(flow.lease, self.now_s)
        elif source.bad:
            to.asked.pop(piece, None)
            to.swarm.bad(piece, source.id, self.now_s)
            self.kick(to)
        else:
            self._arrived(to, piece, source.id)

    def _arrived(self, to: Node, piece: int, source: str) -> None:
        if piece in to.have:
            self.wasted += self.lengths[piece]
        to.have.add(piece)
        if to.asked.get(piece) == source:
            del to.asked[piece]
        to.swarm.arrived(piece, source, 0.0, self.now_s)
        if to.swarm.complete and to.done_s is None:
            to.done_s = self.now_s
            self._left -= 1
        if not to.news:
            self.at(self.now_s + self.batch_s, self._tell_have, to)
        to.news.append(piece)
        self.kick(to)

    def _tell_have(self, node: Node) -> None:
        news, node.news = node.news, []
        if not node.alive:
            return
        for delay_s in {self.latency(node, peer) for peer in node.peers.values()}:
            self.at(self.now_s + delay_s, self._have_told, node, news, delay_s)

    def _have_told(self, node: Node, news: Sequence[int], delay_s: float) -> None:
        for peer in node.peers.values():
            if self.latency(node, peer) == delay_s and peer.alive:
                peer.swarm.peer_has(node.id, news)
                self.kick(peer)

    # ---- actions

    def kick(self, node: Node) -> None:
        if not node.deciding:
            node.deciding = True
            self.at(self.now_s + self.batch_s, self._decide, node)

    def _decide(self, node: Node) -> None:
        node.deciding = False
        if not node.alive:
            return
        for action in node.swarm.decide(self.now_s):
            self._apply(node, action)
        next_s = node.swarm.next_at_s
        if next_s is not None and not self.now_s < node.timer_s <= next_s:
            node.timer_s = next_s
            self.at(max(next_s, self.now_s + 1e-6), self._timer, node, next_s)

    def _timer(self, node: Node, at_s: float) -> None:
        if node.timer_s == at_s:
            node.timer_s = float("inf")
            self.kick(node)

    def _apply(self, node: Node, action: object) -> None:
        match action:
            case Ask(peer_id, pieces, urgent):
                self._ask(node, peer_id, pieces, urgent)
            case Withdraw(peer_id, pieces):
                for piece in pieces:
                    self._withdraw(node, peer_id, piece)
            case ReadOrigin(lease, pieces):
                self._read(node, lease, pieces)
            case StopOrigin(lease):
                if (flow := node.reads.pop(lease, None)) is not None:
                    flow.stopped = True
            case Tell(lease, ended):
                for peer in node.peers.values():
                    self.at(self.now_s + self.latency(node, peer), self._lease_told, node, peer, lease, ended)
            case DropPeer(peer_id, _):
                if peer_id in node.peers:
                    self.disconnect(node, node.peers[peer_id])

    def _lease_told(self, node: Node, peer: Node, lease: Lease, ended: bool) -> None:
        if peer.alive and node.id in peer.peers:
            peer.swarm.lease_told(node.id, lease, ended, self.now_s)
            self.kick(peer)
            for other in () if ended or lease.holder != node.id else peer.reads:
                if set(other.pieces) & set(lease.pieces):
                    patience_s = 4 * self.latency(node, peer) + 2 * self.batch_s + 0.01
                    self.at(self.now_s + patience_s, self._one_stopped, node, lease, peer, other)

    def _one_stopped(self, one: Node, lease: Lease, other: Node, other_lease: Lease) -> None:
        """Two who know of each other do not both read on."""
        if lease in one.reads and other_lease in other.reads and one.peers.get(other.id) is other:
            self.faults.append(f"{one.id} and {other.id} both read on: {lease} and {other_lease}")

    def _ask(self, node: Node, peer_id: str, pieces: Sequence[int], urgent: bool) -> None:
        peer = node.peers.get(peer_id)
        if peer is None:
            self.faults.append(f"{node.id} asks {peer_id}, which is not connected")
            return
        for piece in pieces:
            if piece in node.have or piece in node.asked:
                self.faults.append(f"{node.id} asks for {piece}, which is here or asked of {node.asked.get(piece)}")
            if piece not in peer.have:
                self.faults.append(f"{node.id} asks {peer_id} for {piece}, which it does not have")
            node.asked[piece] = peer_id
        self.at(self.now_s + self.latency(node, peer), self._asked, node, peer, pieces, urgent)

    def _asked(self, node: Node, peer: Node, pieces: Sequence[int], urgent: bool) -> None:
        if not peer.alive or node.id not in peer.peers:
            return
        flow = peer.flows.get(node.id)
        if flow is None or not flow.pieces:
            flow = peer.flows[node.id] = Flow(node)
            flow.pieces.extend(pieces)
            flow.urgent = urgent
            peer.up.add(flow)
        elif urgent:
            first = flow.pieces.popleft() if flow.sent else None
            flow.pieces.extendleft(reversed(pieces))
            if first is not None:
                flow.pieces.appendleft(first)
        else:
            flow.pieces.extend(pieces)

    def _withdraw(self, node: Node, peer_id: str, piece: int) -> None:
        if node.asked.pop(piece, None) != peer_id and piece not in node.have:
            self.faults.append(f"{node.id} withdraws {piece} of {peer_id}, which it did not ask for")
        if (peer := node.peers.get(peer_id)) is not None:
            self.at(self.now_s + self.latency(node, peer), self._withdrawn, node, peer, piece)

    def _withdrawn(self, node: Node, peer: Node, piece: int) -> None:
        flow = peer.flows.get(node.id)
        if flow is not None and piece in flow.pieces and not (flow.sent and flow.pieces[0] == piece):
            flow.pieces.remove(piece)

    def _read(self, node: Node, lease: Lease, pieces: Sequence[int]) -> None:
        if any(piece in node.have for piece in pieces):
            self.faults.append(f"{node.id} reads {lease} though it has some of it")
        if not self.origin_up:
            self.at(self.now_s + 0.1, self._read_failed, node, lease)
            return
        flow = node.reads[lease] = Flow(node, lease=lease, pieces=deque(pieces), last=pieces[-1])
        self.at(self.now_s + 2 * self.latency(None, node), self.origin.add, flow)

    def _read_failed(self, node: Node, lease: Lease) -> None:
        node.swarm.origin_failed(lease, 1.0, self.now_s)
        self.kick(node)

    # ---- figures

    @property
    def wall_s(self) -> float:
        """When the last living node was complete."""
        return max((node.done_s or self.now_s for node in self.nodes.values() if node.alive), default=0.0)

    @property
    def bound_s(self) -> float:
        """max(F / B_origin, F / B_node)."""
        return max(self.bytes / self.origin.rate, self.bytes / self.rate)

    @property
    def bound_swarm_s(self) -> float:
        """The same, with the hops that the last piece takes: T* of the design."""
        return self.bound_s + ceil(log2(max(len(self.nodes), 2))) * self.lengths[0] / self.rate

    @property
    def origin_share(self) -> float:
        """Bytes that left the origin ÷ F."""
        return self.origin.bytes / self.bytes

    @property
    def crossing_share(self) -> float:
        """Bytes that entered regions ÷ (regions · F)."""
        return sum(self.crossed.values()) / (self.regions * self.bytes)

    @property
    def wasted_share(self) -> float:
        """Bytes of pieces that were here already ÷ all that were needed."""
        return self.wasted / (self.bytes * len(self.nodes))


__all__ = ["Node", "World"]
