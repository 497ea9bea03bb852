"""The shipped recipes, the schema editors read, and the commands; none of it imports torch or takes a second."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vitdist.errors import UsageError, VitdistError
from vitdist.recipe import load_recipe, parse_recipe
from vitdist.recipe.commands import register, shipped_recipes
from vitdist.recipe.json_schema import SCHEMA_FILE, schema_text

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = {"demo", "cub_hier", "cub_seed", "vit_scratch", "cub25_dinov2s"}


def run(*args: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    parsed = parser.parse_args(["recipe", *args])
    code: int = parsed.function(parsed)
    return code


def test_all_are_shipped() -> None:
    assert set(shipped_recipes()) >= NAMES
    assert sorted(shipped_recipes().values()) == RECIPES


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_load_and_round_trip(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert parse_recipe(recipe.to_yaml(), "other.yaml") == recipe
    load_recipe(file, ["evaluation.protocol=refit"] if recipe.lr_scheduler.name != "plateau" else [])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_open_with_what_they_are(file: Path) -> None:
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert schema != first and (file.parent / schema).resolve() == SCHEMA_FILE.resolve()
    opening = "\n".join(line for line in rest if line.startswith("#"))
    assert f"launch/train.py recipes/{file.name}" in opening and "Time and result:" in opening


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_yaml_1_1_reader_sees_no_duplicate_meaning(file: Path) -> None:
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["name"] == file.stem


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "vitdist recipe schema > vitdist/recipe/recipe.schema.json"
    )


def test_the_schema_names_keys_units_and_ranges() -> None:
    schema = json.loads(schema_text())
    optimizer = schema["$defs"]["Optimizer"]
    assert optimizer["additionalProperties"] is False
    assert optimizer["properties"]["lr"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["Train"]["properties"]["global_batch_size"]["unit"] == "samples"
    assert schema["$defs"]["Checkpoint"]["properties"]["every"]["default"] == ["1ep", "30min"]
    assert "base" in schema["properties"] and "required" not in schema
    assert "path" in schema["$defs"]["Data"]["properties"]


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("data: {path: x}\noptimizer: {lrr: 1}\nseed: x\n")
    assert run("validate", str(RECIPES[0]), str(wrong)) == 2
    out, err = capsys.readouterr()
    assert out == f"{RECIPES[0]}: fine\n"
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{wrong}:2", f"{wrong}:3"]
    assert run("validate", "demo", "seed=3") == 0
    assert run("validate", "demo", "seed=x") == 2
    with pytest.raises(VitdistError, match="no recipe given"):
        run("validate", "seed=3")


def test_show_is_a_recipe_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "demo", "seed=3") == 0
    text = capsys.readouterr().out
    assert parse_recipe(text, "shown.yaml") == load_recipe(ROOT / "recipes/demo.yaml", ["seed=3"])
    (line,) = (line for line in text.splitlines() if line.startswith("seed:"))
    assert line.split() == ["seed:", "3", "#", "command", "line"]


def test_list_and_copy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("list") == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(shipped_recipes())
    assert run("copy", "demo", str(tmp_path)) == 0
    copy = tmp_path / "demo.yaml"
    assert load_recipe(copy) == load_recipe(ROOT / "recipes/demo.yaml")
    assert copy.read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    with pytest.raises(UsageError, match="is there already"):
        run("copy", "demo", str(tmp_path))
    with pytest.raises(UsageError, match="did you mean demo"):
        run("copy", "dmeo", str(tmp_path))


PROGRAM = """
import argparse, sys
from vitdist.recipe.commands import register
parser = argparse.ArgumentParser()
register(parser.add_subparsers())
args = parser.parse_args()
code = args.function(args)
heavy = {"torch", "numpy", "timm", "accelerate", "PIL"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("command", ["validate", "show"])
def test_commands_take_less_than_a_second_and_no_torch(command: str) -> None:
    times = []
    for _ in range(2):  # the first may compile bytecode
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", PROGRAM, "recipe", command, "demo"], cwd=ROOT, capture_output=True,
                              text=True, timeout=60)  # fmt: skip
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1


def _vitdist(*args: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "vitdist", "recipe", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    return done, time.perf_counter() - start


def test_the_command_line_answers_within_a_second_with_exit_code_2() -> None:
    runs = [_vitdist("validate", "recipes/demo.yaml", "optimizer.lerning_rate=1") for _ in range(2)]
    done = runs[0][0]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "command line: optimizer.lerning_rate: unknown key; did you mean lr?\n"
    assert min(seconds for _, seconds in runs) < 1
    assert _vitdist("validate", "recipes/demo.yaml")[0].stdout == "recipes/demo.yaml: fine\n"
