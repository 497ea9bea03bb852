"""`optimizer.lr` for a reference batch: what it becomes, and where that is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launching
from tests.conftest import Recipes
from vitdist.cli import main
from vitdist.metrics_log import read_metrics
from vitdist.recipe import load_recipe
from vitdist.recipe.learning_rate import explained, peak_lr


@pytest.mark.parametrize(
    ("scaling", "reference", "peak", "text"),
    [
        ("none", None, 1e-3, "peak 0.001"),
        ("linear", 6, 4e-3, "peak 0.004 = 0.001 x 24/6 (linear)"),
        ("sqrt", 6, 2e-3, "peak 0.002 = 0.001 x sqrt(24/6)"),
        ("linear", 48, 5e-4, "peak 0.0005 = 0.001 x 24/48 (linear)"),
    ],
)
def test_the_rate_follows_the_batch(
    scaling: str, reference: int | None, peak: float, text: str, tiny_recipe: Recipes
) -> None:
    path = tiny_recipe(optimizer={"lr": 1e-3, "lr_scaling": scaling, "lr_batch_size": reference})
    recipe = load_recipe(path)
    assert peak_lr(recipe) == pytest.approx(peak, rel=1e-12) and explained(recipe) == text
    assert load_recipe(path).optimizer.lr == 1e-3, "what was written stays as it is: a resume must not scale again"


def test_training_uses_it_and_says_so(tiny_recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wish = {"lr": 1e-3, "lr_scaling": "sqrt", "lr_batch_size": 6, "layer_decay": 0.5}
    recipe = tiny_recipe(
        optimizer=wish, train__max_duration="4steps", lr_scheduler={"name": "constant", "warmup": "2steps"}
    )
    codes, output = launching.run(1, ["train", str(recipe), "out=run"], tmp_path)
    assert codes == [0] and "peak 0.002 = 0.001 x sqrt(24/6)" in output
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3])
    assert main(["recipe", "show", str(recipe)]) == 0
    assert "# the learning rate's peak 0.002 = 0.001 x sqrt(24/6)" in capsys.readouterr().out
    assert main(["plan", str(recipe)]) == 0
    assert "peak 0.002 = 0.001 x sqrt(24/6): step 1 0.001 · step 2 0.002" in capsys.readouterr().out
