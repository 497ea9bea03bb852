"""What a recipe's data section stands for: the packed set, the tree to learn, the views that train and choose."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdist import taxonomy
from vitdist.data.index import DatasetIndex, Split
from vitdist.data.storage.cache import ShardCache
from vitdist.data.storage.remote_set import open_set
from vitdist.data.views import View, everything, validation_split
from vitdist.errors import DataError
from vitdist.recipe.schema import Recipe
from vitdist.recipe.sizes import num_bytes
from vitdist.runtime.agree import everywhere
from vitdist.runtime.engine import Engine
from vitdist.taxonomy import Taxonomy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """A view of one split, under the name its numbers are reported by (train, val, test)."""

    name: str
    split: Split
    view: View

    @property
    def num_samples(self) -> int:
        return self.view.num_samples

    def describe(self) -> dict[str, Any]:
        """What splits/<name>.json holds: the count, and a hash of the rows to compare two runs' splits by."""
        rows = self.view.rows(0, self.view.num_samples)
        digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        return {"name": self.name, "split": self.split.name, "samples": len(rows), "sha256": digest}


@dataclass(frozen=True)
class Datasets:
    """Everything a run reads. targets int32 [num_nodes of the packed tree, L] turns packed labels into classes."""

    index: DatasetIndex
    tree: Taxonomy
    targets: np.ndarray
    train: Selection
    val: Selection | None  # what chooses: None under refit, test itself under paper

    def test(self, split: str = "test") -> Selection:
        """A whole split, to evaluate on."""
        found = self.index.split(split)
        _check_labels(self.index.root, np.asarray(found.samples["label"]), len(self.targets))
        return Selection(split, found, everything(found.shard_starts))

    def train_labels(self) -> np.ndarray:
        """int32 [N]: the packed label of every row of the split that train is a view of."""
        return np.asarray(self.train.split.samples["label"])


def open_datasets(recipe: Recipe) -> Datasets:
    """Open the packed set of a recipe; DataError when it is missing, incomplete or lacks what the recipe asks for."""
    index = open_set(recipe.data.path, cache_of(recipe))
    tree = choose_tree(index, recipe.data.taxonomy, recipe.model.levels)
    targets = tree.targets_from(index.taxonomy)
    split = index.split("train")
    _check_shards(split, recipe.data.on_bad_sample == "skip")
    train, val = _views(recipe, index, split)
    labels = np.asarray(split.samples["label"])[train.view.rows(0, train.num_samples)]
    _check_labels(recipe.data.path, labels, len(targets))
    if (targets[labels] < 0).all(axis=1).any():
        raise DataError(f"{recipe.data.taxonomy} knows nothing of some classes of {recipe.data.path}; add them to it")
    return Datasets(index, tree, targets, train, val)


def check_alike(engine: Engine, index: DatasetIndex) -> None:
    """DataError where a rank has opened another set than rank 0: servers and nodes' disks may differ. Collective."""
    hashes = engine.gather_json(index.hash)

    def check() -> None:
        if index.hash != hashes[0]:
            raise DataError(
                f"rank {engine.rank}: {index.root} is another set ({index.hash[:12]}) than rank 0 reads "
                f"({hashes[0][:12]}); give all nodes the same, and start again"
            )

    everywhere(engine, check)


def _check_shards(split: Split, skip: bool) -> None:
    """A shard that is missing or of another size stops a run before its first step, or costs `skip` its samples."""
    try:
        split.check_shards()
    except DataError as error:
        if not skip:
            raise
        log.warning("%s; data.on_bad_sample is skip: what it lacks is replaced and counted", error)


def _check_labels(path: str | Path, labels: np.ndarray, num_nodes: int) -> None:
    """DataError when a table that somebody else wrote has labels that mean nothing."""
    if labels.size and not 0 <= labels.min() <= labels.max() < num_nodes:
        raise DataError(f"{path} has a label outside its class tree; vitdist data verify says in which table")


def cache_of(recipe: Recipe) -> ShardCache | None:
    """Where copies of remote shards are kept; None where the recipe names no folder."""
    wish = recipe.data
    if wish.cache_dir is None:
        return None
    return ShardCache(Path(wish.cache_dir), None if wish.cache_size is None else num_bytes(wish.cache_size))


def _views(recipe: Recipe, index: DatasetIndex, split: Split) -> tuple[Selection, Selection | None]:
    """(train, what chooses) under the recipe's protocol. A val split that was packed as one is taken as it is."""
    whole = Selection("train", split, everything(split.shard_starts))
    if recipe.evaluation.protocol == "refit":
        return whole, None
    if recipe.evaluation.protocol == "paper":
        test = index.split("test")
        return whole, Selection("val", test, everything(test.shard_starts))
    if "val" in index.splits:
        val = index.split("val")
        return whole, Selection("val", val, everything(val.shard_starts))
    wish = recipe.data.val
    train, held_out = validation_split(
        split.shard_starts,
        np.asarray(split.samples["label"]),
        np.asarray(split.samples["group"]) if wish.group and split.num_groups else None,
        fraction=wish.fraction,
        seed=wish.seed,
        fold=wish.fold or 0,
    )
    return Selection("train", split, train), Selection("val", split, held_out)


def choose_tree(index: DatasetIndex, csv_path: str | None, levels: tuple[str, ...] | list[str] | None) -> Taxonomy:
    """The tree to learn: the packed one, or that of a CSV; all its levels, or those that are named."""
    tree = index.taxonomy if csv_path is None else _tree_of(Path(csv_path), index.taxonomy)
    return tree.select(levels) if levels else tree


def _tree_of(path: Path, packed: Taxonomy) -> Taxonomy:
    """The tree of a CSV over the packed classes: columns named like packed levels, `class_name` the finest."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: list[Mapping[str, str]] = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"data.taxonomy {path} cannot be read: {error.strerror}") from None
    columns = list(rows[0]) if rows else []
    finest = packed.levels[-1]
    leaf = finest if finest in columns else "class_name"
    if leaf not in columns:
        raise DataError(f"data.taxonomy {path} has no column {finest!r} or 'class_name'; it has {', '.join(columns)}")
    coarse = [level for level in packed.levels[:-1] if level in columns]
    known = set(packed.names[-1])
    kept = [[*(row[c] or None for c in coarse), row[leaf]] for row in rows if row[leaf] in known]
    return taxonomy.build((*coarse, finest), kept)
