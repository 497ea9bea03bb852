"""The plan's promises, over random shapes and without a process: P1-P3, H2, R4 and the share of bytes a node reads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from vitdist.data.loading import places as places_module
from vitdist.data.loading.places import EvaluationSource, Place, TrainSource
from vitdist.data.plan import MAX_RANGES, TrainPlan, evaluation_span, make_plan
from vitdist.data.views import View, everything
from vitdist.errors import DataError

WORLDS = (1, 2, 3, 4, 6, 8)
NUM_PLANS = 300


@dataclass(frozen=True)
class Case:
    """A random set and a recipe's wishes for it."""

    counts: np.ndarray  # samples of each shard
    view: View
    labels: np.ndarray
    sampling: str
    batch: int
    seed: int

    def plan(self) -> TrainPlan:
        return make_plan(self.view, self.labels, sampling=self.sampling, global_batch_size=self.batch, seed=self.seed)


def random_case(number: int) -> Case:
    """1..13 shards of 1..97 samples, whole or with a part of the rows left out, and a batch that they fill."""
    rng = np.random.default_rng(number)
    counts = rng.integers(1, 98, rng.integers(1, 14))
    starts = np.concatenate(([0], np.cumsum(counts)))
    view = everything(starts)
    if rng.random() < 0.5 and starts[-1] > 10:
        chosen = rng.random(starts[-1]) < rng.uniform(0.2, 0.9)
        chosen[: rng.integers(0, counts[0] + 1)] = False  # sometimes a shard that the view leaves empty
        chosen[-1] = True
        view = View(starts, np.packbits(chosen))
    batches = [batch for batch in (1, 2, 3, 6, 7, 8, 12, 24, 48, 72, 96) if batch <= view.num_samples]
    labels = rng.zipf(1.6, starts[-1]).clip(max=9)
    sampling = ("uniform", "uniform", "balanced", "sqrt")[number % 4]
    return Case(counts, view, labels, sampling, int(rng.choice(batches)), int(rng.integers(1 << 40)))


def read(source: TrainSource | EvaluationSource, num_workers: int) -> Iterator[list[Place]]:
    """A rank's batches in the order in which torch's loader hands over those of its workers: in turn."""
    streams = [_of_worker(source, worker, num_workers) for worker in range(max(1, num_workers))]
    while streams:
        for stream in list(streams):
            found = next(stream, None)
            if found is None:
                streams.remove(stream)
            else:
                yield found


def _of_worker(source: TrainSource | EvaluationSource, worker: int, num_workers: int) -> Iterator[list[Place]]:
    info = SimpleNamespace(id=worker, num_workers=num_workers) if num_workers else None
    original, places_module.get_worker_info = places_module.get_worker_info, lambda: info
    try:
        batches = iter(source)
        first = next(batches, None)  # a generator asks who it is when it begins
    finally:
        places_module.get_worker_info = original
    if first is not None:
        yield first
    yield from batches


def trained(case: Case, world: int, num_workers: int, accumulation: int, start: int, stop: int) -> list[Place]:
    """What all ranks together see from one position to another, in the order of slots."""
    micro = case.batch // world // accumulation
    places: list[Place] = []
    for rank in range(world):
        source = TrainSource(case.plan(), rank=rank, world=world, micro_batch_size=micro, start=start)
        batches = list(itertools.islice(read(source, num_workers), (stop - start) * accumulation))
        assert [len(batch) for batch in batches] == [micro] * ((stop - start) * accumulation)
        assert all(len({place.position for place in batch}) == 1 for batch in batches)
        places += [place for batch in batches for place in batch]
    return sorted(places, key=lambda place: (place.position, place.slot))


def reference(case: Case, start: int, stop: int) -> list[Place]:
    """The same from the plan, a whole batch at a time."""
    plan, places = case.plan(), []
    for position in range(start, stop):
        slots = plan.slots(position, 0, case.batch)
        for slot, (row, seed) in enumerate(zip(slots.rows.tolist(), slots.seeds.tolist(), strict=True)):
            places.append(Place(row, seed, position, slots.epoch, slot))
    return places


@pytest.mark.parametrize("number", range(NUM_PLANS))
def test_random_plans(number: int) -> None:
    """Each epoch complete; the same for any ranks, workers and micro-batches, from any position on."""
    case = random_case(number)
    steps = case.plan().steps_per_epoch
    whole = reference(case, 0, 3 * steps)
    members = set(case.view.rows(0, case.view.num_samples).tolist())
    assert steps == case.view.num_samples // case.batch
    for epoch in range(3):
        rows = [place.row for place in whole if place.epoch == epoch]
        assert len(rows) == steps * case.batch and set(rows) <= members
        if case.sampling == "uniform":
            assert len(set(rows)) == len(rows)
    rng = np.random.default_rng(number)
    for world in rng.permutation([world for world in WORLDS if case.batch % world == 0])[:3].tolist():
        local = case.batch // world
        accumulation = int(rng.choice([n for n in (1, 2, 3) if local % n == 0]))
        start = int(rng.integers(0, 2 * steps))
        stop = min(3 * steps, start + 12)
        found = trained(case, world, int(rng.integers(0, 6)), accumulation, start, stop)
        assert found == whole[start * case.batch : stop * case.batch]


@pytest.mark.parametrize("number", range(NUM_PLANS))
def test_random_evaluations(number: int) -> None:
    """Each sample of a view exactly once, for any ranks, workers and batch sizes, in file order on each rank."""
    case = random_case(number)
    rng = np.random.default_rng(number)
    total = case.view.num_samples
    for world in WORLDS:
        batch, num_workers = int(rng.integers(1, 2 * total + 1)), int(rng.integers(0, 6))
        rows: list[int] = []
        spans = [evaluation_span(total, rank, world) for rank in range(world)]
        for span in spans:
            source = EvaluationSource(case.view, span, batch)
            found = list(read(source, num_workers))
            assert all(len(part) == batch for part in found[:-1])
            rows += [place.row for part in found for place in part]
            slots = [place.slot for part in found for place in part]
            assert slots == list(range(*span))
        assert rows == case.view.rows(0, total).tolist()
        assert max(stop - start for start, stop in spans) - min(stop - start for start, stop in spans) <= 1


def test_fewer_shards_than_readers() -> None:
    case = Case(np.array([97]), everything([0, 97]), np.zeros(97, int), "uniform", 24, 5)
    assert trained(case, 8, 5, 1, 0, 8) == reference(case, 0, 8)


def test_epochs_and_seeds_differ() -> None:
    """A plan that shuffled nothing would pass all of the above."""
    case = random_case(0)
    plan = case.plan()
    first, second = [plan.slots(epoch * plan.steps_per_epoch, 0, case.batch) for epoch in (0, 1)]
    assert first.rows.tolist() != second.rows.tolist() != sorted(second.rows.tolist())
    seeds = [
        {place.seed for place in reference(case, e * plan.steps_per_epoch, (e + 1) * plan.steps_per_epoch)}
        for e in (0, 1)
    ]
    assert len(seeds[0]) == plan.steps_per_epoch * case.batch and seeds[0].isdisjoint(seeds[1])
    other = Case(case.counts, case.view, case.labels, case.sampling, case.batch, case.seed + 1).plan()
    assert first.rows.tolist() != other.slots(0, 0, case.batch).rows.tolist()


def test_neighbours_in_a_shard_are_spread_over_the_epoch() -> None:
    """Packed in the order of classes, a set must still give mixed batches; 6,000 samples are two blocks or less."""
    starts = np.arange(0, 6001, 250)
    labels = np.arange(6000) // 30
    plan = make_plan(everything(starts), labels, sampling="uniform", global_batch_size=60, seed=1)
    distinct = [len(set(labels[plan.slots(position, 0, 60).rows])) for position in range(plan.steps_per_epoch)]
    # each of the 12 ranges draws from two shards of 250, so 17 classes a range: chance would give 3.6 of 5 new ones
    assert np.mean(distinct) > 45


def test_small_shards_are_shuffled_with_one_another() -> None:
    starts = np.arange(65) * 64
    plan = make_plan(everything(starts), np.empty(0), sampling="uniform", global_batch_size=1, seed=3)
    shards = [int(plan.slots(position, 0, 1).rows[0]) // 64 for position in range(64)]
    assert len(set(shards)) > 20, "not one shard after the other"


def test_each_epoch_has_its_own_order_of_shards() -> None:
    plan = make_plan(
        everything(np.arange(9) * 5000), np.empty(0), sampling="uniform", global_batch_size=1, seed=3
    )  # a block is a shard
    orders = {
        tuple(int(plan.slots(epoch * 40_000 + k * 5000 + 2500, 0, 1).rows[0]) // 5000 for k in range(8))
        for epoch in range(3)
    }
    assert len(orders) == 3 and all(sorted(order) == list(range(8)) for order in orders)


def test_balanced_epochs_take_other_samples_of_a_large_class() -> None:
    labels = np.repeat([0, 1], [90, 10])
    plan = make_plan(everything(np.array([0, 100])), labels, sampling="balanced", global_batch_size=10, seed=3)
    taken = [
        {row for p in range(10) for row in plan.slots(10 * e + p, 0, 10).rows.tolist() if row < 90} for e in (0, 1)
    ]
    assert [len(rows) for rows in taken] == [50, 50] and taken[0] != taken[1]


def test_what_one_epoch_leaves_out_another_takes() -> None:
    for counts in ([29], [1] * 29, [5, 20, 4]):
        case = Case(np.array(counts), everything(np.cumsum([0, *counts])), np.zeros(29, int), "uniform", 24, 3)
        plan = case.plan()
        left_out = [set(range(29)) - set(plan.slots(epoch, 0, 24).rows.tolist()) for epoch in range(20)]
        assert all(len(rows) == 5 for rows in left_out)
        assert set.intersection(*left_out) == set()


@pytest.mark.parametrize(("sampling", "exponent"), [("balanced", 0.0), ("sqrt", 0.5)])
def test_classes_get_their_share(sampling: str, exponent: float) -> None:
    """Counts of a long tail: the drawn ones are within one of the share, and no sample repeats before its class did."""
    sizes = np.array([900, 300, 81, 30, 9, 4, 1])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), sizes))
    case = Case(np.array([600, 725]), everything([0, 600, 1325]), labels, sampling, 24, 11)
    plan = case.plan()
    wanted = sizes**exponent / (sizes**exponent).sum() * plan.steps_per_epoch * 24
    for epoch in (0, 1):
        places = reference(case, epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = np.array([place.row for place in places])
        assert np.abs(np.bincount(labels[rows], minlength=7) - wanted).max() < 1
        for label in range(7):
            times = Counter(rows[labels[rows] == label].tolist())
            times.update({row: 0 for row in np.flatnonzero(labels == label).tolist()})
            assert max(times.values()) - min(times.values()) <= 1


def test_a_view_smaller_than_a_batch_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="23 training samples .* global batch of 24; set train.global_batch_size"):
        make_plan(everything([0, 23]), np.zeros(23), sampling="uniform", global_batch_size=24, seed=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 6, 8, 12, 24])
def test_a_node_reads_its_share_of_the_bytes(num_nodes: int, seed: int) -> None:
    """Whole shards, as a node fetches them: at most 1.1 / nodes of an epoch's."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(700, 1300, 1200)
    bytes_of = counts * rng.integers(90_000, 110_000, 1200)
    case = Case(counts, everything(np.concatenate(([0], np.cumsum(counts)))), np.zeros(0), "uniform", 9600, seed)
    plan = case.plan()
    share = case.batch // num_nodes
    for node in range(0, num_nodes, max(1, num_nodes // 4)):
        rows = np.concatenate(
            [plan.slots(p, node * share, (node + 1) * share).rows for p in range(plan.steps_per_epoch)]
        )
        shards = np.unique(np.searchsorted(case.view.shard_starts, rows, side="right") - 1)
        assert bytes_of[shards].sum() <= 1.1 / num_nodes * bytes_of.sum()


def test_a_shard_is_needed_during_one_block_only() -> None:
    """So that it can be read front to back and let go: a node holds no more than a block of each of its ranges."""
    counts = np.full(480, 1000)
    case = Case(counts, everything(np.arange(0, 480_001, 1000)), np.zeros(0), "uniform", 240, 9)
    plan, run = case.plan(), 240 // MAX_RANGES
    seen: dict[int, list[int]] = {}
    for position in range(plan.steps_per_epoch):
        for shard in set((plan.slots(position, 0, run).rows // 1000).tolist()):
            seen.setdefault(shard, []).append(position)
    assert 20 <= len(seen) <= 21
    assert all(max(at) - min(at) <= (4096 + 2 * 1000) // run for at in seen.values())
