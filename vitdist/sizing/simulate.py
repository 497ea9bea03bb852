"""The plan's promises at any number of ranks, without the ranks: each one's own plan and schedule, held side by side.

What is looked at is what training uses: `TrainPlan`, the loader's `TrainSource` and `EvaluationSource`, the schedules.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vitdist.data.loading.places import EvaluationSource, Place, TrainSource
from vitdist.data.plan import TrainPlan, evaluation_span
from vitdist.data.views import View
from vitdist.recipe.batch import BatchSplit
from vitdist.schedules import Schedule

MakePlan = Callable[[], TrainPlan]
NUM_EPOCHS = 2
NUM_SOURCE_STEPS = 3  # through the loader's own source, which hands out sample by sample


@dataclass(frozen=True)
class Finding:
    """One promise: how much was looked at, and the first place where it does not hold."""

    promise: str
    scope: str
    fault: str | None = None


def train_order(make_plan: MakePlan, world: int, batch: BatchSplit, *, each_once: bool) -> list[Finding]:
    """Every rank's slots over two epochs, from plans of its own, against one plan's whole batches."""
    whole = make_plan()
    size, steps = whole.global_batch_size, whole.steps_per_epoch
    share = size // world
    scope = f"{NUM_EPOCHS} epochs of {steps:,} steps, {world:,} ranks"
    same, equal = None, None
    plans = [make_plan() for _ in range(world)]
    epochs: list[list[np.ndarray]] = [[] for _ in range(NUM_EPOCHS)]
    for position in range(NUM_EPOCHS * steps):
        parts = [plan.slots(position, rank * share, (rank + 1) * share) for rank, plan in enumerate(plans)]
        expected = whole.slots(position, 0, size)
        rows, seeds = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "seeds"))
        lengths = {len(part.rows) for part in parts}
        if lengths != {batch.micro_batch_size * batch.accumulation}:
            equal = equal or f"step {position + 1}: ranks hold {sorted(lengths)} samples"
        if not (np.array_equal(rows, expected.rows) and np.array_equal(seeds, expected.seeds)):
            same = same or f"step {position + 1} is another batch than one rank would see"
        epochs[position // steps].append(rows)
    findings = [Finding("equal batches on all ranks", scope, equal), Finding("the order of one rank", scope, same)]
    if each_once:
        findings.append(Finding("each sample at most once an epoch", scope, _repeated(epochs, whole.view)))
    return findings


def _repeated(epochs: list[list[np.ndarray]], view: View) -> str | None:
    members = view.rows(0, view.num_samples)
    for number, parts in enumerate(epochs):
        rows = np.concatenate(parts)
        times = np.unique(rows, return_counts=True)[1]
        if times.max() > 1:
            return f"epoch {number}: {int((times > 1).sum())} samples come more than once"
        if not np.isin(rows, members).all():
            return f"epoch {number}: {int((~np.isin(rows, members)).sum())} samples are not of the view"
    return None


def loader_order(make_plan: MakePlan, world: int, batch: BatchSplit) -> Finding:
    """The first steps, and some from a resume in mid-epoch on, as each rank's loader hands them out."""
    whole = make_plan()
    middle = whole.steps_per_epoch // 2
    scope = f"{2 * NUM_SOURCE_STEPS} steps through the loader, half of them after a resume"
    for start in (0, middle):
        places: list[Place] = []
        for rank in range(world):
            source = TrainSource(
                make_plan(), rank=rank, world=world, micro_batch_size=batch.micro_batch_size, start=start
            )
            for micro_batch in itertools.islice(source, NUM_SOURCE_STEPS * batch.accumulation):
                places += micro_batch
        found = [(place.position, place.slot, place.row, place.seed) for place in places]
        if sorted(found) != list(_planned(whole, start)):
            return Finding("loader and plan agree", scope, f"from step {start + 1} on they differ")
    return Finding("loader and plan agree", scope)


def _planned(plan: TrainPlan, start: int) -> Iterator[tuple[int, int, int, int]]:
    for position in range(start, start + NUM_SOURCE_STEPS):
        slots = plan.slots(position, 0, plan.global_batch_size)
        for slot, (row, seed) in enumerate(zip(slots.rows.tolist(), slots.seeds.tolist(), strict=True)):
            yield position, slot, row, seed


def mixing_pairs(global_batch_size: int, world: int, batch: BatchSplit) -> Finding:
    """Mixing pairs slots 2i and 2i + 1: no rank and no micro-batch may cut one."""
    share = global_batch_size // world
    cut = [first for first in range(0, global_batch_size, batch.micro_batch_size) if first % 2]
    fault = f"slot {cut[0]} begins a micro-batch in mid-pair" if cut or share % 2 else None
    return Finding("pairs of mixed slots stay together", f"{global_batch_size:,} slots", fault)


def evaluation_order(view: View, world: int, batch_size: int) -> Finding:
    """Every sample of a view exactly once over all ranks, in file order."""
    spans = [evaluation_span(view.num_samples, rank, world) for rank in range(world)]
    rows = [place.row for span in spans for batch in EvaluationSource(view, span, batch_size) for place in batch]
    scope = f"{view.num_samples:,} samples, {world:,} ranks"
    fault = None if rows == view.rows(0, view.num_samples).tolist() else "some are left out, repeated or out of order"
    return Finding("evaluation sees each sample once", scope, fault)


def schedules(make_schedule: Callable[[int], Schedule], world: int, num_steps: int, every: int) -> Finding:
    """Each rank's own schedule, fed the same metrics; half of the ranks are resumed from JSON on the way."""
    rng = np.random.default_rng(0)
    metrics = {step: float(rng.choice([1.0, 0.99, 0.5])) for step in range(every, num_steps + 1, every)}
    looked = sorted({*range(0, num_steps, max(1, num_steps // 500)), *metrics})
    traces = {rank: _trace(lambda rank=rank: make_schedule(rank), looked, metrics, resumed=rank % 2 > 0)  # type: ignore[misc]
              for rank in range(world)}  # fmt: skip
    strange = [rank for rank, trace in traces.items() if trace != traces[0]]
    fault = f"rank {strange[0]} has another learning rate than rank 0" if strange else None
    scope = f"{len(looked):,} points of {num_steps:,} steps, {len(metrics):,} evaluations, every second rank resumed"
    return Finding("one learning rate on all ranks", scope, fault)


def _trace(
    make: Callable[[], Schedule], steps: list[int], metrics: dict[int, float], *, resumed: bool
) -> list[tuple[float, bool]]:
    schedule, trace = make(), []
    for number, step in enumerate(steps):
        if resumed and number == len(steps) // 2:
            state = json.loads(json.dumps(schedule.state_dict()))
            schedule = make()
            schedule.load_state_dict(state)
        rate = schedule.lr(step)
        trace.append((rate, step in metrics and schedule.observe(metrics[step])))
    return trace
