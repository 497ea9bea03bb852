"""What must not depend on the number of ranks, workers or micro-batches (P1, P2, N2, R4, E1)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import launching
from tests.conftest import Recipes
from vitdist.data.index import DatasetIndex
from vitdist.metrics_log import read_metrics


def train(world: int, recipe: Path, out: str, cwd: Path, *overrides: str) -> Path:
    codes, output = launching.run(world, ["train", str(recipe), f"out={out}", *overrides], cwd)
    assert codes == [0] * world, output
    return cwd / out


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def used(run: Path) -> list[tuple[Any, ...]]:
    """What stood in every slot, by step and slot, whichever rank took it."""
    records = [json.loads(line) for file in (run / "samples").glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted((r["step"], r["epoch"], r["slot"], r["key"], r["seed"], r["partner"], r["mix"]) for r in records)


@pytest.mark.parametrize("class_weights", ["none", "sqrt"])
def test_one_and_two_ranks_agree_over_20_steps(class_weights: str, tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train={"max_duration": "20steps", "global_batch_size": 24},
        tracking={"log_samples": True},
        loss={"class_weights": class_weights, "l2": 1e-4},
    )
    one = train(1, recipe, "one", tmp_path)
    two = train(2, recipe, "two", tmp_path)
    four = train(1, recipe, "accumulated", tmp_path, "train.micro_batch_size=6", "data.num_workers=0")
    assert used(one) == used(two) == used(four)
    assert len(used(one)) == 20 * 24
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)
    assert len(set(losses(one))) == 20, "a loss that never changes would agree with anything"


def test_the_global_batches_are_the_same_for_any_ranks_and_workers(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(tracking={"log_samples": True}, train={"max_duration": "2ep", "global_batch_size": 24})
    reference = used(train(1, recipe, "w1", tmp_path, "data.num_workers=0"))
    for world, workers in [(2, 3), (3, 1), (4, 0)]:
        run = train(world, recipe, f"w{world}", tmp_path, f"data.num_workers={workers}")
        assert used(run) == reference
    for epoch in (0, 1):
        keys = [key for _, e, _, key, *_ in reference if e == epoch]
        assert len(keys) == len(set(keys)) == 320 // 24 * 24


def test_resumed_on_another_world_the_order_stays(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train={"max_duration": "28steps", "global_batch_size": 24},  # more than 20 after the change
        evaluation={"every": "28steps"},
        tracking={"log_samples": True},
    )
    whole = train(1, recipe, "whole", tmp_path)
    fault = {"VITDIST_FAULT": "kill:step=8,phase=step,attempt=1"}
    launching.run(2, ["train", str(recipe), "out=moved"], tmp_path, env=fault)
    moved = train(1, recipe, "moved", tmp_path)
    assert used(moved) == used(whole)
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)


def test_a_batch_that_does_not_divide_is_refused_once(tiny_recipe: Recipes, tmp_path: Path) -> None:
    codes, output = launching.run(2, ["train", str(tiny_recipe()), "train.global_batch_size=26"], tmp_path)
    assert codes == [2, 2]
    assert output.count("does not divide") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 7, 0), (2, 64, 2), (3, 1, 1), (4, 6000, 0)])
def test_evaluation_counts_each_sample_once(
    world: int, batch: int, workers: int, trained: Path, tmp_path: Path
) -> None:
    changes = [f"evaluation.batch_size={batch}", f"data.num_workers={workers}"]
    arguments = ["evaluate", str(trained), "--out", "found", *changes]
    codes, output = launching.run(world, arguments, tmp_path)
    assert codes == [0] * world, output
    found = json.loads((tmp_path / "found" / "test.json").read_text())
    reference = json.loads((trained / "evaluation" / "test.json").read_text())
    assert found["count"] == found["expected"] == 200
    assert found["near_ties"]["count"] == 0, "choose another seed: a near tie may fall either way"
    assert {n: v["correct"] for n, v in found["levels"].items()} == {
        n: v["correct"] for n, v in reference["levels"].items()
    }
    assert "200 of 200 evaluated" in output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run on one rank, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = request.getfixturevalue("tiny")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: trained\nseed: 3\ndata: {{path: {tiny.root}, image_size: 32, num_workers: 1}}\n"
        "model: {backbone: vit, weights: none, patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2, drop_path: 0}\n"
        "optimizer: {lr: 1e-3}\nlr_scheduler: {warmup: 2steps}\nema: {decay: 0.9}\n"
        "train: {max_duration: 12steps, global_batch_size: 24}\nevaluation: {every: 6steps}\n"
    )
    return train(1, recipe, "run", folder)


def test_a_damaged_test_sample_shows_beside_every_number(trained: Path, tiny: DatasetIndex, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny.root, copy)
    row = tiny.split("test").samples[17]
    with (copy / tiny.split("test").shards[int(row["shard"])].path).open("r+b") as file:
        file.seek(int(row["offset"]) + 5)
        file.write(b"\0\0\0")
    codes, output = launching.run(2, ["evaluate", str(trained), "--out", "found", f"data.path={copy}"], tmp_path)
    assert codes == [0, 0], output
    found = json.loads((tmp_path / "found" / "test.json").read_text())
    assert (found["count"], found["expected"]) == (199, 200)
    assert "199 of 200 evaluated" in output
    assert len(found["damaged"]) == 1 and "checksum" in found["damaged"][0]


def test_early_stopping_best_and_average_agree_on_all_ranks(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        ema={"decay": 0.9},
        early_stopping={"monitor": "val/loss", "patience": 2, "min_delta": 100.0},
        evaluation={"every": "2steps"},
    )
    run = train(3, recipe, "run", tmp_path)  # ranks that disagreed would wait for each other for ever
    assert len(losses(run)) == 6, "the first evaluation sets the mark, the next two do not reach it"
    best = json.loads((run / "evaluation" / "test.json").read_text())["step"]
    accuracies = {
        line["step"]: line["val/accuracy/species"]
        for line in read_metrics(run / "metrics.jsonl")
        if "val/count" in line
    }
    assert best == min(step for step, value in accuracies.items() if value == max(accuracies.values()))
