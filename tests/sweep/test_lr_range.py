"""`vitdist sweep RECIPE --lr-range`: real steps at a rising rate, and what is read off them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from tests import launching
from tests.conftest import Recipes
from vitdist.cli import main
from vitdist.sweep.lr_range import Rising, Wish, judge


def test_rates_rise_exponentially_from_end_to_end() -> None:
    rule = Rising(Wish(51, 1e-6, 1e-1))
    rates = [rule.lr(step) for step in range(51)]
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(1e-1) and rates[10] == pytest.approx(1e-5)


def curve(turn: float) -> tuple[list[float], list[float]]:
    """Flat, falling fastest at 1e-3, then turning up at `turn`."""
    rates = [10 ** (-6 + 0.06 * step) for step in range(120)]
    losses = [5 - 3 / (1 + (1e-3 / rate) ** 2) + (20 * (rate / turn - 1) if rate > turn else 0) for rate in rates]
    return rates, losses


def test_the_steepest_and_the_diverging_rate_are_found() -> None:
    found = judge(*curve(0.1))
    assert found.steepest is not None and 6e-4 < found.steepest < 4e-3, "the running average lags a little"
    assert found.diverging is not None and 0.1 < found.diverging < 0.2
    assert judge(*curve(math.inf)).diverging is None
    rates, losses = curve(math.inf)
    losses[90] = math.nan
    assert judge(rates[:91], losses[:91]).diverging == rates[90]
    noise = np.random.default_rng(0).normal(0, 0.08, 120)
    noisy = judge(rates, [6 - 0.02 * step / 120 + noise[step] + max(0, step - 90) * 0.1 for step in range(120)])
    assert noisy.diverging is not None and 90 < rates.index(noisy.diverging) < 100, "noise alone is no turn"
    rising = judge(rates, [1 + step / 10 for step in range(120)])
    assert rising.steepest is None and rising.diverging is not None


def test_a_tiny_recipes_own_range(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(ema={"decay": 0.9}, optimizer={"lr": 1e-3, "layer_decay": 0.8}, data__num_workers=0)
    arguments = [
        "sweep",
        str(recipe),
        "--lr-range",
        "--steps",
        "60",
        "--lr-low",
        "1e-5",
        "--lr-high",
        "30",
        "--out",
        "found",
    ]
    codes, output = launching.run(1, arguments, tmp_path)
    assert codes == [0], output
    with (tmp_path / "found" / "lr_range.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates, losses = [float(row["lr"]) for row in rows], [float(row["loss"]) for row in rows]
    assert rates[:2] == pytest.approx([1e-5, 1e-5 * (3e6) ** (1 / 59)]) and len(rows) > 20
    assert math.log(200) < losses[0] < 3 * math.log(200), "three levels of untrained guesses"
    said = output.split("the loss falls fastest at ")[1]
    steepest, diverging = float(said.split(",")[0]), float(said.split("diverges at ")[1].split()[0])
    assert 1e-4 < steepest < diverging < 30
    page = (tmp_path / "found" / "lr_range.html").read_text()
    assert "<polyline" in page and "http" not in page and "falls fastest" in page
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["lr_range.csv", "lr_range.html"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.lr=1,2"], "leave out optimizer.lr=1,2"),
        (["--seeds", "2"], "leave out --seeds"),
        (["--steps", "3"], "wants 10 to"),
        (["--lr-low", "1"], "0 < --lr-low < --lr-high"),
        (["--lr-high", "nan"], "0 < --lr-low < --lr-high"),
    ],
)
def test_bad_numbers_are_a_line(
    arguments: list[str], words: str, tiny_recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(tiny_recipe()), "--lr-range", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err
