"""Whom this node obeys: cluster, epoch, term, and what of them must be remembered. Pure.

Invariant: a word that stops a container counts only from our cluster (or one that an operator let take over ours), of
an epoch not older than the newest seen, under a term not older than the newest seen. All else may be listened
to and changes nothing. `Standing` is durable (fal_agent.journal) and never falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fal_contract.errors import Code, FalError


@dataclass(frozen=True, slots=True)
class Standing:
    """The newest that this node knows. Empty and 0 on a new node."""

    cluster_id: str = ""
    epoch: int = 0
    term: int = 0
    incarnation: str = ""
    store_revision: int = 0


@dataclass(frozen=True, slots=True)
class Leader:
    """Who answers in this session, as its Welcome said."""

    cluster_id: str
    epoch: int
    term: int
    incarnation: str
    accepted_clusters: tuple[str, ...] = ()


def distrust(standing: Standing, leader: Leader) -> str:
    """Why nothing this leader says may touch a runner; empty when it may."""
    if not leader.cluster_id:
        return "the scheduler does not name its cluster"
    if not standing.cluster_id:
        return ""
    if leader.cluster_id != standing.cluster_id:
        if standing.cluster_id in leader.accepted_clusters:
            return ""
        return (
            f"this node belongs to cluster {standing.cluster_id}, the scheduler to {leader.cluster_id}, "
            "which has not accepted it (falctl operator confirm)"
        )
    if leader.epoch < standing.epoch:
        return f"the scheduler lives in epoch {leader.epoch}, this node has seen {standing.epoch}"
    return ""


def stale(standing: Standing, term: int) -> FalError | None:
    """The error for a message of `term`, or None when the term is current."""
    if term >= standing.term:
        return None
    return FalError(
        Code.STALE_TERM,
        f"a leader of term {term} spoke, this node has seen term {standing.term}",
        remedy="Nothing: the newer leader's word holds.",
    )


def obey(standing: Standing, leader: Leader, term: int) -> Standing:
    """After a trusted leader spoke under `term`, which is not stale. Joins a new node to the cluster."""
    moved = standing.cluster_id != leader.cluster_id
    epoch = leader.epoch if moved else max(standing.epoch, leader.epoch)
    return replace(standing, cluster_id=leader.cluster_id, epoch=epoch, term=max(standing.term, term))


def works_for(standing: Standing, leader: Leader, store_revision: int) -> Standing:
    """After every live runner here was in the set of this leader's store (or there is none)."""
    if standing.incarnation != leader.incarnation:
        return replace(standing, incarnation=leader.incarnation, store_revision=store_revision)
    return replace(standing, store_revision=max(standing.store_revision, store_revision))
