"""Every shipped recipe trains: two steps on tiny shards, with its own model, losses and augmentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launching, run_state
from vitdist.data.index import DatasetIndex
from vitdist.recipe.load import load_recipe
from vitdist.recipe.shipped import shipped_recipes

# what a tiny set on a CPU cannot give: the real data, its size, pretrained weights, minutes of time
SMALLER = [
    "model.weights=none", "model.head_init=random", "train.max_duration=2steps", "train.global_batch_size=4",
    "train.micro_batch_size=2", "lr_scheduler.warmup=1steps", "evaluation.every=2steps", "checkpoint.every=2steps",
    "evaluation.batch_size=64", "tracking.wandb=disabled", "checkpoint.keep_best=false",
]  # fmt: skip


def patch_of(backbone: str) -> int:
    return 14 if "patch14" in backbone else 16


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_trains_two_steps(name: str, tiny: DatasetIndex, tmp_path: Path) -> None:
    path = shipped_recipes()[name]
    recipe = load_recipe(path)
    smaller = [*SMALLER, f"data.path={tiny.root}", f"data.image_size={2 * patch_of(recipe.model.backbone)}"]
    codes, output = launching.run(1, ["train", str(path), "out=run", *smaller], tmp_path)
    assert codes == [0], output
    assert [step for step, _ in run_state.losses(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "evaluation" / "test.json").exists()
