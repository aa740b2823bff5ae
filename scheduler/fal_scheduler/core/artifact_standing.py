"""What an artifact is worth by the models that name it: to be staged, attested, or to be removed. Pure.

Several models may name one artifact (two teams register the same repository). It goes only when nobody may use it any
more: revoked where every model that names it is revoked, else refused where none is left. An artifact that nobody
registered stands as it is: it may be of a registration that is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fal_scheduler.core.catalog import Catalog
from fal_scheduler.core.records import Model, ModelState

STAGED: Final = frozenset({ModelState.REGISTERED, ModelState.ATTESTED})


@dataclass(frozen=True, slots=True)
class Standing:
    """`model`: one that may be used, an attested one first; None: none. `reason`: why not; `revoked`: for good."""

    model: Model | None = None
    reason: str = ""
    revoked: bool = False

    @property
    def attested(self) -> bool:
        """Whether its content is known."""
        return self.model is not None and self.model.state is ModelState.ATTESTED


def standing_of(catalog: Catalog, artifact_id: str, manifest_digest: str = "") -> Standing:
    """By artifact id, or by digest where nobody registered that id (an old cache, or another listing of it)."""
    names = catalog.by_artifact.get(artifact_id) or catalog.by_digest.get(artifact_id)
    if not names and manifest_digest:
        names = catalog.by_digest.get(manifest_digest)
    models = [catalog.models[name] for name in names or ()]
    usable = [model for model in models if model.state in STAGED]
    if usable:
        return Standing(max(usable, key=lambda model: model.state is ModelState.ATTESTED))
    if not models:
        return Standing()
    last = models[-1]
    revoked = all(model.state is ModelState.REVOKED for model in models)
    word = "revoked" if revoked else "refused"
    return Standing(None, f"{word}: {last.reason}" if last.reason else f"model {last.id} is {word}", revoked)


__all__ = ["STAGED", "Standing", "standing_of"]
