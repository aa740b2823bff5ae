"""Models, wishes and cache entries in memory, and what finds them: by artifact, by digest, in order of id.

Pure. Invariant: every index follows from `models`. Part of `State`; changed by `State.apply` only. There may be
100,000 models, so an index holds a tuple of ids an artifact (nearly always one), and listing is bisection: a page costs
its own length, the total of a range nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from fal_scheduler.core.records import BuildTask, CacheEntry, Model, ModelState, Wish

_AFTER_ALL = "\U0010ffff"  # above every character of a name


class Catalog:
    """What is registered. Read freely; `set_…` only from `State.apply`."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.by_artifact: dict[str, tuple[str, ...]] = {}
        self.by_digest: dict[str, tuple[str, ...]] = {}
        self.wishes: dict[str, dict[str, Wish]] = {}  # model -> target -> wish
        self.cache_entries: dict[tuple[str, str], CacheEntry] = {}  # (namespace, key)
        self.builds: dict[str, BuildTask] = {}  # build tasks by app
        self._ordered: dict[str, list[str]] = {"": []}  # ids of a kind, or of all, in order

    def set_model(self, before: Model | None, after: Model | None) -> None:
        """Make, change or forget a model."""
        if before is not None:
            _leave(self.by_artifact, before.artifact_id, before.id)
            _leave(self.by_digest, before.manifest_digest, before.id)
        if after is not None:
            self.models[after.id] = after
            _enter(self.by_artifact, after.artifact_id, after.id)
            _enter(self.by_digest, after.manifest_digest, after.id)
        elif before is not None:
            del self.models[before.id]
        old, new = before.kind if before is not None else None, after.kind if after is not None else None
        if old == new:
            return
        if before is not None:
            self._out(before.id, before.kind, also_all=after is None)
        if after is not None:
            self._in(after.id, after.kind, also_all=before is None)

    def _in(self, id_: str, kind: str, *, also_all: bool) -> None:
        for name in (kind, *([""] if also_all else [])):
            ids = self._ordered.setdefault(name, [])
            if not ids or ids[-1] < id_:  # loading comes in order
                ids.append(id_)
            else:
                insort(ids, id_)

    def _out(self, id_: str, kind: str, *, also_all: bool) -> None:
        for name in (kind, *([""] if also_all else [])):
            ids = self._ordered[name]
            del ids[bisect_left(ids, id_)]

    def set_wish(self, before: Wish | None, after: Wish | None) -> None:
        """Make, change or forget a wish."""
        if after is not None:
            self.wishes.setdefault(after.model, {})[after.target] = after
        elif before is not None:
            targets = self.wishes[before.model]
            del targets[before.target]
            if not targets:
                del self.wishes[before.model]

    def wishes_of(self, model_id: str) -> list[Wish]:
        """Wishes for a model, in order of target."""
        targets = self.wishes.get(model_id, {})
        return [targets[target] for target in sorted(targets)]

    def all_wishes(self) -> Iterator[Wish]:
        """All of them."""
        return (wish for targets in self.wishes.values() for wish in targets.values())

    def page(
        self, *, team: str = "", kind: str = "", prefix: str = "", after: str = "", limit: int
    ) -> tuple[list[Model], str, int]:
        """Models in order of id, `limit` at most and those behind `after` only; where to go on ("": the end); how many
        match in all.

        `prefix`: of the name; without a team it is looked for in every team, which reads all ids.
        """
        ids = self._ordered.get(kind, [])
        if prefix and not team:
            ids = [id_ for id_ in ids if id_.partition("/")[2].startswith(prefix)]
            first, end = 0, len(ids)
        else:
            head = f"{team}/{prefix}" if team else ""
            first, end = bisect_left(ids, head), bisect_left(ids, head + _AFTER_ALL)
        start = max(first, bisect_left(ids, after + "\0")) if after else first
        stop = min(end, start + limit)
        chosen = [self.models[id_] for id_ in ids[start:stop]]
        return chosen, chosen[-1].id if chosen and stop < end else "", end - first

    def named_by(self, artifact_id: str) -> list[Model]:
        """Models with this artifact, in order of registration."""
        return [self.models[id_] for id_ in self.by_artifact.get(artifact_id, ())]

    def withdrawn_because(self, artifact_id: str) -> str:
        """Why nodes must not keep this artifact: every model that names it is revoked. Empty while one may use it, and
        for an artifact that nobody registered."""
        models = self.named_by(artifact_id)
        if not models or any(model.state is not ModelState.REVOKED for model in models):
            return ""
        return models[-1].reason


def _enter(index: dict[str, tuple[str, ...]], key: str, id_: str) -> None:
    if key:
        index[key] = (*index.get(key, ()), id_)


def _leave(index: dict[str, tuple[str, ...]], key: str, id_: str) -> None:
    if not key:
        return
    left = tuple(one for one in index[key] if one != id_)
    if left:
        index[key] = left
    else:
        del index[key]


__all__ = ["Catalog"]
