"""The recipes that come along: in a checkout the repository's own, in a wheel the package's copy."""

from __future__ import annotations

import re
from pathlib import Path

from vitdist.errors import UsageError
from vitdist.recipe.json_schema import SCHEMA_FILE
from vitdist.recipe.suggest import nearest

_EDITOR_LINE = re.compile(r"\A# yaml-language-server: \$schema=.*$", re.MULTILINE)
_BASE = re.compile(r"^base: *([^\s#]+)", re.MULTILINE)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    package = Path(__file__).resolve().parents[1]
    repository = package.parent
    checkout = (repository / "recipes" / "demo.yaml").is_file()
    folder = repository / "recipes" if checkout else package / "_recipes"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """A recipe file by its path, or else a shipped one by name; the path as given where there is neither."""
    path = Path(text)
    return path if path.exists() else shipped_recipes().get(text.removesuffix(".yaml"), path)


def summary(file: Path) -> str:
    """What a recipe says about itself in its first line of comment."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and "yaml-language-server" not in line:
            return line[2:].strip()
    return ""


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a shipped recipe (and its base) to a file or folder; editors find the schema from there too."""
    shipped = shipped_recipes()
    name = name.removesuffix(".yaml")
    if name not in shipped:
        hint = nearest(name, shipped)
        better = f"did you mean {hint}?" if hint else f"there are {', '.join(shipped)}"
        raise UsageError(f"no shipped recipe is named {name}; {better}")
    source = shipped[name]
    to_folder = target.is_dir() or target.suffix not in (".yaml", ".yml")
    target = target / source.name if to_folder else target
    text = source.read_text(encoding="utf-8")
    base = _BASE.search(text)
    copies = {target: source, **({target.parent / base[1]: source.parent / base[1]} if base else {})}
    return [_copy(file, copy) for copy, file in copies.items()]


def _copy(source: Path, target: Path) -> Path:
    text = source.read_text(encoding="utf-8")
    text = _EDITOR_LINE.sub(lambda _: f"# yaml-language-server: $schema={SCHEMA_FILE}", text)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:  # the file, or one in the place of its folder
        raise UsageError(f"{error.filename} is there already; remove it or name another file") from None
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
    return target
