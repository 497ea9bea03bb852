"""What a plan knows of the data: the recipe's own index, or one drawn by numbers, or nothing but what it says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitdist import taxonomy
from vitdist.data.plan import TrainPlan, make_plan
from vitdist.data.views import View, everything
from vitdist.errors import DataError, UsageError
from vitdist.recipe.schema import Recipe
from vitdist.taxonomy import Taxonomy
from vitdist.training.assemble import check_monitors
from vitdist.training.datasets import Datasets, open_datasets

DRAWN_CLASSES = 200
MAX_DRAWN = 20_000_000  # a whole epoch is looked at, sample by sample


@dataclass(frozen=True)
class Source:
    """train and val are views; both None where nothing is known of the data. `note` says what is assumed."""

    tree: Taxonomy
    train: View | None
    val: View | None
    labels: np.ndarray  # of every row of the split that train is a view of
    datasets: Datasets | None
    note: str | None = None

    def plan(self, recipe: Recipe) -> TrainPlan:
        """A new plan, as each rank makes its own."""
        assert self.train is not None
        return make_plan(
            self.train,
            self.labels if recipe.data.sampling != "uniform" else np.empty(0, np.int32),
            sampling=recipe.data.sampling,
            global_batch_size=recipe.train.global_batch_size,
            seed=recipe.seed,
        )


def source_of(recipe: Recipe, num_samples: int | None, num_shards: int | None) -> Source:
    """The recipe's set, or `num_samples` in `num_shards` where those are given."""
    if num_samples is not None:
        return _drawn(num_samples, num_shards)
    try:
        datasets = open_datasets(recipe)
    except DataError as error:
        tree = taxonomy.cub()
        tree = tree.select(recipe.model.levels) if recipe.model.levels else tree
        note = (
            f"{error}; steps, reading and order are left out (or give --samples N), the head is counted for CUB's tree"
        )
        return Source(tree, None, None, np.empty(0, np.int32), None, note)
    check_monitors(recipe, datasets.tree)
    val = None if datasets.val is None else datasets.val.view
    return Source(datasets.tree, datasets.train.view, val, datasets.train_labels(), datasets)


def _drawn(num_samples: int, num_shards: int | None) -> Source:
    num_shards = num_shards or max(1, min(num_samples, num_samples // 1000))
    if not 0 < num_shards <= num_samples <= MAX_DRAWN:
        raise UsageError(
            f"--samples {num_samples} --shards {num_shards}: give 1 to {MAX_DRAWN:,} samples in at most as many shards"
        )
    view = everything(np.arange(num_shards + 1, dtype=np.int64) * num_samples // num_shards)
    note = (
        f"{num_samples:,} samples in {num_shards:,} shards as given, none held back; the head is counted for CUB's tree"
    )
    return Source(taxonomy.cub(), view, None, np.arange(num_samples, dtype=np.int32) % DRAWN_CLASSES, None, note)
