"""Batches on their way from a worker to its parent: in place, never overwritten while they are looked at, small."""

from __future__ import annotations

import gc
import itertools
import os
import pickle

import numpy as np
import pytest
import torch

from tests.data.tiny import tiny_packed
from vitdist.data.index import Split
from vitdist.data.loading.batch import Batch
from vitdist.data.loading.load import Load
from vitdist.data.loading.loader import Loader, Mix, batches
from vitdist.data.loading.memory import PIECES, BatchMemory
from vitdist.data.loading.places import TrainSource
from vitdist.data.pixels.mixing import Mixing
from vitdist.data.pixels.transforms import Augment, Preprocessing, TrainTransform
from vitdist.data.plan import TrainPlan, make_plan
from vitdist.data.views import everything

PREPARED = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH = 8


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    packed = tiny_packed(tmp_path_factory.mktemp("loader") / "set", num_classes=20, train_per_class=6, test_per_class=1)
    return packed.split("train")


def plan_of(split: Split) -> TrainPlan:
    view = everything(split.shard_starts)
    return make_plan(view, np.empty(0, np.int32), sampling="uniform", global_batch_size=BATCH, seed=4)


def loader(split: Split, num_workers: int) -> Loader:
    source = TrainSource(plan_of(split), rank=0, world=1, micro_batch_size=BATCH, start=0)
    load = Load(split, TrainTransform(PREPARED, Augment()), with_keys=True)
    mixing = Mix(Mixing(0.8, 1.0), seed=4, steps_per_epoch=15, global_batch_size=BATCH, image_size=32)
    return batches(source, load, 32, BATCH, mix=mixing, num_workers=num_workers)


def equal(left: Batch, right: Batch) -> bool:
    names = ("images", "labels", "rows", "seeds", "valid")
    same = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)
    assert left.mix is not None and right.mix is not None
    return (
        same
        and all(torch.equal(*pair) for pair in zip(left.mix, right.mix, strict=True))
        and (left.keys, left.position, left.epoch, left.slot) == (right.keys, right.position, right.epoch, right.slot)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_says_where_it_stands_in_the_plan(split: Split, num_workers: int) -> None:
    plan = plan_of(split)
    for position, batch in enumerate(itertools.islice(loader(split, num_workers), 20)):
        slots = plan.slots(position, 0, BATCH)
        assert (batch.position, batch.epoch, batch.slot) == (position, slots.epoch, 0)
        assert batch.rows.tolist() == slots.rows.tolist() and batch.seeds.tolist() == slots.seeds.tolist()
        assert batch.labels.tolist() == split.samples["label"][slots.rows].tolist()
        assert batch.valid.tolist() == BATCH * [True]


def test_a_batch_is_not_overwritten_while_somebody_holds_it(split: Split) -> None:
    """More batches are held than there are pieces; then views of single pictures only; each stays what it was."""
    count = 3 * PIECES
    expected = list(itertools.islice(loader(split, 0), count))
    held = list(itertools.islice(loader(split, 1), count))
    assert all(map(equal, held, expected))
    stream, kept = iter(loader(split, 2)), []
    for _ in range(count):
        batch = next(stream)
        kept.append(batch.images[2, 3:5])
        del batch
    assert all(torch.equal(part, batch.images[2, 3:5]) for part, batch in zip(kept, expected, strict=True))


def test_pieces_are_used_again_and_no_file_is_made(split: Split) -> None:
    before = set(os.listdir("/dev/shm"))
    addresses = set()
    for batch in itertools.islice(loader(split, 1), 5 * PIECES):
        addresses.add(batch.images.data_ptr())
        del batch
        assert set(os.listdir("/dev/shm")) <= before, "torch sends tensors as files there"
    assert len(addresses) <= PIECES


def test_two_iterations_of_one_loader_do_not_share_memory(split: Split) -> None:
    both = loader(split, 1)
    expected = list(itertools.islice(loader(split, 0), 12))
    first, second = iter(both), iter(both)
    for wanted in expected:
        one, other = next(first), next(second)
        assert equal(one, wanted) and equal(other, wanted)
        assert one.images.data_ptr() != other.images.data_ptr()


def test_what_is_sent_is_small(split: Split) -> None:
    batch = next(iter(loader(split, 0)))
    pixels = batch.images.numel()
    memory = BatchMemory(1, BATCH, 32)
    batch.piece = memory.take(0)
    assert batch.piece is not None
    memory.array(batch.piece)[:] = batch.images.numpy()
    sent = pickle.dumps(batch)
    assert len(sent) < 4000 < pixels
    back = pickle.loads(sent)
    assert back.piece is None and equal(back, batch)
    taken = [memory.take(0) for _ in range(PIECES)]
    assert taken.count(None) == 1, "all but the one that `back` holds"
    del back
    gc.collect()
    assert memory.take(0) is not None


def test_without_memory_batches_come_all_the_same(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no room")

    expected = list(itertools.islice(loader(split, 0), 4))
    monkeypatch.setattr("vitdist.data.loading.loader.BatchMemory", refuse)
    assert all(map(equal, itertools.islice(loader(split, 1), 4), expected))
