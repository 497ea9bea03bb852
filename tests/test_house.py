"""House rules that a walk over the source can check: who imports whom, what may not be called, how long things get."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "vitdist"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"vitdist.data.{name}" for name in names)


OUTSIDE_DATA = ("vitdist.models", "vitdist.runtime", "vitdist.training")
# room -> what it must not import; a room is a module or package by its dotted name, the longest match decides
FORBIDDEN = {
    "vitdist.errors": ("vitdist", "torch"),
    "vitdist.recipe": ("torch", "numpy", "vitdist.data", "vitdist.models", "vitdist.runtime", "vitdist.training"),
    "vitdist.taxonomy": ("torch",),
    "vitdist.data.plan": ("torch",),
    "vitdist.data.views": ("torch",),
    "vitdist.data.index": ("torch",),
    "vitdist.data.sources": (*rooms("packing", "loading"), *OUTSIDE_DATA),
    "vitdist.data.packing": (*rooms("loading"), *OUTSIDE_DATA),
    "vitdist.data.storage": (*rooms("sources", "packing", "pixels", "loading"), *OUTSIDE_DATA),
    "vitdist.data.pixels": (*rooms("sources", "packing", "storage", "loading"), *OUTSIDE_DATA),
    "vitdist.data.loading": (*rooms("sources", "packing"), *OUTSIDE_DATA),
    "vitdist.checkpoint.store": ("torch",),
    "vitdist.data": OUTSIDE_DATA,
    "vitdist.models": ("vitdist.recipe", "vitdist.runtime", "vitdist.data", "vitdist.training", "accelerate"),
    "vitdist.losses": ("vitdist.recipe", "vitdist.runtime", "vitdist.data", "vitdist.training"),
    "vitdist.runtime": ("vitdist.data", "vitdist.models", "vitdist.training"),
}
ONLY = {
    "accelerate": ("vitdist.runtime.engine",),
    "deepspeed": ("vitdist.runtime.zero_setup",),
    "wandb": ("vitdist.tracking",),
    "webdataset": ("vitdist.data",),
}
ANYWHERE_FORBIDDEN = ("vitdist.cli", "launch", "pickle", "marshal", "shelve", "dill")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def wrong_imports(module: str, tree: ast.AST) -> list[str]:
    """What a module imports that its room may not."""
    rooms = [room for room in FORBIDDEN if within(module, room)]
    forbidden = {name for room in rooms for name in FORBIDDEN[room]}
    problems = []
    for name in imports(tree):
        own = any(within(name, room) for room in rooms)
        if any(within(name, other) for other in forbidden) and not own:
            problems.append(f"{module} imports {name}")
        for library, places in ONLY.items():
            if within(name, library) and not any(within(module, place) for place in places):
                problems.append(f"{module} imports {name}; only {', '.join(places)} may")
        alone = module in ("vitdist.__main__",) or module.startswith("launch")
        if any(within(name, other) for other in ANYWHERE_FORBIDDEN) and not alone:
            problems.append(f"{module} imports {name}")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_only_what_they_may(path: Path) -> None:
    assert wrong_imports(name_of(path), ast.parse(path.read_text())) == []


def test_the_walk_sees_a_wrong_import() -> None:
    assert wrong_imports("vitdist.models.heads", ast.parse("from vitdist.runtime.engine import Engine"))
    assert wrong_imports("vitdist.losses", ast.parse("import accelerate"))
    assert wrong_imports("vitdist.data.plan", ast.parse("import torch"))


DANGEROUS_NAMES = {"eval", "exec", "__import__", "compile"}
DANGEROUS_CALLS = {
    ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("torch", "load"), ("importlib", "import_module"), ("np", "fromfile"), ("numpy", "fromfile"),
}  # fmt: skip
DANGEROUS_METHODS = {"extract", "extractall"}


def dangers(tree: ast.AST) -> list[str]:
    """Calls by which somebody else's bytes could run here."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in DANGEROUS_NAMES:
            found.append(f"line {node.lineno}: {function.id}()")
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if (owner, function.attr) in DANGEROUS_CALLS or function.attr in DANGEROUS_METHODS:
                found.append(f"line {node.lineno}: {owner}.{function.attr}()")
        for keyword in node.keywords:
            true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in ("shell", "allow_pickle") and true:
                found.append(f"line {node.lineno}: {keyword.arg}=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_of_others_can_run(path: Path) -> None:
    assert dangers(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code", ["eval(x)", "os.system(x)", "torch.load(f)", "yaml.load(f)", "t.extractall()", "run(x, shell=True)"]
)
def test_the_walk_sees_dangers(code: str) -> None:
    assert dangers(ast.parse(code))


def test_functions_stay_short() -> None:
    lengths = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name_of(path)}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert statistics.median(lengths.values()) <= 15
    assert {name: length for name, length in lengths.items() if length > 62} == {}


def test_modules_stay_readable() -> None:
    assert {name_of(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 330} == {}
    assert [p for p in SOURCES if p.stem in ("utils", "helpers", "misc") or p.stem.endswith("_v2")] == []


def test_light_rooms_start_without_torch() -> None:
    code = (
        "import sys; import vitdist.cli, vitdist.recipe.load, vitdist.data.plan, vitdist.data.views, "
        "vitdist.data.index, vitdist.checkpoint.store, vitdist.taxonomy; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
