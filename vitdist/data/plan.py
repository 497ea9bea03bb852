"""Which sample stands in which slot of which global batch: pure functions, and the only source of order.

The sequence depends on (index, split, sampling, seed, epoch, global batch size) and on nothing else: not on the number
of ranks or workers, nor on where a run was interrupted. Position is one integer, the number of batches before this one.

Under `uniform` the shards of an epoch are shuffled and laid end to end, and the line is cut into G = gcd(batch, 24)
equal ranges. Range g fills the g-th run of slots of every batch, so a node of N (N dividing G) reads its own ranges
only. Within a range, blocks of a few shards are shuffled sample by sample: planning holds one block a range in memory,
and each shard is needed during one block only, so it can be read front to back once a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np

from vitdist.data.seeds import Purpose, hash_words, sample_seeds, shuffled
from vitdist.data.views import View
from vitdist.errors import DataError

MAX_RANGES = 24  # divisible by 1, 2, 3, 4, 6, 8, 12: the node counts that read disjoint bytes
BLOCK_SAMPLES = 4096  # 24 such blocks of 100 KB photographs stay in 10 GB of page cache


class Order(Protocol):
    """The rows of every global batch of every epoch."""

    def rows(self, epoch: int, batch: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: rows in slots start..stop of the batch-th batch of an epoch."""


@dataclass(frozen=True)
class Slots:
    """A run of slots of one global batch. rows: int64 [n]; seeds: uint64 [n], for the augmentation of each."""

    position: int
    epoch: int
    batch: int
    start: int
    rows: np.ndarray
    seeds: np.ndarray


class TrainPlan:
    """Global batches by position: position p is batch p mod steps_per_epoch of epoch p div steps_per_epoch."""

    def __init__(self, view: View, order: Order, *, global_batch_size: int, seed: int) -> None:
        self.view = view
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = num_steps(view, global_batch_size)
        self._order = order
        self._seed = seed

    def slots(self, position: int, start: int, stop: int) -> Slots:
        """The slots start..stop of the global batch at a position."""
        epoch, batch = divmod(position, self.steps_per_epoch)
        rows = self._order.rows(epoch, batch, start, stop)
        return Slots(position, epoch, batch, start, rows, sample_seeds(self._seed, epoch, rows))

    def replacement(self, epoch: int, row: int, attempt: int) -> int:
        """The row that stands in for a damaged one: the same on whichever rank meets it."""
        draw = int(hash_words(self._seed, Purpose.REPLACEMENT, epoch, row, attempt)) % self.view.num_samples
        return int(self.view.rows(draw, draw + 1)[0])


def num_steps(view: View, global_batch_size: int) -> int:
    """Steps of one epoch; DataError when the view holds less than one batch."""
    if view.num_samples < global_batch_size:
        raise DataError(
            f"{view.num_samples} training samples are fewer than one global batch of {global_batch_size}; "
            f"set train.global_batch_size to at most {view.num_samples}"
        )
    return view.num_samples // global_batch_size


def make_plan(view: View, labels: np.ndarray, *, sampling: str, global_batch_size: int, seed: int) -> TrainPlan:
    """The plan of a recipe's data.sampling: uniform, balanced or sqrt over the labels."""
    order: Order
    if sampling == "uniform":
        order = UniformOrder(view, global_batch_size=global_batch_size, seed=seed)
    else:
        exponent = {"balanced": 0.0, "sqrt": 0.5}[sampling]
        order = WeightedOrder(view, labels, exponent=exponent, global_batch_size=global_batch_size, seed=seed)
    return TrainPlan(view, order, global_batch_size=global_batch_size, seed=seed)


@dataclass(frozen=True)
class _Range:
    """A range of an epoch's line: its pieces of shards in order, and the blocks they are shuffled in."""

    shards: np.ndarray  # ids of the shards it touches
    starts: np.ndarray  # where the piece of each starts, counted in the range
    skip: int  # rows of the first shard that belong to the range before
    length: int
    block_firsts: np.ndarray  # index into `shards` of each block's first piece


class UniformOrder:
    """Each sample of the view once an epoch, less what the last incomplete batch would have held."""

    def __init__(self, view: View, *, global_batch_size: int, seed: int) -> None:
        self._view = view
        self._seed = seed
        self._num_ranges = gcd(global_batch_size, MAX_RANGES)
        self._run = global_batch_size // self._num_ranges  # slots of a batch that one range fills
        self._line: tuple[int, np.ndarray, np.ndarray] | None = None
        self._ranges: dict[int, tuple[int, _Range]] = {}
        self._blocks: dict[int, tuple[int, int, np.ndarray]] = {}

    def rows(self, epoch: int, batch: int, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            index, offset = divmod(start, self._run)
            count = min(stop - start, self._run - offset)
            parts.append(self._range_rows(epoch, index, batch * self._run + offset, count))
            start += count
        return np.concatenate(parts)

    def _range_rows(self, epoch: int, index: int, place: int, count: int) -> np.ndarray:
        """The rows at `count` places of a range, over as many blocks as that takes."""
        parts = []
        while count > 0:
            block_start, rows = self._block_at(epoch, index, place)
            part = rows[place - block_start : place - block_start + count]
            parts.append(part)
            place, count = place + len(part), count - len(part)
        return np.concatenate(parts)

    def _block_at(self, epoch: int, index: int, place: int) -> tuple[int, np.ndarray]:
        piece = self._range(epoch, index)
        block_starts = piece.starts[piece.block_firsts]
        block = int(np.searchsorted(block_starts, place, side="right")) - 1
        cached = self._blocks.get(index)
        if cached is None or cached[:2] != (epoch, block):
            cached = self._blocks[index] = (epoch, block, self._shuffle_block(epoch, index, piece, block))
        return int(block_starts[block]), cached[2]

    def _shuffle_block(self, epoch: int, index: int, piece: _Range, block: int) -> np.ndarray:
        first = int(piece.block_firsts[block])
        last = int(piece.block_firsts[block + 1]) if block + 1 < len(piece.block_firsts) else len(piece.shards)
        rows = np.concatenate([self._view.shard_rows(int(shard)) for shard in piece.shards[first:last]])
        skip = piece.skip if first == 0 else 0
        stop = int(piece.starts[last]) if last < len(piece.shards) else piece.length
        rows = rows[skip : skip + stop - int(piece.starts[first])]
        return rows[shuffled(len(rows), self._seed, Purpose.BLOCK_ORDER, epoch, index, block)]

    def _range(self, epoch: int, index: int) -> _Range:
        cached = self._ranges.get(index)
        if cached is None or cached[0] != epoch:
            cached = self._ranges[index] = (epoch, self._cut_range(epoch, index))
        return cached[1]

    def _cut_range(self, epoch: int, index: int) -> _Range:
        order, ends = self._shuffled_shards(epoch)
        total = int(ends[-1])
        low, high = index * total // self._num_ranges, (index + 1) * total // self._num_ranges
        first = int(np.searchsorted(ends, low, side="right")) - 1
        last = int(np.searchsorted(ends, high, side="left"))
        starts = np.maximum(ends[first:last], low) - low
        blocks = starts // BLOCK_SAMPLES
        firsts = np.flatnonzero(np.diff(blocks, prepend=-1))
        return _Range(order[first:last], starts, low - int(ends[first]), high - low, firsts)

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the epoch's order, ends of the line they make), empty shards left out."""
        if self._line is None or self._line[0] != epoch:
            counts = self._view.shard_counts
            order = shuffled(len(counts), self._seed, Purpose.SHARD_ORDER, epoch)
            order = order[counts[order] > 0]
            self._line = (epoch, order, np.concatenate(([0], np.cumsum(counts[order]))))
        return self._line[1], self._line[2]


class WeightedOrder:
    """Classes drawn in proportion to count**exponent: 0 is balanced, 0.5 square root. Costs memory for an epoch's rows.

    Within a class every sample is used once before any is used again.
    """

    def __init__(self, view: View, labels: np.ndarray, *, exponent: float, global_batch_size: int, seed: int) -> None:
        self._batch = global_batch_size
        self._seed = seed
        rows = view.rows(0, view.num_samples)
        classes, class_of = np.unique(np.asarray(labels)[rows], return_inverse=True)
        self._rows = [rows[class_of == index] for index in range(len(classes))]
        total = num_steps(view, global_batch_size) * global_batch_size
        self._quotas = _apportion(np.bincount(class_of).astype(np.float64) ** exponent, total)
        self._cached: tuple[int, np.ndarray] | None = None

    def rows(self, epoch: int, batch: int, start: int, stop: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._epoch_rows(epoch))
        return self._cached[1][batch * self._batch + start : batch * self._batch + stop]

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        parts = []
        for index, (rows, quota) in enumerate(zip(self._rows, self._quotas, strict=True)):
            order = shuffled(len(rows), self._seed, Purpose.CLASS_ORDER, epoch, index)
            parts.append(np.resize(rows[order], quota))  # repeats the whole permutation as often as needed
        line = np.concatenate(parts)
        return line[shuffled(len(line), self._seed, Purpose.BATCH_ORDER, epoch)]


def _apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """int64 shares of `total` in proportion to the weights, by the largest remainders."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    return shares


def evaluation_span(num_samples: int, rank: int, world: int) -> tuple[int, int]:
    """The positions of a view that one rank evaluates: contiguous spans that cover it, each sample exactly once."""
    return rank * num_samples // world, (rank + 1) * num_samples // world
