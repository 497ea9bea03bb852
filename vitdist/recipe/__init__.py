"""Recipes: one YAML file says what a run is. Nothing in here imports torch, so that checking one takes no second."""

from vitdist.recipe.batch import BatchSplit, split_batch
from vitdist.recipe.changes import differences, frozen_differences
from vitdist.recipe.durations import Duration
from vitdist.recipe.load import load_recipe, parse_recipe
from vitdist.recipe.schema import Recipe

__all__ = [
    "BatchSplit",
    "Duration",
    "Recipe",
    "differences",
    "frozen_differences",
    "load_recipe",
    "parse_recipe",
    "split_batch",
]
