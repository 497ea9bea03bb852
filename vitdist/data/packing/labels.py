"""Finds the label in what foreign shards put beside an image, and makes a class tree of the labels it met."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitdist.data.packing.indexing import NO_GROUP
from vitdist.data.sources.trees import labels_by_name, tree_of
from vitdist.errors import DataError, UsageError
from vitdist.taxonomy import Taxonomy

JSON_KEYS = ("labels", "label", "class_name", "class", "cls", "target", "species", "category", "category_id")
CLS = "cls"
SINGLE_LEVEL = "class"
MAX_NAME = 1000
MAX_CLASSES = 1_000_000
Value = int | str | tuple[tuple[str, str], ...]
"""A class number, a class name, or names by level."""


@dataclass
class LabelReader:
    """Reads one label a sample and numbers the different ones in the order it meets them; `finish` makes nodes of them.

    `where` is the json key or 'cls'; where it is None, the first sample decides for all.
    """

    where: str | None = None
    levels: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    taxonomy: Taxonomy | None = None
    group_key: str = "group"
    values: dict[Value, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    is_number: bool | None = None

    def __call__(self, key: str, texts: Mapping[str, bytes]) -> tuple[int, int]:
        """(number of the label, number of the group or -1); DataError when there is no label of the expected kind."""
        record = _record(texts)
        if self.where is None and self.levels is None:
            self.where = _detect(texts, record)
        value = self._value(texts, record)
        group = record.get(self.group_key)
        number = NO_GROUP if group is None else self.groups.setdefault(str(group), len(self.groups))
        return self.values.setdefault(value, len(self.values)), number

    def _value(self, texts: Mapping[str, bytes], record: Mapping[str, Any]) -> Value:
        if self.levels is not None:
            inner = record.get(self.where or "labels")
            names = inner if isinstance(inner, Mapping) else record
            return _by_level({level: names.get(level) for level in self.levels})
        assert self.where is not None
        if self.where == CLS and CLS in texts:
            value: Any = texts[CLS].decode("utf-8", "replace").strip()
        elif self.where in record:
            value = record[self.where]
        else:
            raise DataError(f"it has no label in {self.where!r}")
        if isinstance(value, Mapping):
            return _by_level(value)
        return self._single(value)

    def _single(self, value: Any) -> int | str:
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
            raise DataError(f"its label {str(value)[:60]!r} is neither a number nor a name")
        digits = str(value)
        if len(digits) > MAX_NAME or not digits.isprintable():
            raise DataError(f"its label {ascii(digits[:30])} is no name")
        if self.is_number is None:
            self.is_number = digits.isascii() and digits.isdigit()
        if not self.is_number:
            return digits
        if not (digits.isascii() and digits.isdigit()):
            raise DataError(f"its label {digits[:60]!r} is no class number, as those before it are")
        limit = len(self.class_names) if self.class_names is not None else MAX_CLASSES
        if len(digits) > 9 or int(digits) >= limit:
            raise DataError(f"its class number {digits[:60]} is out of range ({limit} classes)")
        return int(digits) if self.class_names is None else self.class_names[int(digits)]

    def finish(self) -> tuple[Taxonomy, np.ndarray]:
        """The class tree, and for each number given out the node it means (int32)."""
        if self.taxonomy is not None:
            return self._into_taxonomy(self.taxonomy)
        if self.class_names is not None:
            names = tuple(self.class_names)
        elif self.is_number:
            names = tuple(str(number) for number in range(1 + max(int(str(value)) for value in self.values)))
        elif self.is_number is None:
            return self._from_levels()
        else:
            names = tuple(sorted(str(value) for value in self.values))
        tree = Taxonomy((SINGLE_LEVEL,), (names,), ((-1,) * len(names),))
        tree.check()
        return tree, np.array([tree.node(SINGLE_LEVEL, str(value)) for value in self.values], np.int32)

    def _from_levels(self) -> tuple[Taxonomy, np.ndarray]:
        paths = [dict(value) for value in self.values if isinstance(value, tuple)]
        levels = self.levels or list(dict.fromkeys(level for path in paths for level in path))
        try:
            tree = tree_of(levels, paths)
        except DataError as error:
            raise DataError(f"{error}; are {', '.join(levels)} from coarse to fine? Say so with --levels") from None
        finest = [[level for level in levels if level in path][-1] for path in paths]
        return tree, np.array([tree.node(at, path[at]) for at, path in zip(finest, paths, strict=True)], np.int32)

    def _into_taxonomy(self, tree: Taxonomy) -> tuple[Taxonomy, np.ndarray]:
        if self.is_number and self.class_names is None:
            raise UsageError("the labels are class numbers; --classes FILE, one name a line, says what they mean")
        known, nodes = labels_by_name(tree), []
        for value in self.values:
            path = dict(value) if isinstance(value, tuple) else known.get(str(value))
            if path is None:
                raise DataError(f"the class tree given has no class named {value!r}")
            finest = [level for level in tree.levels if level in path]
            if not finest:
                raise DataError(f"the class tree given has none of the levels {', '.join(path)}")
            nodes.append(tree.node(finest[-1], path[finest[-1]]))
        return tree, np.array(nodes, np.int32)

    def describe(self) -> str:
        """One line: where the label was found and what it is."""
        where = f"json keys {', '.join(self.levels)}" if self.levels is not None else f"{self.where!r}"
        kind = {True: "class numbers", False: "class names", None: "names by level"}[self.is_number]
        return f"{len(self.values)} labels in {where}: {kind}"


def _record(texts: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        record = json.loads(texts["json"]) if "json" in texts else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json is none: {error}") from None
    if not isinstance(record, dict):
        raise DataError("its json is no object")
    return record


def _detect(texts: Mapping[str, bytes], record: Mapping[str, Any]) -> str:
    if CLS in texts:
        return CLS
    for key in JSON_KEYS:
        if isinstance(record.get(key), (int, str, dict)):
            return key
    found = f"its json has {', '.join(sorted(record)[:12])}" if record else "it has neither cls nor json"
    raise DataError(f"no label found: {found}; name the key with --label-key")


def _by_level(names: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    path = tuple((level, str(name)) for level, name in names.items() if name not in (None, ""))
    if not path:
        raise DataError("it has a name at none of the levels")
    return path
