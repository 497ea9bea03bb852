"""What a recipe's input is made of, without building its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitdist.data.index import DatasetIndex, Split
from vitdist.data.pixels.transforms import Augment, Preprocessing
from vitdist.data.storage.remote_set import open_set
from vitdist.recipe.load import load_recipe
from vitdist.recipe.schema import Recipe
from vitdist.recipe.shipped import find_recipe
from vitdist.training.assemble import augment_of, image_size
from vitdist.training.datasets import cache_of


@dataclass(frozen=True)
class Inputs:
    """A recipe's training split and how its pictures are prepared; mean and deviation are the usual ones."""

    recipe: Recipe
    index: DatasetIndex
    split: Split
    preprocessing: Preprocessing
    augment: Augment


def inputs_of(name: str, overrides: Sequence[str]) -> Inputs:
    """Read a recipe and open its set."""
    recipe = load_recipe(find_recipe(name), list(overrides))
    index = open_set(recipe.data.path, cache_of(recipe))
    split = index.split("train")
    split.check_shards()
    preprocessing = Preprocessing(image_size(recipe), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Inputs(recipe, index, split, preprocessing, augment_of(recipe))
