"""Killed with -9 and started again: nothing is lost but steps since the checkpoint, and nothing differs (R1, R2)."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import Recipes
from vitdist.checkpoint.store import Store

EVERY = 3  # steps between checkpoints of the tiny recipe
# (rank, phase, step): what a step passes, what a save passes, and what comes around them
PLACES = [
    (1, "data", 5),
    (0, "between-files", 6),
    (0, "before-publish", 9),
    (0, "before-pointer", 6),
    (0, "while-pruning", 6),
    (1, "evaluation", 6),
    (1, "resume", 0),
]
STEP_PHASES = ("step", "data", "forward", "backward", "optimizer", "report", "log")
SAVE_PHASES = (
    "between-files",
    "before-manifest",
    "before-publish",
    "before-pointer",
    "while-pruning",
    "snapshot",
    "saving",
)


def start(world: int, recipe: Path, folder: Path, out: str, fault: str = "") -> tuple[list[int], str]:
    env = {"VITDIST_FAULT": fault} if fault else {}
    return launching.run(world, ["train", str(recipe), f"out={out}"], folder, env=env)


def assert_same(cut: Path, whole: Path) -> None:
    assert run_state.losses(cut) == run_state.losses(whole)
    assert run_state.lines(cut) == run_state.lines(whole)
    assert run_state.tensors(cut) == run_state.tensors(whole)
    steps = [step for step, _ in run_state.losses(cut)]
    assert steps == list(range(1, len(steps) + 1)), "strictly increasing, none twice, none missing (R11)"


def resumed_from(output: str) -> int:
    found = re.findall(r"resumed from step (\d+)", output)
    return int(found[0]) if found else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def recipe_of(tiny_recipe: Recipes) -> Path:
    return tiny_recipe(ema={"decay": 0.9}, checkpoint={"every": f"{EVERY}steps", "keep_last": 1})


@pytest.mark.parametrize(("rank", "phase", "step"), PLACES)
def test_killed_at(rank: int, phase: str, step: int, whole: Path, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    if not (whole / "run").exists():
        codes, output = start(2, recipe, whole, "run")
        assert codes == [0, 0], output
    attempt = 1
    if phase == "resume":  # the first start must leave something to resume from
        start(2, recipe, tmp_path, "run", f"kill:rank=0,step=8,phase=step,attempt={attempt}")
        attempt = 2
    codes, output = start(2, recipe, tmp_path, "run", f"kill:rank={rank},step={step},phase={phase},attempt={attempt}")
    assert codes[rank] == -9, output
    assert codes[1 - rank] in (6, 0), output
    kept = [int(number) for number in re.findall(r"checkpoint of step (\d+) published", output)]
    codes, output = start(2, recipe, tmp_path, "run")
    assert codes == [0, 0], output
    assert resumed_from(output) >= max(kept, default=0)
    if phase in SAVE_PHASES:
        published = phase in ("before-pointer", "while-pruning")
        assert resumed_from(output) == (step if published else step - EVERY), "one interval is lost at most (R2)"
    assert_same(tmp_path / "run", whole / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_five_times_at_random(seed: int, tiny_recipe: Recipes, tmp_path: Path) -> None:
    """50 kills in all. Each start may be killed in any place of any rank, and later than the one before."""
    draw = random.Random(seed)
    world = draw.choice([1, 2, 3])
    recipe = recipe_of(tiny_recipe)
    codes, output = start(world, recipe, tmp_path, "whole")
    assert codes == [0] * world, output
    num_kills, said = 0, []
    while num_kills < 5:
        fault = draw_fault(draw, world, tmp_path / "run")
        codes, output = start(world, recipe, tmp_path, "run", fault)
        said.append((seed, world, fault, codes))
        print(said[-1])
        assert set(codes) <= {0, -9, 6}, (said, output)
        num_kills += -9 in codes
        if codes == [0] * world:  # it came through: the kills that are left meet a new run
            assert_same(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
    codes, output = start(world, recipe, tmp_path, "run")
    assert codes == [0] * world, (said, output)
    assert_same(tmp_path / "run", tmp_path / "whole")


def draw_fault(draw: random.Random, world: int, run: Path) -> str:
    """A place that the next start will pass, as far as can be foretold."""
    published = Store(run).published()
    newest = published[-1][0] if published else 0
    place = draw.choice([*STEP_PHASES, *SAVE_PHASES, "evaluation", "resume", "test"])
    if place == "test" or newest == 12:
        return f"kill:rank={draw.randrange(world)},phase=test"
    if place == "resume":
        return f"kill:rank={draw.randrange(world)},phase=resume"
    rank = 0 if place in SAVE_PHASES[:5] else draw.randrange(world)
    every = 6 if place == "evaluation" else EVERY if place in SAVE_PHASES else 1
    return f"kill:rank={rank},step={draw.choice(range(newest // every * every + every, 13, every))},phase={place}"
