"""Writes a small run folder through the real writers, with predictions drawn by a seed: what a report is made from."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from vitdist.checkpoint.store import Store
from vitdist.data.index import DatasetIndex
from vitdist.evaluation.metrics import summary
from vitdist.evaluation.predictions import PredictionTable, from_logits
from vitdist.metrics_log import MetricsLog
from vitdist.recipe.load import parse_recipe
from vitdist.taxonomy import Taxonomy

EPOCHS, STEPS_PER_EPOCH = 12, 40


def make_run(
    path: Path, index: DatasetIndex, *, protocol: str = "val", seed: int = 0, skill: float = 3.0, **more: str
) -> Path:
    """A finished run with test evaluated; `skill` is how far the true class's logit stands out."""
    text = f"data:\n  path: {json.dumps(str(index.root))}\nevaluation:\n  protocol: {protocol}\n"
    overrides = [
        f"seed={seed}",
        f"name={path.name}",
        f"out={path}",
        *(f"{k.replace('__', '.')}={v}" for k, v in more.items()),
    ]
    path.mkdir(parents=True)
    recipe = parse_recipe(text, str(path / "recipe.yaml"), overrides)
    (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_metrics(path, index.taxonomy, validated=protocol != "refit", seed=seed)
    write_checkpoint(path, index.taxonomy)
    write_evaluation(path, index, draw_predictions(index, "test", seed=seed, skill=skill))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "versions": {"torch": "2.14.1"}, "git": None}))
    (path / "exit.json").write_text(json.dumps({"code": 0, "reason": "done", "step": EPOCHS * STEPS_PER_EPOCH}))
    return path


def write_metrics(path: Path, tree: Taxonomy, *, validated: bool, seed: int = 0) -> None:
    """A training's lines: a falling noisy loss, warm-up and cosine, an evaluation an epoch."""
    rng = np.random.default_rng(seed)
    log, steps = MetricsLog(path / "metrics.jsonl"), EPOCHS * STEPS_PER_EPOCH
    for step in range(1, steps + 1):
        done = step / steps
        loss = 0.4 + 4.8 * math.exp(-4 * done) + rng.normal() * 0.15
        rate = 3e-4 * min(1.0, step / 60) * 0.5 * (1 + math.cos(math.pi * done))
        speed = 400 + rng.normal() * 12
        line = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "train/loss": loss, "lr": rate}
        log.write({**line, "images_per_second": speed, "data_wait": 0.002})
        if validated and step % STEPS_PER_EPOCH == 0:
            shares = {f"val/accuracy/{n}": 1 - 0.9 * math.exp(-(5 - i) * done) for i, n in enumerate(tree.levels)}
            log.write({"step": step, "val/loss": 0.6 + 4.4 * math.exp(-4 * done), **shares, "val/count": 75})
    log.close()


def write_checkpoint(path: Path, tree: Taxonomy) -> None:
    """A published checkpoint that holds the class tree (and no weights: a report needs none)."""

    def write(stage: Path) -> dict[str, Any]:
        (stage / "taxonomy.json").write_text(json.dumps(tree.to_json()), encoding="utf-8")
        return {"weights": "ema"}

    Store(path).publish(EPOCHS * STEPS_PER_EPOCH, write, may=lambda: None)


def draw_predictions(index: DatasetIndex, split: str, *, seed: int = 0, skill: float = 3.0) -> PredictionTable:
    """Logits of noise with the true class raised, and half raised for its sisters, as a model confuses them."""
    tree, labels = index.taxonomy, np.asarray(index.split(split).samples["label"])
    targets = tree.paths[labels]
    rng = np.random.default_rng(seed)
    logits = []
    for level, size in enumerate(tree.num_classes):
        scores = rng.normal(size=(len(labels), size)).astype(np.float32)
        if level:
            parents = np.array(tree.parents[level])
            scores += (parents[None] == targets[:, level - 1, None]) * skill * 0.6
        scores[np.arange(len(labels)), targets[:, level]] += skill
        logits.append(scores)
    return from_logits(np.arange(len(labels)), targets, logits)


def write_evaluation(path: Path, index: DatasetIndex, table: PredictionTable, split: str = "test", **more: Any) -> None:
    """evaluation/<split>.json, its predictions, and splits/<split>.json."""
    (path / "evaluation").mkdir(exist_ok=True)
    expected, step = index.split(split).num_samples, EPOCHS * STEPS_PER_EPOCH
    found = summary(table, index.taxonomy, split=split, expected=expected, weights="ema", step=step, **more)
    (path / "evaluation" / f"{split}.json").write_text(json.dumps(found, indent=1))
    table.save(path / "evaluation" / f"{split}.predictions.npz")
    (path / "splits").mkdir(exist_ok=True)
    digest = hashlib.sha256(np.arange(expected).astype("<i8").tobytes()).hexdigest()
    about = {"name": split, "split": split, "samples": expected, "sha256": digest}
    (path / "splits" / f"{split}.json").write_text(json.dumps(about))
