"""How two recipes differ, and which differences a resumed run may have."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vitdist.recipe.durations import Duration
from vitdist.recipe.schema import Recipe

MAY_CHANGE = (
    "out",  # where the run was found
    "train.max_time",
    "train.micro_batch_size",
    "train.max_rollbacks",  # what a run that ended with 5 may be given
    "data.path",  # with the same index hash
    "data.num_workers",
    "data.cache_dir",
    "data.cache_size",
    "evaluation.batch_size",
    "checkpoint.*",
    "tracking.*",
    "parallel.timeout",
)
MAY_GROW = ("train.max_duration",)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys whose values differ, in the recipe's order."""
    before, after = old.flat(), new.flat()
    return [key for key in after if before[key] != after[key]]


def frozen_differences(old: Recipe, new: Recipe, steps_per_epoch: int | None = None) -> list[str]:
    """The differing keys with which a run may not go on; epochs and steps compare only with `steps_per_epoch`."""
    return [
        key
        for key in differences(old, new)
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
        and not (key in MAY_GROW and _grows(old.train.max_duration, new.train.max_duration, steps_per_epoch))
    ]


def _grows(old: Duration, new: Duration, steps_per_epoch: int | None) -> bool:
    if old.unit == new.unit:
        return new.value >= old.value
    return steps_per_epoch is not None and new.steps(steps_per_epoch) >= old.steps(steps_per_epoch)
