"""From the plan to places: which samples a loader worker prepares, in micro-batches.

A worker takes every num_workers-th micro-batch of its rank, and torch's loader hands them over in turn, so the order of
batches is the plan's for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from vitdist.data.index import Split
from vitdist.data.loading.prefetch import prefetched, shards_of_plan, shards_of_span
from vitdist.data.plan import TrainPlan
from vitdist.data.views import View

# Micro-batches that are planned one right after the other: between two, decoding empties the processor's caches, and
# planning takes three times as long.
PLANNED = 8


class Place(NamedTuple):
    """One sample as the plan asks for it."""

    row: int
    seed: int
    position: int
    epoch: int
    slot: int


class TrainSource(IterableDataset[list[Place]]):
    """One rank's micro-batches from a position on, without end."""

    def __init__(
        self, plan: TrainPlan, *, rank: int, world: int, micro_batch_size: int, start: int, split: Split | None = None
    ) -> None:
        """`split` is whose remote shards to fetch ahead; None fetches none."""
        self._plan = plan
        self._split = split
        self._micro = micro_batch_size
        self._first_slot = rank * (plan.global_batch_size // world)
        self._accumulation = plan.global_batch_size // world // micro_batch_size
        self._start = start

    def __iter__(self) -> Iterator[list[Place]]:
        worker, num_workers = this_worker()
        number = self._start * self._accumulation + worker
        num_slots = self._accumulation * self._micro
        upcoming = shards_of_plan(self._plan, self._first_slot, num_slots, self._start)
        with prefetched(self._split, upcoming, worker) as at:
            while True:
                planned = [self._micro_batch(number + later * num_workers) for later in range(PLANNED)]
                for places in planned:
                    at(places[0].position)
                    yield places
                number += PLANNED * num_workers

    def _micro_batch(self, number: int) -> list[Place]:
        """This rank's, counted from the first step on."""
        position, micro = divmod(number, self._accumulation)
        first = self._first_slot + micro * self._micro
        slots = self._plan.slots(position, first, first + self._micro)
        drawn = zip(slots.rows.tolist(), slots.seeds.tolist(), strict=True)
        return [Place(row, seed, position, slots.epoch, slot) for slot, (row, seed) in enumerate(drawn, first)]


class EvaluationSource(IterableDataset[list[Place]]):
    """Every place of a span of a view, once, in file order, in batches."""

    def __init__(self, view: View, span: tuple[int, int], batch_size: int, *, split: Split | None = None) -> None:
        """`split` is whose remote shards to fetch ahead; None fetches none."""
        self._view = view
        self._split = split
        self._span = span
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        worker, num_workers = this_worker()
        start, stop = self._span
        with prefetched(self._split, shards_of_span(self._view, self._span), worker) as at:
            for first in range(start + worker * self._batch_size, stop, num_workers * self._batch_size):
                at(first)
                rows = self._view.rows(first, min(first + self._batch_size, stop))
                yield [Place(row, 0, 0, 0, slot) for slot, row in enumerate(rows.tolist(), first)]


def this_worker() -> tuple[int, int]:
    """(number, of how many); (0, 1) where there are none."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
