"""YAML for recipes: plain data with the line of every key, and nothing else of YAML.

Written on PyYAML's event stream, because its loaders take `1e-4` for text, `no` for false, 0777 for 511 and the last of
two equal keys without a word. Here scalars follow YAML 1.2's core schema, a key given twice is a problem, and anchors,
aliases, merge keys and tags, which recipes do not need and which have cost others their machines, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from vitdist.recipe.problems import COMMAND_LINE, Place, Problem, short

MAX_DEPTH = 16

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")


@dataclass(frozen=True)
class Scalar:
    """A single value as written; `plain` where it stood without quotes."""

    text: str
    plain: bool
    place: Place


@dataclass(frozen=True)
class Items:
    """A list of values."""

    items: list[Node]
    place: Place


@dataclass(frozen=True)
class Mapping:
    """Values by key; each value's place is that of its key."""

    entries: dict[str, Node]
    place: Place


Node = Scalar | Items | Mapping


class Refused(Exception):
    """A document that cannot be read on; holds the one problem to report."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.problem = Problem(place, text)


def resolve(text: str) -> Any:
    """The value of a plain scalar by YAML 1.2's core schema: None, bool, int, float or str."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    return float(special[1] + special[2].lower()) if special else text


def value_of(node: Node) -> Any:
    """The plain data of a node."""
    if isinstance(node, Scalar):
        return resolve(node.text) if node.plain else node.text
    if isinstance(node, Items):
        return [value_of(item) for item in node.items]
    return {key: value_of(entry) for key, entry in node.entries.items()}


def parse_yaml(text: str, file: str) -> tuple[Node, list[Problem]]:
    """Read one document; the problems are keys given twice, everything worse raises Refused."""
    bad = _FORBIDDEN.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise Refused(Place(file, line), f"holds the control character {bad[0]!r}; recipes are plain text")
    reader = _Reader(file, yaml.parse(text, Loader=yaml.SafeLoader))
    try:
        return reader.document(), reader.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Refused(Place(file, mark.line + 1 if mark else 1), _syntax(error)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: PyYAML on an impossible escape in quotes
        raise Refused(Place(file, 1), f"is not valid YAML: {short(str(error), 100)}") from None


def _syntax(error: yaml.MarkedYAMLError) -> str:
    what = " ".join((error.problem or "").split())
    if "\\t" in what:
        return "a tab stands where YAML wants spaces; indent with spaces"
    return f"is not valid YAML: {short(what, 100)}; check indentation, colons and quotes here and on the line before"


@dataclass
class _Reader:
    """Builds the tree of one document from events and notes keys given twice."""

    file: str
    events: Iterator[yaml.Event]
    problems: list[Problem] = field(default_factory=list)

    def document(self) -> Node:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise Refused(Place(self.file, 1), "is empty; a recipe needs at least data.path")
        root = self._node(next(self.events), ())
        next(self.events)  # the document's end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise Refused(self._place(after), "a second document starts here; a recipe is one document")
        return root

    def _place(self, event: yaml.Event) -> Place:
        return Place(self.file, 0 if self.file == COMMAND_LINE or not event.start_mark else event.start_mark.line + 1)

    def _node(self, event: yaml.Event, path: tuple[str, ...], place: Place | None = None) -> Node:
        place = place or self._place(event)
        self._refuse_indirection(event)
        if len(path) > MAX_DEPTH:
            raise Refused(place, f"is nested more than {MAX_DEPTH} levels deep; recipes need 3")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, event.style is None, place)
        if isinstance(event, yaml.SequenceStartEvent):
            return Items(list(self._items(path)), place)
        return Mapping(self._entries(path), place)

    def _refuse_indirection(self, event: yaml.Event) -> None:
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            raise Refused(self._place(event), f"alias *{short(str(anchor))}; recipes have no aliases: write it out")
        if anchor is not None:
            raise Refused(self._place(event), f"anchor &{short(anchor)}; recipes have no anchors: write it out")
        if tag is not None:
            raise Refused(self._place(event), f"tag {short(tag)}; recipes are data and have no tags: remove it")

    def _items(self, path: tuple[str, ...]) -> Iterator[Node]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self._node(event, (*path, "-"))

    def _entries(self, path: tuple[str, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            self._refuse_indirection(event)
            place = self._place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise Refused(place, "a list or section stands where a key should; write key: value")
            if event.value == "<<" and event.style is None:
                raise Refused(place, "merge key <<; recipes have none: inherit with base: other.yaml")
            key = event.value
            if key in entries:
                dotted = short(".".join((*path, key)))
                self.problems.append(Problem(place, f"{dotted}: given twice, first on line {entries[key].place.line}"))
            entries[key] = self._node(next(self.events), (*path, key), place)
        return entries
