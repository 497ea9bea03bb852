"""`train.channels_last`: another layout in memory, the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launching, run_state
from tests.conftest import Recipes
from vitdist.metrics_log import read_metrics


def train(world: int, recipe: Path, folder: Path, out: str, *more: str, fault: str = "", code: int = 0) -> None:
    env = {"VITDIST_FAULT": fault} if fault else {}
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}", *more], folder, env=env)
    assert codes == [code] * world, output


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def test_channels_last_is_the_same_run_and_goes_on_as_one(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """Moments laid out otherwise than their kernels would be mixed up by a fused update after the resume."""
    recipe = tiny_recipe(
        model={"backbone": "test_convnext.r160_in1k", "weights": "none", "head": "linear"},
        data__num_workers=0, optimizer={"lr": 1e-3, "layer_decay": 1.0}, ema={"decay": 0.9},
        train={"max_duration": "8steps", "global_batch_size": 8}, evaluation={"every": "8steps"},
    )  # fmt: skip
    train(1, recipe, tmp_path, "plain")
    wish = "train.channels_last=true"
    train(1, recipe, tmp_path, "whole", wish)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    assert run_state.tensors(tmp_path / "whole") != run_state.tensors(tmp_path / "plain"), "other kernels, other bits"
    train(1, recipe, tmp_path, "cut", wish, fault="term:step=4,phase=step", code=75)
    train(1, recipe, tmp_path, "cut", wish)
    assert run_state.lines(tmp_path / "cut") == run_state.lines(tmp_path / "whole")
    assert run_state.tensors(tmp_path / "cut") == run_state.tensors(tmp_path / "whole")
