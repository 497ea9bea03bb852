"""`launch/evaluate.py`: a checkpoint on a split, each sample exactly once, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitdist import logs
from vitdist.checkpoint import state as files
from vitdist.checkpoint.store import FOLDER, find_checkpoint, read_manifest
from vitdist.data.index import DatasetIndex
from vitdist.data.pixels.transforms import Preprocessing
from vitdist.errors import CheckpointError, UsageError
from vitdist.evaluation import results
from vitdist.evaluation.evaluate import Evaluated, evaluate
from vitdist.models.classifier import Classifier
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.runtime.agree import everywhere, on_main
from vitdist.runtime.engine import Engine, set_threads
from vitdist.runtime.ranks import discover
from vitdist.taxonomy import Taxonomy
from vitdist.training.assemble import build_model, evaluation_batches, num_workers_of
from vitdist.training.datasets import Datasets, Selection, check_alike, open_datasets
from vitdist.training.job import load_model

log = logging.getLogger(__name__)


def run(path: Path, *, split: str, out: Path | None, overrides: Sequence[str]) -> int:
    """Evaluate a run's best (else last) checkpoint, or the checkpoint given; writes evaluation/<split>.json."""
    ranks = discover()
    logs.start(None, ranks.rank)
    for key in (text.partition("=")[0] for text in overrides):
        if key.startswith("model.") or key == "data.image_size":  # most would fit no tensor, others be passed over
            raise UsageError(f"{key}: a checkpoint is evaluated as the model it is; leave this out")
    checkpoint = find_checkpoint(path)
    recipe = load_recipe(checkpoint / files.RECIPE, overrides)
    set_threads(ranks)
    engine = Engine(
        ranks,
        precision=recipe.train.precision,
        timeout_seconds=recipe.parallel.timeout.seconds,
        deterministic=recipe.train.deterministic,
        tf32=recipe.train.tf32,
    )
    # rank 0 says which, so that a checkpoint published meanwhile is not read by some ranks only
    checkpoint = Path(engine.from_main(str(checkpoint)))
    _evaluate(engine, recipe, checkpoint, split, out or _home(checkpoint))
    engine.close()
    return 0


def _home(checkpoint: Path) -> Path:
    """evaluation/ of the checkpoint's run; a checkpoint that lies alone gets it inside the working directory."""
    parent = checkpoint.resolve().parent
    return (parent.parent if parent.name == FOLDER else Path()) / results.FOLDER


@dataclass(frozen=True)
class _Prepared:
    """What an evaluation needs, the same on every rank."""

    tree: Taxonomy
    preprocessing: Preprocessing
    targets: np.ndarray
    selection: Selection
    model: Classifier
    index: DatasetIndex


def _prepare(recipe: Recipe, checkpoint: Path, split: str, device: torch.device) -> _Prepared:
    tree = Taxonomy.from_json(files.read_json(checkpoint / files.TAXONOMY))
    preprocessing = Preprocessing.from_json(files.read_json(checkpoint / files.PREPROCESSING))
    datasets = open_datasets(recipe)
    _check_tree(datasets.tree, tree, checkpoint, recipe.data.path)
    selection = _select(split, datasets)
    model = build_model(recipe, tree, weights="none").to(device)
    load_model(model, checkpoint, tree.to_json())
    return _Prepared(tree, preprocessing, tree.targets_from(datasets.index.taxonomy), selection, model, datasets.index)


def _evaluate(engine: Engine, recipe: Recipe, checkpoint: Path, split: str, out: Path) -> None:
    """Collective."""
    ready = everywhere(engine, lambda: _prepare(recipe, checkpoint, split, engine.device))
    check_alike(engine, ready.index)
    loader = evaluation_batches(
        ready.selection,
        ready.preprocessing,
        recipe.evaluation.batch_size,
        rank=engine.rank,
        world=engine.world,
        pin_memory=engine.device.type == "cuda",
        num_workers=num_workers_of(recipe, engine.ranks.local_world),
    )
    result = evaluate(
        engine,
        ready.model,
        loader,
        ready.targets,
        mean=ready.preprocessing.mean,
        std=ready.preprocessing.std,
        num_levels=ready.tree.num_levels,
    )
    on_main(engine, lambda: _write(ready, result, recipe, checkpoint, split, out))


def _write(ready: _Prepared, result: Evaluated, recipe: Recipe, checkpoint: Path, split: str, out: Path) -> None:
    manifest = read_manifest(checkpoint)
    found = results.write(
        out,
        result,
        ready.tree,
        split=split,
        expected=ready.selection.num_samples,
        weights=str(manifest.get("weights", "raw")),
        step=manifest["step"],
        protocol=recipe.evaluation.protocol,
        seed=recipe.seed,
        split_hash=ready.selection.describe()["sha256"],
        data_path=recipe.data.path,
    )
    log.info("%s", results.headline(found))
    log.info("written to %s", out / f"{split}.json")


def _check_tree(found: Taxonomy, wanted: Taxonomy, checkpoint: Path, data_path: str) -> None:
    """CheckpointError when nothing of what the data shows is what the checkpoint predicts."""
    if found.levels != wanted.levels or found.names != wanted.names:
        raise CheckpointError(
            f"{checkpoint} predicts {'/'.join(map(str, wanted.num_classes))} classes of {', '.join(wanted.levels)}; "
            f"{data_path} has another class tree ({'/'.join(map(str, found.num_classes))} of {', '.join(found.levels)})"
        )


def _select(split: str, datasets: Datasets) -> Selection:
    if split == "val":
        if datasets.val is None:
            raise UsageError("this run trained on all of train (protocol refit): it has no val; use --split test")
        return datasets.val
    if split == "train":
        return datasets.train
    found = datasets.test(split)
    found.split.check_shards()
    return found
