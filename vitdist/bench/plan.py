"""How long planning takes at a scale nobody packs for a test, and the memory it needs; no torch, no data."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np

from vitdist.data.plan import TrainPlan, make_plan
from vitdist.data.views import everything
from vitdist.errors import UsageError

SLOTS_A_RANK = 24
NUM_NEXT = 400


@dataclass(frozen=True)
class PlanFigures:
    """What one rank needs at one position: seconds for its first step from nothing, and for the steps after it."""

    rank: int
    position: int
    first_seconds: float
    next_mean: float
    next_longest: float
    memory: int  # bytes that this process has grown by so far


def measure_plan(num_samples: int, num_shards: int, world: int, *, ranks: list[int] | None = None) -> list[PlanFigures]:
    """A few ranks at the beginning, in the middle and at the end of an epoch, each from nothing."""
    if not 0 < num_shards <= num_samples or not 0 < SLOTS_A_RANK * world <= num_samples:
        raise UsageError(f"{num_samples} samples do not fill {num_shards} shards and {world} ranks of {SLOTS_A_RANK}")
    before = _peak_memory()
    starts = np.arange(num_shards + 1, dtype=np.int64) * num_samples // num_shards
    figures = []
    for rank in ranks or sorted({0, world // 3, world - 1}):
        for place in (0.0, 0.5, 1.0):
            started = time.perf_counter()
            plan = _plan(starts, world)
            position = int(place * (plan.steps_per_epoch - 1))
            _rank_slots(plan, position, rank)
            first = time.perf_counter() - started
            seconds = [_timed(plan, position + 1 + number, rank) for number in range(NUM_NEXT)]
            memory = _peak_memory() - before
            figures.append(PlanFigures(rank, position, first, sum(seconds) / len(seconds), max(seconds), memory))
    return figures


def _plan(starts: np.ndarray, world: int) -> TrainPlan:
    none = np.empty(0, np.int32)
    return make_plan(everything(starts), none, sampling="uniform", global_batch_size=SLOTS_A_RANK * world, seed=1)


def _rank_slots(plan: TrainPlan, position: int, rank: int) -> None:
    plan.slots(position, rank * SLOTS_A_RANK, (rank + 1) * SLOTS_A_RANK)


def _timed(plan: TrainPlan, position: int, rank: int) -> float:
    started = time.perf_counter()
    _rank_slots(plan, position, rank)
    return time.perf_counter() - started


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(figures: list[PlanFigures]) -> str:
    """For people."""
    lines = [f"{'rank':>6} {'position':>9} {'first step':>11} {'next, mean':>11} {'longest':>9} {'memory':>9}"]
    for found in figures:
        lines.append(
            f"{found.rank:>6} {found.position:>9} {found.first_seconds:>9.3f} s {1e3 * found.next_mean:>8.3f} ms "
            f"{1e3 * found.next_longest:>6.2f} ms {found.memory / 1e6:>6.0f} MB"
        )
    return "\n".join(lines)
