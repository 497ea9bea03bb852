"""From a recipe and a number of ranks to batches, steps, learning rates and bytes read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitdist.data.plan import TrainPlan, num_steps
from vitdist.recipe.batch import BatchSplit, micro_batch_sizes
from vitdist.recipe.schema import Recipe
from vitdist.sizing.source import Source
from vitdist.training.assemble import build_schedule_of

MAX_READ = 5_000_000  # samples whose bytes are added up one by one


@dataclass(frozen=True)
class Steps:
    """How long a run is, in global batches."""

    num_train: int
    num_val: int
    per_epoch: int
    total: int
    left_out: int  # samples of an epoch that fill no batch
    evaluate_every: int
    save_every: tuple[int, ...]  # those by the clock are not in it


def steps_of(recipe: Recipe, source: Source) -> Steps:
    """The arithmetic that training itself uses."""
    assert source.train is not None
    size = recipe.train.global_batch_size
    per_epoch = num_steps(source.train, size)
    return Steps(
        num_train=source.train.num_samples,
        num_val=0 if source.val is None else source.val.num_samples,
        per_epoch=per_epoch,
        total=recipe.train.max_duration.steps(per_epoch),
        left_out=source.train.num_samples - per_epoch * size,
        evaluate_every=recipe.evaluation.every.steps(per_epoch),
        save_every=tuple(wish.steps(per_epoch) for wish in recipe.checkpoint.every if not wish.is_time),
    )


def rates(recipe: Recipe, steps: Steps) -> list[tuple[int, float]]:
    """(step, learning rate) at the first and last step, where the warm-up ends, and in between."""
    schedule = build_schedule_of(recipe, steps.per_epoch, steps.total)
    top = recipe.lr_scheduler.warmup.steps(steps.per_epoch)
    wanted = sorted({1, top, (top + steps.total) // 2, (top + 3 * steps.total) // 4, steps.total})
    return [(step, schedule.lr(step - 1)) for step in wanted if 1 <= step <= steps.total]


@dataclass(frozen=True)
class Reading:
    """What the node that reads most takes in an epoch: whole shards, and the photographs in them that it uses."""

    num_shards: int
    shard_bytes: int
    sample_bytes: int
    all_shards: int


def reading(plan: TrainPlan, source: Source, num_nodes: int) -> Reading | None:
    """Counted on the first epoch's real order; None where no set is there, or it is too large to count."""
    if source.datasets is None or plan.view.num_samples > MAX_READ or plan.global_batch_size % num_nodes:
        return None
    split = source.datasets.train.split
    share = plan.global_batch_size // num_nodes
    lengths, sizes = split.samples["length"], np.array([shard.bytes for shard in split.shards])
    found = []
    for node in range(num_nodes):
        slots = [plan.slots(p, node * share, (node + 1) * share).rows for p in range(plan.steps_per_epoch)]
        rows = np.concatenate(slots)
        shards = np.unique(np.searchsorted(split.shard_starts, rows, side="right") - 1)
        found.append(Reading(len(shards), int(sizes[shards].sum()), int(lengths[rows].sum()), len(sizes)))
    return max(found, key=lambda one: one.shard_bytes)


def candidates(recipe: Recipe, world: int) -> list[int]:
    """Micro-batches that divide a rank's share, largest first; even ones where pairs are mixed."""
    mixing = bool(recipe.augment.mixup or recipe.augment.cutmix)
    return micro_batch_sizes(recipe.train.global_batch_size, world, mixing=mixing)[::-1]


def with_micro_batch(recipe: Recipe, world: int, micro_batch_size: int) -> BatchSplit:
    return BatchSplit(micro_batch_size, recipe.train.global_batch_size // world // micro_batch_size)
