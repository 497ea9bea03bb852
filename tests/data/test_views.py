"""P3: validation as a view: stratified to within one, groups whole, folds that cover, shards irrelevant."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from vitdist.data import views
from vitdist.data.views import View, everything, validation_split
from vitdist.errors import DataError


def rows(view: View) -> list[int]:
    return view.rows(0, view.num_samples).tolist()


def random_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard starts, labels with a long tail, groups of 1..6 of which some samples have none)."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate(([0], np.cumsum(rng.integers(1, 98, rng.integers(2, 14)))))
    total = int(starts[-1])
    labels = rng.zipf(1.5, total).clip(max=12).astype(np.int32)
    groups = np.where(rng.random(total) < 0.3, -1, rng.integers(0, max(2, total // 4), total)).astype(np.int32)
    return starts, labels, groups


@pytest.mark.parametrize("seed", range(40))
def test_train_and_val_share_nothing_and_leave_nothing(seed: int) -> None:
    starts, labels, groups = random_set(seed)
    for grouped in (None, groups):
        train, val = validation_split(starts, labels, grouped, fraction=0.2, seed=seed)
        assert sorted(rows(train) + rows(val)) == list(range(starts[-1]))
        for view in (train, val):
            assert view.num_samples == len(rows(view)) == view.shard_counts.sum()
            assert rows(view) == sorted(rows(view))
            by_shard = [view.shard_rows(shard).tolist() for shard in range(len(starts) - 1)]
            assert [row for part in by_shard for row in part] == rows(view)
            assert [len(part) for part in by_shard] == view.shard_counts.tolist()


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_each_class_gives_its_share_to_within_one(seed: int, fraction: float) -> None:
    starts, labels, _ = random_set(seed)
    train, val = validation_split(starts, labels, None, fraction=fraction, seed=seed)
    given = np.bincount(labels[rows(val)], minlength=13)
    assert np.abs(given - np.bincount(labels, minlength=13) * fraction).max() < 1
    assert abs(val.num_samples - fraction * len(labels)) < 1


@pytest.mark.parametrize("num_folds", [2, 3, 5, 10])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_folds_are_disjoint_and_cover(seed: int, grouped: bool, num_folds: int) -> None:
    starts, labels, groups = random_set(seed)
    taken: list[int] = []
    for fold in range(num_folds):
        wish = {"fraction": 1 / num_folds, "seed": seed, "fold": fold}
        train, val = validation_split(starts, labels, groups if grouped else None, **wish)
        assert set(rows(train)).isdisjoint(rows(val))
        taken += rows(val)
    assert sorted(taken) == list(range(starts[-1]))


@pytest.mark.parametrize("seed", range(20))
def test_groups_stand_on_one_side(seed: int) -> None:
    starts, labels, groups = random_set(seed)
    train, val = validation_split(starts, labels, groups, fraction=0.25, seed=seed)
    sides = [set(groups[rows(view)].tolist()) - {-1} for view in (train, val)]
    assert sides[0] and sides[1] and sides[0].isdisjoint(sides[1])
    alone = np.flatnonzero(groups < 0)
    assert set(alone) & set(rows(train)) and set(alone) & set(rows(val)), "samples without a group are no group"


def test_groups_are_stratified_by_their_most_frequent_label() -> None:
    """Groups of one label each: the labels' groups are shared out to within one, whatever their sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 200)
    groups = rng.permutation(np.repeat(np.arange(200), sizes))
    labels = groups % 7
    _, val = validation_split(np.array([0, len(labels)]), labels, groups, fraction=0.25, seed=1)
    chosen = np.unique(groups[rows(val)])
    assert np.abs(np.bincount(chosen % 7, minlength=7) - np.bincount(np.arange(200) % 7) / 4).max() < 1


def test_a_group_of_several_labels_goes_by_its_most_frequent() -> None:
    """Each group holds five of its own label and one stray: strays must not move it to another stratum."""
    own = np.arange(80) % 4
    labels = np.concatenate([np.r_[np.full(5, label), (label + 1) % 4] for label in own])
    groups = np.repeat(np.arange(80), 6)
    _, val = validation_split(np.array([0, 480]), labels, groups, fraction=0.25, seed=2)
    assert np.bincount(own[np.unique(groups[rows(val)])], minlength=4).tolist() == [5, 5, 5, 5]
    mixed = np.concatenate([np.r_[label, np.full(5, 7)] if label < 2 else np.full(6, label) for label in own])
    _, val = validation_split(np.array([0, 480]), mixed, groups, fraction=0.25, seed=2)
    taken = own[np.unique(groups[rows(val)])]
    assert [(taken < 2).sum(), (taken == 2).sum(), (taken == 3).sum()] == [10, 5, 5]


def test_another_seed_or_fold_is_another_view_and_the_same_is_the_same() -> None:
    starts, labels, _ = random_set(3)
    wish = {"fraction": 0.2, "seed": 5, "fold": 1}
    reference = rows(validation_split(starts, labels, None, **wish)[1])
    assert rows(validation_split(starts, labels, None, **wish)[1]) == reference
    whole = np.array([0, starts[-1]])
    assert rows(validation_split(whole, labels, None, **wish)[1]) == reference, "shards must not matter"
    for other in ({"seed": 6}, {"fold": 2}):
        assert rows(validation_split(starts, labels, None, **{**wish, **other})[1]) != reference


def test_the_choice_is_spread_over_the_file() -> None:
    """A stratified choice by position would take neighbours: bursts of one photographer lie side by side."""
    labels = np.repeat(np.arange(10), 100)
    _, val = validation_split(np.array([0, 1000]), labels, None, fraction=0.2, seed=0)
    gaps = np.diff(rows(val))
    assert gaps.max() > 10 and gaps.min() == 1 and len(np.unique(gaps)) > 8


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 63, 64, 65])
def test_any_stretch_of_a_masked_view(start: int) -> None:
    """Shards that begin inside a byte of the mask."""
    rng = np.random.default_rng(start)
    starts = np.array([0, 3, 3, 11, 64, 65, 200])
    chosen = rng.random(200) < 0.7
    view = View(starts, np.packbits(chosen))
    expected = np.flatnonzero(chosen).tolist()
    for stop in range(start, view.num_samples + 1, 7):
        assert view.rows(start, stop).tolist() == expected[start:stop]
    assert everything(starts).rows(start, 200).tolist() == list(range(start, 200))


def test_every_fold_has_its_share_whatever_the_fraction_rounds_to() -> None:
    """49 * (1 / 49) is less than 1 in floating point: without a small term the last fold would go empty."""
    for folds in range(2, 120):
        labels = np.zeros(2 * folds, np.int32)
        starts = np.array([0, len(labels)])
        sizes = [
            validation_split(starts, labels, None, fraction=1 / folds, seed=0, fold=fold)[1].num_samples
            for fold in (0, 1, folds - 1)
        ]
        assert sizes == [2, 2, 2], folds


@pytest.mark.parametrize("at_once", [8, 64, 1 << 20])
def test_rows_of_a_masked_view_are_counted_piece_by_piece(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "COUNTED_AT_ONCE", at_once)
    rng = np.random.default_rng(at_once)
    starts = np.sort(np.concatenate(([0, 0, 300, 300], rng.integers(0, 300, 40))))
    chosen = rng.random(300) < 0.4
    expected = [int(chosen[a:b].sum()) for a, b in itertools.pairwise(starts)]
    assert View(starts, np.packbits(chosen)).shard_counts.tolist() == expected


def test_counting_a_large_masked_view_takes_little_memory() -> None:
    starts = np.arange(0, 20_000_001, 1000)
    view = View(starts, np.full(20_000_000 // 8, 0b10101010, np.uint8))
    tracemalloc.start()
    counts = view.shard_counts
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (counts == 500).all() and peak < 20_000_000, "a byte a row would be as much"


@pytest.mark.parametrize(("fraction", "says"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.01, "0 of 8")])
def test_what_leaves_a_side_empty_is_refused(fraction: float, says: str) -> None:
    with pytest.raises(DataError, match=says):
        validation_split(np.array([0, 8]), np.zeros(8, np.int32), None, fraction=fraction, seed=0)


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match="of 1 groups"):
        validation_split(np.array([0, 8]), np.zeros(8, np.int32), np.zeros(8, np.int32), fraction=0.5, seed=0)
