"""Views of a split: which of its rows take part. `val` is a view of `train`, made by a pure function, never packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vitdist.data.seeds import Purpose, hash_words
from vitdist.errors import DataError

COUNTED_AT_ONCE = 1 << 18  # rows, a multiple of 8: any number of them is counted in a few MB


@dataclass(frozen=True)
class View:
    """Rows of a split, by shard. `mask` is one bit a row (numpy.packbits), or None where all rows are in."""

    shard_starts: np.ndarray
    mask: np.ndarray | None = None

    @cached_property
    def shard_counts(self) -> np.ndarray:
        """int64 [S]: rows of each shard that are in the view."""
        if self.mask is None:
            return np.diff(self.shard_starts)
        ends = self.shard_starts
        below = np.zeros(len(ends), np.int64)  # members before each shard
        num_before = 0
        for first in range(0, int(ends[-1]), COUNTED_AT_ONCE):
            last = min(first + COUNTED_AT_ONCE, int(ends[-1]))
            sums = np.cumsum(np.unpackbits(self.mask[first // 8 : (last + 7) // 8], count=last - first), dtype=np.int64)
            low, high = np.searchsorted(ends, [first, last], side="right")  # shards that begin in (first, last]
            below[low:high] = num_before + sums[ends[low:high] - first - 1]
            num_before += int(sums[-1])
        return np.diff(below)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.concatenate(([0], np.cumsum(self.shard_counts)))

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1])

    def shard_rows(self, shard: int) -> np.ndarray:
        """int64: the rows of one shard that are in the view, front to back."""
        start, stop = int(self.shard_starts[shard]), int(self.shard_starts[shard + 1])
        if self.mask is None:
            return np.arange(start, stop)
        first = start // 8
        bits = np.unpackbits(self.mask[first : (stop + 7) // 8])[start - first * 8 : stop - first * 8]
        return start + np.flatnonzero(bits)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the rows at these positions of the view, in file order."""
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            end = min(stop, int(self._ends[shard + 1]))
            offset = int(self._ends[shard])
            parts.append(self.shard_rows(shard)[start - offset : end - offset])
            start, shard = end, shard + 1
        return np.concatenate(parts)


def everything(shard_starts: np.ndarray) -> View:
    """The view that holds every row of a split."""
    return View(np.asarray(shard_starts, dtype=np.int64))


def validation_split(
    shard_starts: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    *,
    fraction: float,
    seed: int,
    fold: int = 0,
) -> tuple[View, View]:
    """(train, val) as views of one split: stratified by label, whole groups on one side where groups are given.

    Rows (or groups, under their most frequent label) are laid out by label and, within it, by a hash of the seed; val
    takes every 1/fraction-th of that line, so each label gives its share to within one. `fold` shifts the pattern:
    with fraction 1/k the folds 0..k-1 are disjoint and cover everything.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.val.fraction is {fraction}, it must lie between 0 and 1")
    units, unit_labels, unit_of_row = _units(labels, groups)
    order = np.lexsort((hash_words(seed, Purpose.VALIDATION, units), unit_labels))
    places = np.arange(len(units)) + fold
    # the small term keeps 1/3 + 1/3 + 1/3 from falling one unit short
    crossed = np.floor((places + 1) * fraction + 1e-9) > np.floor(places * fraction + 1e-9)
    chosen = np.zeros(len(units), dtype=bool)
    chosen[order[crossed]] = True
    is_val = chosen[unit_of_row]
    if is_val.all() or not is_val.any():
        raise DataError(
            f"data.val.fraction {fraction} of {len(units)} {'groups' if groups is not None else 'samples'} leaves "
            f"{int(is_val.sum())} of {len(labels)} samples for val; choose another fraction, or protocol: refit"
        )
    starts = np.asarray(shard_starts, dtype=np.int64)
    return View(starts, np.packbits(~is_val)), View(starts, np.packbits(is_val))


def _units(labels: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is drawn as a whole: (ids, label of each, unit of each row). Rows without a group stand alone."""
    rows = np.arange(len(labels), dtype=np.int64)
    if groups is None:
        return rows, labels, rows
    ids = np.where(groups >= 0, groups.astype(np.int64), -1 - rows)
    units, unit_of_row = np.unique(ids, return_inverse=True)
    pairs, counts = np.unique(np.stack((unit_of_row, labels)), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))  # the most frequent label of each unit first
    firsts = np.unique(pairs[0][order], return_index=True)[1]
    return units, pairs[1][order][firsts], unit_of_row
