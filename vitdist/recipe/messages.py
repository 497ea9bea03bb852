"""From what pydantic found to what the user reads: the value given, what is allowed, and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vitdist.recipe import durations
from vitdist.recipe.fields import Names, Section, choices, describe, is_section, options, section_of, walk
from vitdist.recipe.learning import MONITORS
from vitdist.recipe.problems import Place, Problem, short
from vitdist.recipe.schema import Recipe
from vitdist.recipe.suggest import meant_key, nearest
from vitdist.recipe.yaml_lines import Items, Mapping, Node, Scalar, resolve, value_of

KNOWN = [name for name, _ in walk(Recipe)]
RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
KINDS: tuple[tuple[type, str], ...] = (
    (bool, "is a truth value"), (int, "is a whole number"), (float, "is a decimal number"), (str, "is text"),
)  # fmt: skip
TRUTH = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "1": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "0": "false",
}
WORDS = {
    "off": "disabled", "no": "disabled", "false": "disabled", "on": "online", "true": "online",
    "16": "bf16", "32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32",
}  # fmt: skip

Find = Callable[[Sequence[str]], Node | None]


def problems_of(errors: Sequence[ErrorDetails], root: Mapping) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """The keys that are wrong and one problem for each, however many alternatives pydantic tried."""
    by_key: dict[tuple[str, ...], tuple[FieldInfo | None, list[ErrorDetails]]] = {}
    for error in errors:
        path, info = _locate(error["loc"])
        by_key.setdefault(path, (info, []))[1].append(error)
    for path, (info, tried) in by_key.items():
        text = _explain(max(tried, key=_weight), path, info, find(root, path))
        yield path, Problem(place_of(root, path), f"{short('.'.join(path), 100)}: {text}")


def _weight(error: ErrorDetails) -> int:
    """Of several alternatives that failed, the one that came furthest tells most."""
    return 2 if error["type"] in RANGE else 1 if error["type"] == "value_error" else 0


def _locate(location: Sequence[str | int]) -> tuple[tuple[str, ...], FieldInfo | None]:
    """The key an error belongs to: pydantic's location without indices and tried alternatives."""
    model: type[Section] = Recipe
    for depth, part in enumerate(location):
        info = model.model_fields.get(str(part))
        path = tuple(str(step) for step in location[: depth + 1])
        if info is None:
            return path, None
        if not is_section(info.annotation):
            inner = location[depth + 1 :]
            named = bool(inner) and dict in (getattr(option, "__origin__", None) for option in options(info.annotation))
            return (*path, str(inner[0])) if named else path, info
        model = section_of(info)
    return path, None


def find(root: Node, path: Sequence[str]) -> Node | None:
    """The node at a path, or None."""
    node: Node | None = root
    for part in path:
        node = node.entries.get(part) if isinstance(node, Mapping) else None
    return node


def place_of(root: Mapping, path: Sequence[str]) -> Place:
    """Where a key stands, or the nearest section around it."""
    for length in range(len(path), 0, -1):
        node = find(root, path[:length])
        if node is not None:
            return node.place
    return root.place


def given(node: Node | None) -> str:
    """A value as the user wrote it."""
    if isinstance(node, Items):
        return short(f"[{', '.join(given(item) for item in node.items)}]")
    if isinstance(node, Mapping):
        return "a section"
    if node is None or (node.plain and resolve(node.text) is None):
        return "null"
    return short(node.text) if not isinstance(value_of(node), str) else f"'{short(node.text)}'"


def _explain(error: ErrorDetails, path: tuple[str, ...], info: FieldInfo | None, node: Node | None) -> str:
    if error["type"] == "extra_forbidden":
        return unknown_key(path)
    if info is None:
        fields = _model_at(path).model_fields
        return f"{given(node)} is no section; allowed: the keys {', '.join(fields)}"
    if error["type"] == "missing" and node is None:
        return f"missing; allowed: {describe(info)}"
    text = f"{given(node)} {_fault(error, info, node)}; allowed: {describe(info)}"
    hint = _hint(info, node)
    return f"{text}; did you mean {hint}?" if hint else text


def _model_at(path: Sequence[str]) -> type[Section]:
    model: type[Section] = Recipe
    for part in path:
        model = section_of(model.model_fields[part])
    return model


def unknown_key(path: tuple[str, ...]) -> str:
    """The message for a key that does not exist."""
    *above, name = path
    siblings = [*_model_at(above).model_fields, *([] if above else ["base"])]
    hint = meant_key(".".join(above), name, siblings, KNOWN)
    return f"unknown key; did you mean {hint}?" if hint else f"unknown key; allowed: {', '.join(siblings)}"


def _fault(error: ErrorDetails, info: FieldInfo, node: Node | None) -> str:
    """What is wrong with a value, as the sentence that starts with it goes on."""
    if error["type"] in RANGE:
        return "is out of range" if error["type"] != "finite_number" else "is not finite"
    own = str(error.get("ctx", {}).get("error", ""))
    if own:
        return own
    if error["type"] in ("too_short", "too_long") or (isinstance(node, Items) and error["type"] == "missing"):
        return "has the wrong length"
    value = value_of(node) if isinstance(node, Scalar) else None
    if isinstance(value, str):
        return "is text" if not choices(info.annotation) and str not in options(info.annotation) else "is no choice"
    if isinstance(node, Items):
        return "does not fit"
    return next((text for kind, text in KINDS if isinstance(value, kind)), "does not fit")


def _hint(info: FieldInfo, node: Node | None) -> str | None:
    """What was probably meant by a value that is not allowed."""
    if not isinstance(node, Scalar):
        return None
    text, accepted, words = node.text, options(info.annotation), choices(info.annotation)
    units = next((note.units for note in _durations(info)), None)
    if units:
        meant = durations.meant(text, units)
        return meant if meant != text else None
    if bool in accepted:
        return TRUTH.get(text.lower()) or nearest(text, ["true", "false"])
    if words:
        return WORDS[text.lower()] if WORDS.get(text.lower()) in words else nearest(text, words)
    if Names in accepted:
        return f"[{short(text)}]"
    if MONITORS in describe(info):
        return nearest(text, ["val/loss", "val/accuracy"])
    return _number(node, int in accepted)


def _number(node: Scalar, whole: bool) -> str | None:
    """A number in quotes, or one with a point or an exponent where a whole one is wanted."""
    value = resolve(node.text)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not node.plain:
        return f"{node.text} without quotes"
    return str(int(value)) if whole and isinstance(value, float) and value.is_integer() else None


def _durations(info: FieldInfo) -> Iterator[durations.DurationOf]:
    """The duration notes of a key, also inside a union or a list."""
    waiting: list[Any] = [*info.metadata, *options(info.annotation)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, durations.DurationOf):
            yield item
        elif not isinstance(item, type):
            waiting += get_args(item)
