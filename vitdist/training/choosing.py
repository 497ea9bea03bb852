"""Evaluations during training, and what follows from them: the learning rate, the best checkpoint, stopping early."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from vitdist.data.loading.batch import Batch
from vitdist.evaluation.evaluate import Evaluated, evaluate
from vitdist.training.assemble import direction_of, evaluation_batches, level_weights_of
from vitdist.training.datasets import Selection
from vitdist.training.job import Job

log = logging.getLogger(__name__)


def measure(job: Job, selection: Selection) -> Evaluated:
    """Evaluate a selection with the weights to use (the average where there is one). Collective."""
    loader = evaluation_batches(
        selection,
        job.preprocessing,
        job.recipe.evaluation.batch_size,
        rank=job.engine.rank,
        world=job.engine.world,
        pin_memory=job.engine.device.type == "cuda",
        num_workers=job.num_workers,
    )
    weights = contextlib.nullcontext() if job.ema is None else job.ema.applied(job.model)
    job.joined.release()
    with weights:
        found = evaluate(
            job.engine,
            job.joined.evaluated,
            _watched(job, loader),
            job.datasets.targets,
            mean=job.preprocessing.mean,
            std=job.preprocessing.std,
            num_levels=job.datasets.tree.num_levels,
            blank=job.preprocessing.image_size if job.joined.forward_is_collective else None,
        )
        job.joined.release()
    return found


def _watched(job: Job, loader: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch of an evaluation is a sign of life."""
    for batch in loader:
        job.at("evaluation")
        yield batch
    job.at("evaluated")


def evaluate_and_choose(job: Job) -> tuple[bool, bool]:
    """Measure what chooses, and act on it: (a new best, time to stop early). Collective, and the same on every rank."""
    assert job.datasets.val is not None
    result = measure(job, job.datasets.val)
    metrics = metrics_of(job, result)
    job.state.evaluated_step = job.state.step
    expected = job.datasets.val.num_samples
    if len(result.table) < expected:
        log.warning("evaluated %d of %d: %s", len(result.table), expected, "; ".join(result.damages[:3]))
    job.journal.evaluation({"step": job.state.step, "epoch": _epoch(job), **metrics, "val/expected": expected})
    monitor = job.recipe.lr_scheduler.monitor
    if job.schedule.observe(_value(job, metrics, monitor)):
        log.info("%s has stopped improving: learning rate cut to %g", monitor, job.schedule.lr(job.state.step))
    return _is_best(job, metrics), _is_over(job, metrics)


def metrics_of(job: Job, result: Evaluated) -> dict[str, Any]:
    """The evaluation's line of metrics.jsonl: accuracies are ratios of integers."""
    accuracies = {
        f"val/accuracy/{level}": result.accuracy(index) for index, level in enumerate(job.datasets.tree.levels)
    }
    loss = result.loss(level_weights_of(job.recipe, job.datasets.tree))
    return {"val/loss": loss, **accuracies, "val/count": len(result.table)}


def _epoch(job: Job) -> int:
    return max(0, job.state.step - 1) // job.plan.steps_per_epoch


def _value(job: Job, metrics: dict[str, Any], monitor: str) -> float:
    """The monitored number; `val/accuracy` alone means the finest level."""
    name = f"val/accuracy/{job.datasets.tree.levels[-1]}" if monitor == "val/accuracy" else monitor
    return float(metrics[name])


def _is_best(job: Job, metrics: dict[str, Any]) -> bool:
    """Whether this evaluation is the best so far; ties keep the earlier."""
    monitor = job.recipe.checkpoint.monitor
    if monitor is None:
        return False
    value, state = _value(job, metrics, monitor), job.state
    sign = -1.0 if direction_of(monitor) == "min" else 1.0
    state.values[str(state.step)] = sign * value
    if state.best_value is not None and sign * value <= sign * state.best_value:
        return False
    state.best_value, state.best_step = value, state.step
    return True


def _is_over(job: Job, metrics: dict[str, Any]) -> bool:
    """Whether early stopping's patience is at its end."""
    wish, state = job.recipe.early_stopping, job.state
    if wish.patience is None:
        return False
    value = _value(job, metrics, wish.monitor)
    sign = -1.0 if direction_of(wish.monitor) == "min" else 1.0
    if state.stopping_value is None or sign * (value - state.stopping_value) > wish.min_delta:
        state.stopping_value, state.stopping_count = value, 0
    else:
        state.stopping_count += 1
    return state.stopping_count >= wish.patience
