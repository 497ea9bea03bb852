"""The learning rate a run really uses: `optimizer.lr`, scaled from its reference batch to the recipe's."""

from __future__ import annotations

from vitdist.recipe.schema import Recipe

EXPONENTS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


def peak_lr(recipe: Recipe) -> float:
    """`lr` x (global batch / reference batch), to the power of the rule.

    Linear: Goyal et al. 2017, for SGD. Square root: Krizhevsky 2014, and Malladi et al. 2022 for Adam.
    """
    wish = recipe.optimizer
    if wish.lr_scaling == "none" or wish.lr_batch_size is None:
        return wish.lr
    return wish.lr * (recipe.train.global_batch_size / wish.lr_batch_size) ** EXPONENTS[wish.lr_scaling]


def explained(recipe: Recipe) -> str:
    """The peak rate, with where it comes from where it was scaled."""
    wish, peak = recipe.optimizer, peak_lr(recipe)
    if wish.lr_scaling == "none":
        return f"peak {peak:.3g}"
    return f"peak {peak:.3g} = {wish.lr:.3g} x {scaling(recipe)}"


def scaling(recipe: Recipe) -> str:
    """The factor in figures, such as `128/64 (linear)` or `sqrt(128/64)`."""
    wish = recipe.optimizer
    ratio = f"{recipe.train.global_batch_size}/{wish.lr_batch_size}"
    return f"sqrt({ratio})" if wish.lr_scaling == "sqrt" else f"{ratio} (linear)"
