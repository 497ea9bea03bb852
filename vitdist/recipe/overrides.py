"""`key=value` on a command line: set into the recipe's tree, then checked like the rest of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitdist.recipe.fields import VALUES, walk
from vitdist.recipe.problems import COMMAND_LINE, Place, Problem, short
from vitdist.recipe.schema import Recipe
from vitdist.recipe.yaml_lines import Mapping, Node, Refused, Scalar, parse_yaml

HERE = Place(COMMAND_LINE)
LEAVES = {name for name, _ in walk(Recipe)} - VALUES
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def apply_overrides(root: Mapping, overrides: Sequence[str]) -> list[Problem]:
    """Change the tree in place, a later override over an earlier one; returns what cannot be read."""
    problems: list[Problem] = []
    for text in overrides:
        key, equals, written = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            example = f"{key}=VALUE" if _KEY.fullmatch(key) and "." in key else "optimizer.lr=1e-4"
            problems.append(Problem(HERE, f"'{short(text)}' sets no key; write key=value, such as {example}"))
        elif key == "base":
            problems.append(Problem(HERE, "base: stands in a recipe file only; write a recipe with base: and use that"))
        else:
            problems += _set(root, key, written.strip())
    return problems


def _set(root: Mapping, key: str, written: str) -> list[Problem]:
    try:
        node = _read(written)
    except Refused as refused:
        return [Problem(HERE, f"{key}: {refused.problem.text}")]
    if node is None:
        return [Problem(HERE, f"{key}: no value; write {key}=VALUE, or {key}=null where null is allowed")]
    *above, name = key.split(".")
    leaf = next((".".join(above[:end]) for end in range(1, len(above) + 1) if ".".join(above[:end]) in LEAVES), None)
    if leaf is not None:
        return [Problem(HERE, f"{key}: unknown key; {leaf} has no keys of its own; did you mean {leaf}?")]
    at = root
    for part in above:
        inner = at.entries.get(part)
        if not isinstance(inner, Mapping):  # absent, null or a value: a section takes its place
            inner = at.entries[part] = Mapping({}, HERE)
        at = inner
    old = at.entries.get(name)
    if isinstance(node, Mapping) and isinstance(old, Mapping) and key not in VALUES:
        old.entries.update(node.entries)
    else:
        at.entries[name] = node
    return []


def _read(written: str) -> Node | None:
    if not written:
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in written):
        raise Refused(HERE, "is not UTF-8")
    if written[0] not in "[{\"'":
        return Scalar(written, plain=True, place=HERE)
    node, problems = parse_yaml(written, COMMAND_LINE)
    if problems:
        raise Refused(HERE, problems[0].text)
    return node
