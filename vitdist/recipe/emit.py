"""Writing a recipe: plain block YAML that reads the same under YAML 1.1 and 1.2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from vitdist.recipe.fields import VALUES
from vitdist.recipe.yaml_lines import resolve

_BARE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+=-]*(?: [A-Za-z0-9_./@+=-]+)*")
_YAML_1_1: Any = yaml.SafeLoader("")
_TEXT_TAG = "tag:yaml.org,2002:str"


def emit(data: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The text of a recipe; `comments` are put behind the lines of their dotted keys."""
    lines = list(_lines(data, "", comments))
    width = max((len(line) for line, _ in lines), default=0) if comments else 0
    return "".join(f"{line:<{width}}  # {note}\n" if note else f"{line}\n" for line, note in lines)


def _lines(data: Mapping[str, Any], prefix: str, comments: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    indent = "  " * prefix.count(".")
    for name, value in data.items():
        dotted = prefix + name
        if isinstance(value, Mapping) and dotted not in VALUES:
            yield f"{indent}{word(name)}:", ""
            yield from _lines(value, dotted + ".", comments)
        else:
            yield f"{indent}{word(name)}: {inline(value)}", comments.get(dotted, "")


def inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{word(name)}: {inline(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, str):
        return word(value)
    return json.dumps(value)


def word(text: str) -> str:
    """Text as a scalar, quoted where any reader could take it for something else."""
    plain = _BARE.fullmatch(text) and isinstance(resolve(text), str)
    plain = plain and _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False)) == _TEXT_TAG
    return text if plain else json.dumps(text, ensure_ascii=False)
