"""The folders and files of one artifact as numbered nodes. Pure.

Invariant: equal artifacts give equal numbers, so that a server that takes a connection over after a crash understands
the numbers that its predecessor gave away. The root is node 1; every folder and file follows in order of path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fal_contract.artifact import Artifact
from fal_fsd.mount.wire import ROOT_NODE, Attr


@dataclass(slots=True)
class Node:
    """A folder, or the file `artifact.files[file]`."""

    number: int
    parent: int
    file: int = -1
    size_bytes: int = 0
    children: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> bool:
        return self.file < 0

    @property
    def attr(self) -> Attr:
        return Attr(self.number, self.size_bytes, self.folder)


class Tree:
    """See the module. Read-only once made; safe to use from many threads."""

    def __init__(self, artifact: Artifact) -> None:
        self._nodes = [Node(0, 0), Node(ROOT_NODE, ROOT_NODE)]
        for index, file in enumerate(artifact.files):
            *folders, name = file.path.split("/")
            parent = ROOT_NODE
            for folder in folders:
                parent = self._add(parent, folder)
            node = self._nodes[self._add(parent, name)]
            node.file, node.size_bytes = index, file.size_bytes

    def __len__(self) -> int:
        return len(self._nodes) - 1

    def _add(self, parent: int, name: str) -> int:
        children = self._nodes[parent].children
        if name not in children:
            children[name] = len(self._nodes)
            self._nodes.append(Node(len(self._nodes), parent))
        return children[name]

    def node(self, number: int) -> Node | None:
        """That node."""
        return self._nodes[number] if 0 < number < len(self._nodes) else None

    def child(self, parent: int, name: str) -> Node | None:
        """What `name` is in that folder."""
        folder = self.node(parent)
        number = folder.children.get(name) if folder is not None else None
        return None if number is None else self._nodes[number]

    def listing(self, folder: Node) -> Iterator[tuple[int, bool, str]]:
        """(node, is a folder, name) of all entries, `.` and `..` first."""
        yield folder.number, True, "."
        yield folder.parent, True, ".."
        for name, number in folder.children.items():
            yield number, self._nodes[number].folder, name
