"""An operator who pushes, as a node sees it: its name at the bulk port, and that its pieces are asked for."""

from __future__ import annotations

import pytest

from fal_contract.identity import PeerIdentity, Role
from fal_contract.pieces import Bitmap
from fal_fsd.core.messages import Ask, Member, Place
from fal_fsd.core.swarm import Swarm
from fal_fsd.peers.gate import Gate, Refusal

CLUSTER = "c-000000000001"


def shown(role: Role, name: str) -> PeerIdentity:
    return PeerIdentity(cluster_id=CLUSTER, role=role, name=name, serial="1", not_before_s=0.0, not_after_s=1000.0)


@pytest.mark.parametrize(
    ("role", "name", "said", "good"),
    [
        (Role.OPERATOR, "ada", "operator/ada", True),
        (Role.OPERATOR, "ada", "operator/ada+a1b2c3", True),
        (Role.ADMIN, "root", "admin/root+a1b2c3", True),
        (Role.OPERATOR, "ada", "operator/eve+a1b2c3", False),
        (Role.OPERATOR, "ada", "admin/ada+a1b2c3", False),
        (Role.OPERATOR, "ada", "ada", False),
        (Role.NODE, "n-1", "n-1", True),
        (Role.NODE, "n-1", "n-1+a1b2c3", False),
        (Role.NODE, "n-1", "operator/ada", False),
        (Role.VIEWER, "eve", "viewer/eve+a1b2c3", False),
        (Role.SERVING, "gw", "serving/gw", False),
    ],
)
def test_whose_certificate_may_say_which_name(role: Role, name: str, said: str, good: bool) -> None:
    gate = Gate("n-9", CLUSTER, tls="auto", identified=True)
    if good:
        gate.check_peer(shown(role, name), said, now_s=500.0)
    else:
        with pytest.raises(Refusal):
            gate.check_peer(shown(role, name), said, now_s=500.0)


def test_every_piece_is_asked_of_the_operator_whoever_imports_it() -> None:
    """Other regions' pieces are for their importer alone; an operator is connected to one node only."""
    count = 200
    every = Bitmap(count)
    for piece in range(count):
        every.add(piece)
    me = Place("n-1", pool="p", region="east", zone="z")
    other = Member(Place("n-2", pool="p", region="east", zone="z"), seed=True)
    swarm = Swarm(me, [1 << 20] * count, Bitmap(count))
    swarm.set_members([other], seed=True, region_members=2)
    swarm.origin_available(False)
    swarm.peer_up("n-2", Bitmap(count), 0.0)
    swarm.peer_up("operator/ada+a1b2c3", every, 0.0)
    came, now_s = 0, 0.0
    for _ in range(10 * count):
        now_s += 0.01
        for action in swarm.decide(now_s):
            if isinstance(action, Ask) and action.node_id.startswith("operator/"):
                for piece in action.pieces:
                    came += 1
                    swarm.arrived(piece, action.node_id, 0.01, now_s)
        if came == count:
            break
    assert came == count
    assert now_s < 3.0
