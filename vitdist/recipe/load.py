"""From a file and a command line to a Recipe, or to all that is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitdist.errors import RecipeError
from vitdist.recipe.fields import VALUES, extra, is_section, takes_text, walk
from vitdist.recipe.messages import find, place_of, problems_of
from vitdist.recipe.overrides import apply_overrides
from vitdist.recipe.problems import Place, Problem, ordered, short
from vitdist.recipe.rules import conflicts
from vitdist.recipe.schema import Recipe, flatten
from vitdist.recipe.yaml_lines import Items, Mapping, Node, Refused, Scalar, parse_yaml, resolve, value_of

MAX_BYTES = 256 * 1024  # recipes have 2 KB; PyYAML reads about 300 KB a second
NOT_INHERITED = ("name", "out")  # or a recipe made from another would write into its run folder

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECTIONS = [name for name, info in Recipe.model_fields.items() if is_section(info.annotation)]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; RecipeError holds every mistake in it, its base and the overrides."""
    try:
        return parse_recipe(read_text(Path(path), Place(str(path))), str(path), overrides)
    except Refused as refused:
        raise RecipeError([str(refused.problem)]) from None


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """The same from text; `file` names it in messages, and its folder is where `base` starts from."""
    try:
        root, problems = _assemble(text, file)
    except Refused as refused:
        raise RecipeError([str(refused.problem)]) from None
    problems += apply_overrides(root, overrides)
    problems += _prepare(root)
    recipe, more = _check(root, Path(file).stem)
    problems += more
    if recipe is None or problems:
        raise RecipeError(ordered(problems))
    recipe._sources.update(_places(root))
    return recipe


def read_text(path: Path, place: Place) -> str:
    """The text of a recipe file; Refused when there is none or it is no plain text."""
    try:
        if not path.is_file():
            found = "is no file" if path.exists() else "no such file"
            raise Refused(place, f"{found}; `vitdist recipe list` shows what is shipped")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise Refused(place, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_BYTES:
        raise Refused(place, f"has more than {MAX_BYTES // 1024} KiB; that is no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Refused(Place(place.file, line), "is not UTF-8; save the file as UTF-8") from None


def _assemble(text: str, file: str) -> tuple[Mapping, list[Problem]]:
    """The tree of a recipe laid over that of its base."""
    root, problems = _sections(text, file)
    written = root.entries.pop("base", None)
    if written is None:
        return root, problems
    if not isinstance(written, Scalar) or not written.text:
        return root, [*problems, Problem(written.place, "base: must be the path of a recipe")]
    expanded, fault = expand(written.text)
    if fault:
        return root, [*problems, Problem(written.place, f"base: {fault}")]
    path = Path(file).parent / expanded
    below, more = _sections(read_text(path, Place(f"{written.place}: base: {short(str(path), 200)}")), str(path))
    again = below.entries.pop("base", None)
    if again is not None:
        more.append(Problem(again.place, "base: a base has no base of its own; name that recipe directly"))
    for name in NOT_INHERITED:
        below.entries.pop(name, None)
    return _over(below, root, ()), [*problems, *more]


def _sections(text: str, file: str) -> tuple[Mapping, list[Problem]]:
    root, problems = parse_yaml(text, file)
    if not isinstance(root, Mapping):
        raise Refused(root.place, "holds no keys; a recipe is lines of `key: value`")
    for name in (*_SECTIONS, "data.val"):
        path = name.split(".")
        parent = find(root, path[:-1])
        node = find(root, path)
        if isinstance(parent, Mapping) and isinstance(node, Scalar) and value_of(node) is None:
            parent.entries[path[-1]] = Mapping({}, node.place)  # a section all of whose keys are commented out
    return root, problems


def _over(below: Mapping, above: Mapping, path: tuple[str, ...]) -> Mapping:
    """The upper mapping's values over the lower one's, section by section."""
    entries: dict[str, Node] = dict(below.entries)
    for name, node in above.entries.items():
        old = entries.get(name)
        merge = isinstance(old, Mapping) and isinstance(node, Mapping) and ".".join((*path, name)) not in VALUES
        entries[name] = _over(old, node, (*path, name)) if merge else node  # type: ignore[arg-type]
    return Mapping(entries, above.place)


def expand(text: str) -> tuple[str, str | None]:
    """A path with `${NAME}` and a leading `~/` replaced, and what stands in the way of it."""
    for name in _VARIABLE.findall(text):
        if not os.environ.get(name):
            return text, f"${{{name}}} is not set in the environment; set it, or write the path"
        if "${" in os.environ[name]:
            return text, f"${{{name}}} itself holds ${{...}} in the environment; set it to a plain path"
    if "${" in _VARIABLE.sub("", text):
        return text, f"'{short(text)}' has a ${{ that names no variable; write ${{NAME}}"
    expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], text)
    return (os.path.expanduser(expanded) if expanded.startswith("~/") else expanded), None


def _prepare(root: Mapping) -> list[Problem]:
    """Take free text as written and expand paths, in place."""
    problems: list[Problem] = []
    for dotted, info in walk(Recipe):
        path = dotted.split(".")
        node, parent = find(root, path), find(root, path[:-1])
        if not takes_text(info) or node is None or not isinstance(parent, Mapping):
            continue
        if isinstance(node, Items):
            node = Items([_as_text(item) for item in node.items], node.place)
        elif isinstance(node, Scalar):
            node, fault = _text(node, bool(extra(info, "path")))
            problems += [Problem(node.place, f"{dotted}: {fault}")] if fault else []
        parent.entries[path[-1]] = node
    return problems


def _as_text(node: Node) -> Node:
    """A plain scalar as the characters it is, unless it is null."""
    return Scalar(node.text, False, node.place) if isinstance(node, Scalar) and resolve(node.text) is not None else node


def _text(node: Scalar, is_path: bool) -> tuple[Scalar, str | None]:
    if node.plain and resolve(node.text) is None:
        return node, None
    if is_path:
        text, fault = expand(node.text)
        return Scalar(text, False, node.place), fault
    fault = "${...} is expanded in paths only; write the text" if "${" in node.text else None
    return Scalar(node.text, False, node.place), fault


def _check(root: Mapping, stem: str) -> tuple[Recipe | None, list[Problem]]:
    """Validate single values, then, with the wrong ones at their defaults, how they go together."""
    data = {"name": stem, "data": {}, **value_of(root)}
    try:
        recipe = Recipe.model_validate(data)
        wrong: list[tuple[tuple[str, ...], Problem]] = []
    except ValidationError as error:
        wrong = list(problems_of(error.errors(include_url=False), root))
        pruned = _without(data, [path for path, _ in wrong])
        try:
            recipe = Recipe.model_validate(pruned)
        except ValidationError:
            return None, [problem for _, problem in wrong]
    names = {".".join(path) for path, _ in wrong}
    return recipe, [problem for _, problem in wrong] + list(_contradictions(recipe, root, names))


def _without(data: dict[str, Any], paths: Sequence[Sequence[str]]) -> dict[str, Any]:
    for *above, name in paths:
        at: Any = data
        for part in above:
            at = at.get(part) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at.pop(name, None)
    if isinstance(data.setdefault("data", {}), dict):
        data["data"].setdefault("path", "missing")  # so that the rules can look at the rest
    return data


def _contradictions(recipe: Recipe, root: Mapping, wrong: set[str]) -> Iterator[Problem]:
    for conflict in conflicts(recipe):
        if any(key in wrong or key.partition(".")[0] in wrong for key in conflict.keys):
            continue
        given = next((key for key in conflict.keys if find(root, key.split("."))), conflict.keys[0])
        yield Problem(place_of(root, given.split(".")), f"{conflict.keys[0]}: {conflict.text}")


def _places(root: Mapping) -> Iterator[tuple[str, str]]:
    for dotted in flatten(value_of(root)):
        node = find(root, dotted.split("."))
        if node is not None:
            yield dotted, str(node.place)
