"""The same to the bit on a GPU too (N3): `pytest -m gpu`, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import launching, run_state
from tests.conftest import Recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]
ON_GPU = {"ACCELERATE_USE_CPU": "false"}


@pytest.fixture
def recipe(tiny_recipe: Recipes) -> Path:
    return tiny_recipe(
        train={"max_duration": "12steps", "global_batch_size": 24, "precision": "bf16", "deterministic": True},
        ema={"decay": 0.9},
        model__drop_path=0.1,
    )


def train(recipe: Path, out: str, *, world: int = 1, fault: str = "") -> list[int]:
    env = {**ON_GPU, **({"VITDIST_FAULT": fault} if fault else {})}
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}"], recipe.parent, env=env, timeout=250)
    assert "on cuda" in output, output
    return codes


def assert_same(folder: Path, first: str, second: str) -> None:
    assert run_state.lines(folder / first) == run_state.lines(folder / second)
    assert run_state.tensors(folder / first) == run_state.tensors(folder / second)


def test_two_runs_are_the_same(recipe: Path) -> None:
    assert train(recipe, "one") == train(recipe, "two") == [0]
    assert_same(recipe.parent, "one", "two")


@pytest.mark.parametrize("world", sorted({1, max(1, min(4, torch.cuda.device_count()))}))
def test_killed_and_resumed_is_the_same(world: int, recipe: Path) -> None:
    assert train(recipe, "whole", world=world) == [0] * world
    assert train(recipe, "cut", world=world, fault=f"kill:rank={world - 1},step=8,phase=backward")[world - 1] == -9
    assert train(recipe, "cut", world=world) == [0] * world
    assert_same(recipe.parent, "cut", "whole")
