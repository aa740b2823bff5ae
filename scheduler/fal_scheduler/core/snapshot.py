"""A State as plain values and back, exactly: the head of a log's segment.

Pure. Everything in a State is kept as it is, order of dicts included (`next(iter(dirty))` is a decision), except the
fleet's columns: they follow from node records, `live` and occupancy, and are made anew. So a new table of State needs
nothing here as long as `core.log_codec` can write what it holds. A new attribute of Fleet must follow from the others
in `Fleet._rebuild`, or stand in `FLEET_KEPT`; a test compares a State with itself brought back and says which does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import blake3
import numpy as np

from fal_contract.errors import Code, FalError
from fal_scheduler.core.log_codec import DROPPED, Packer, UnknownType
from fal_scheduler.core.state import State

FLEET_KEPT: Final = ("occupancy",)  # the rest of Fleet follows from this and from the nodes' facts
_FLEET: Final = "fleet"
_NODES: Final = "fleet_nodes"


def take(state: State) -> dict[str, Any]:
    """Everything, by attribute. The values are the state's own: write them out before the next step."""
    taken = {name: value for name, value in vars(state).items() if name != _FLEET}
    taken[_NODES] = list(state.fleet.facts)
    taken[_FLEET] = {name: getattr(state.fleet, name) for name in FLEET_KEPT}
    return taken


def restore(taken: Mapping[str, Any]) -> State:
    """The state that was taken. Values are used as they are. Raises VERSION_MISMATCH for what this release has not."""
    state = State()
    known = vars(state)
    for name, value in taken.items():
        if name in (_FLEET, _NODES):
            continue
        if name in known:
            setattr(state, name, value)
        elif name not in DROPPED.get("State", frozenset()):
            raise FalError(
                Code.VERSION_MISMATCH,
                f"the log holds a table {name}, which this release does not know",
                remedy="Replay it with the release that its header names.",
            )
    for name, value in taken[_FLEET].items():
        setattr(state.fleet, name, value)
    state.fleet.distrust()
    for node_id in taken[_NODES]:
        state.refresh_node(node_id)
    return state


def check(state: State) -> None:
    """Raise UnknownType, naming the attribute, where something in `state` cannot be written."""
    for name, value in take(state).items():
        try:
            Packer().pack(value)
        except (UnknownType, OverflowError, ValueError) as error:
            raise UnknownType(f"State.{name}: {error}") from error


def fingerprints(state: State) -> dict[str, str]:
    """For each attribute, the fleet's columns among them, "SHAPE.VALUE": digests of the classes and fields in it (empty
    where it holds none), and of what they hold. Equal states have equal ones, on every machine."""
    found = {name: _digest(value) for name, value in take(state).items()}
    fleet = state.fleet.fresh()
    for name, value in vars(fleet).items():
        if isinstance(value, np.ndarray):
            found[f"fleet.{name}"] = _digest(value)
    found["fleet.facts"] = _digest(fleet.facts)
    return found


def differences(one: State, other: State) -> list[str]:
    """Names of what differs between two states; empty where they are the same."""
    left, right = fingerprints(one), fingerprints(other)
    return [name for name in {**left, **right} if left.get(name) != right.get(name)]


def _digest(value: object) -> str:
    shape, packed = Packer().pack_apart(value)
    return f"{blake3.blake3(shape).hexdigest(8) if shape else ''}.{blake3.blake3(packed).hexdigest(16)}"


__all__ = ["FLEET_KEPT", "check", "differences", "fingerprints", "restore", "take"]
