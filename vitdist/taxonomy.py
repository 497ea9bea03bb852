"""The class tree: levels from coarse to fine, the nodes of each, and the parent of every node.

A label is a node of the tree, not only a leaf: a photograph known to be "some gull" carries the family's node.
Node ids count through the levels: id = offset of the level + index within it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitdist.errors import DataError, UsageError

UNKNOWN = -1


@dataclass(frozen=True)
class Taxonomy:
    """Names and parents by level; `parents[l][i]` is an index in level l-1, or -1 where that level is unknown."""

    levels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def num_classes(self) -> tuple[int, ...]:
        return tuple(len(names) for names in self.names)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First node id of each level, and the number of nodes as the last entry."""
        return tuple(int(total) for total in np.cumsum((0, *self.num_classes)))

    @property
    def num_nodes(self) -> int:
        return self.offsets[-1]

    @cached_property
    def paths(self) -> np.ndarray:
        """int32 [num_nodes, L]: the class of each node's ancestor (or itself) at every level, -1 where unknown."""
        table = np.full((self.num_nodes, self.num_levels), UNKNOWN, dtype=np.int32)
        for level, parents in enumerate(self.parents):
            for index, parent in enumerate(parents):
                node = self.offsets[level] + index
                if level and parent != UNKNOWN:
                    table[node] = table[self.offsets[level - 1] + parent]
                table[node, level] = index
        return table

    def node(self, level: str, name: str) -> int:
        """The id of a named class; DataError when the tree has none of that name."""
        where = self.levels.index(level)
        try:
            return self.offsets[where] + self._index[where][name]
        except KeyError:
            raise DataError(f"the class tree has no {level} named {name!r}") from None

    @cached_property
    def _index(self) -> tuple[dict[str, int], ...]:
        return tuple({name: index for index, name in enumerate(names)} for names in self.names)

    def path_names(self, node: int) -> dict[str, str]:
        """Level -> class name on the way from the root to a node; unknown levels are left out."""
        pairs = zip(self.levels, self.names, self.paths[node], strict=True)
        return {level: names[index] for level, names, index in pairs if index != UNKNOWN}

    def select(self, levels: Sequence[str]) -> Taxonomy:
        """The same tree with only some of its levels, kept in their order from coarse to fine."""
        unknown = [level for level in levels if level not in self.levels]
        if unknown:
            raise UsageError(f"the class tree has no level {unknown[0]!r}; it has {', '.join(self.levels)}")
        columns = [column for column, level in enumerate(self.levels) if level in levels]
        parents: list[tuple[int, ...]] = []
        for rank, column in enumerate(columns):
            rows = self.paths[self.offsets[column] : self.offsets[column + 1]]
            above = columns[rank - 1] if rank else None
            parents.append(tuple(UNKNOWN if above is None else int(row[above]) for row in rows))
        return Taxonomy(tuple(self.levels[c] for c in columns), tuple(self.names[c] for c in columns), tuple(parents))

    def targets_from(self, packed: Taxonomy) -> np.ndarray:
        """int32 [packed.num_nodes, L]: class indices in this tree for every node of the tree a set was packed with.

        Classes are matched by level and name; a leaf known to both trees takes this tree's whole path, so that a set
        packed with one grouping can be trained with another.
        """
        table = np.full((packed.num_nodes, self.num_levels), UNKNOWN, dtype=np.int32)
        for node in range(packed.num_nodes):
            for level, name in packed.path_names(node).items():  # coarse to fine: the finest match decides
                if level in self.levels and name in self._index[self.levels.index(level)]:
                    table[node] = self.paths[self.node(level, name)]
        return table

    @property
    def hash(self) -> str:
        """sha256 of the tree's canonical JSON: equal for equal trees."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "levels": list(self.levels),
            "names": [list(names) for names in self.names],
            "parents": [list(parents) for parents in self.parents],
        }

    @staticmethod
    def from_json(data: Any) -> Taxonomy:
        """Read and check what `to_json` wrote; DataError when it is no tree."""
        try:
            tree = Taxonomy(
                tuple(str(level) for level in data["levels"]),
                tuple(tuple(str(name) for name in names) for names in data["names"]),
                tuple(tuple(int(parent) for parent in parents) for parents in data["parents"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no class tree: {error}") from None
        tree.check()
        return tree

    def check(self) -> None:
        """DataError unless levels, names and parents fit together."""
        if not self.levels or not len(self.levels) == len(self.names) == len(self.parents):
            raise DataError("a class tree needs levels, and names and parents for each of them")
        for level, names, parents in zip(self.levels, self.names, self.parents, strict=True):
            if len(set(names)) != len(names):
                raise DataError(f"level {level!r} of the class tree names a class twice")
            if len(parents) != len(names):
                raise DataError(f"level {level!r} of the class tree has {len(names)} names, {len(parents)} parents")
        for above, parents in zip(self.num_classes, self.parents[1:], strict=False):
            if any(not UNKNOWN <= parent < above for parent in parents):
                raise DataError("a parent in the class tree is out of range")


def build(levels: Sequence[str], rows: Iterable[Sequence[str | None]]) -> Taxonomy:
    """The tree of rows that give one name a level (None: unknown), sorted by name within each level.

    DataError when a class stands under two different parents.
    """
    parent_of: list[dict[str, str | None]] = [{} for _ in levels]
    for row in rows:
        for level, name in enumerate(row):
            if name is None:
                continue
            parent = row[level - 1] if level else None
            known = parent_of[level].setdefault(name, parent)
            if known != parent:
                raise DataError(f"{levels[level]} {name!r} stands under both {known!r} and {parent!r}")
    names = tuple(tuple(sorted(table)) for table in parent_of)
    index = [{name: i for i, name in enumerate(level)} for level in names]
    parents = []
    for level, table in enumerate(parent_of):
        above = index[level - 1] if level else {}
        parents.append(tuple(UNKNOWN if (p := table[name]) is None else above[p] for name in names[level]))
    return Taxonomy(tuple(levels), names, tuple(parents))


def read_csv(path: Path, levels: Sequence[str], leaf: str = "class_name") -> Taxonomy:
    """The tree of a CSV with one row a class: a column for each coarser level and `leaf` for the finest."""
    columns = [*levels[:-1], leaf]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(reader.fieldnames or [])}")
        return build(levels, ([row[column] or None for column in columns] for row in reader))


CUB_LEVELS = ("order", "family", "genus", "species")


def cub() -> Taxonomy:
    """CUB-200-2011 in the tree of Barz & Denzler (CUB-Hierarchy, 2019): 13 orders, 37 families, 121 genera."""
    return read_csv(Path(__file__).with_name("taxonomies") / "cub.csv", CUB_LEVELS)
