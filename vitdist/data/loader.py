"""From the plan to batches: a webdataset pipeline whose source is a plan, run by torch's loader workers.

A worker takes every num_workers-th micro-batch of its rank, and torch's loader hands them over in turn, so the order of
batches is the plan's for any number of workers. Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitdist.data.images import DamagedImage
from vitdist.data.index import Split
from vitdist.data.mixing import Mixing, MixTensors, mix_plan
from vitdist.data.plan import TrainPlan
from vitdist.data.prefetch import prefetched, shards_of_plan, shards_of_span
from vitdist.data.shards import Damage, DamagedSample, ShardReader
from vitdist.data.transforms import prepare_worker
from vitdist.data.views import View
from vitdist.data.workers import StartedLoader

MAX_REPLACEMENTS = 16
Transform = Callable[[bytes, int], np.ndarray]


@dataclass
class Batch:
    """A micro-batch of B samples. images uint8 [B, S, S, 3]; labels int64 [B], nodes of the packed tree.

    valid bool [B]: False where a damaged sample has no replacement (then its image is black). position and slot say
    where it stands in the plan. mix is there when the recipe mixes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    seeds: torch.Tensor
    position: int
    epoch: int
    slot: int
    damages: list[Damage]
    keys: list[str]
    mix: MixTensors | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that copies to the device do not wait."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            mix=None if self.mix is None else self.mix.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """What the step needs on the device; the bookkeeping stays on the host."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            mix=None if self.mix is None else self.mix.to(device),
        )


@dataclass(frozen=True)
class Place:
    """One sample as the plan asks for it."""

    row: int
    seed: int
    position: int
    epoch: int
    slot: int


class TrainSource(IterableDataset[Place]):
    """The places of one rank's micro-batches from a position on, without end."""

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

    def __iter__(self) -> Iterator[Place]:
        worker, num_workers = _worker()
        number = self._start * self._accumulation + worker
        num_slots = self._accumulation * self._micro
        upcoming = shards_of_plan(self._plan, self._first_slot, num_slots, self._start)
        with prefetched(self._split, upcoming, worker) as at:
            while True:
                position, micro = divmod(number, self._accumulation)
                at(position)
                first = self._first_slot + micro * self._micro
                slots = self._plan.slots(position, first, first + self._micro)
                for offset, (row, seed) in enumerate(zip(slots.rows.tolist(), slots.seeds.tolist(), strict=True)):
                    yield Place(row, seed, position, slots.epoch, first + offset)
                number += num_workers


class EvaluationSource(IterableDataset[Place]):
    """Every place of a span of a view, once, in file order."""

    def __init__(self, view: View, span: tuple[int, int], batch_size: int, *, split: Split | None = None) -> None:
        """`split` is whose remote shards to fetch ahead; None fetches none."""
        self._view = view
        self._split = split
        self._span = span
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Place]:
        worker, num_workers = _worker()
        start, stop = self._span
        with prefetched(self._split, shards_of_span(self._view, self._span), worker) as at:
            for first in range(start + worker * self._batch_size, stop, num_workers * self._batch_size):
                at(first)
                rows = self._view.rows(first, min(first + self._batch_size, stop))
                for offset, row in enumerate(rows.tolist()):
                    yield Place(row, 0, 0, 0, first + offset)


class Load:
    """From a place to an image: read, check, decode, transform; damaged samples are noted and, if asked, replaced."""

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        replacement: Callable[[int, int, int], int] | None = None,
        with_keys: bool = False,
    ) -> None:
        """`replacement(epoch, row, attempt)` gives the row that stands in for a damaged one; None leaves a gap."""
        self._split = split
        self._transform = transform
        self._replacement = replacement
        self._with_keys = with_keys
        self._reader: ShardReader | None = None

    def __call__(self, place: Place) -> dict[str, Any]:
        """Only the planned sample's damage is noted: that of a damaged stand-in counts where the plan has it."""
        reader = self._reader = self._reader or ShardReader(self._split)
        damages: list[Damage] = []
        row = place.row
        for attempt in itertools.count(1):
            try:
                image = self._transform(reader.read(row), place.seed)
                key = reader.key(row) if self._with_keys else ""
                return self._sample(place, row, image, damages, key)
            except DamagedImage as error:
                damage = reader.damaged(row, error.kind, str(error)).damage
            except DamagedSample as error:
                damage = error.damage
            damages = damages or [damage]
            stand_in = self._next_row(place, attempt)
            if stand_in is None:
                break
            row = stand_in
        return self._sample(place, place.row, None, damages, "")

    def _next_row(self, place: Place, attempt: int) -> int | None:
        if self._replacement is None or attempt > MAX_REPLACEMENTS:
            return None
        return self._replacement(place.epoch, place.row, attempt)

    def _sample(
        self, place: Place, row: int, image: np.ndarray | None, damages: list[Damage], key: str
    ) -> dict[str, Any]:
        label = int(self._split.samples["label"][row])
        return {"place": place, "row": row, "image": image, "label": label, "damages": damages, "key": key}


class Unseeded:
    """A transform that draws nothing, where one that takes a seed is expected."""

    def __init__(self, transform: Callable[[bytes], np.ndarray]) -> None:
        self._transform = transform

    def __call__(self, data: bytes, seed: int) -> np.ndarray:
        return self._transform(data)


class Collate:
    """A list of samples as a Batch."""

    def __init__(self, image_size: int) -> None:
        self._gap = np.zeros((image_size, image_size, 3), dtype=np.uint8)

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        images = [self._gap if sample["image"] is None else sample["image"] for sample in samples]
        first: Place = samples[0]["place"]
        return Batch(
            images=torch.from_numpy(np.stack(images)),
            labels=torch.tensor([sample["label"] for sample in samples]),
            valid=torch.tensor([sample["image"] is not None for sample in samples]),
            rows=torch.tensor([sample["row"] for sample in samples]),
            seeds=torch.from_numpy(np.array([s["place"].seed for s in samples], dtype=np.uint64).view(np.int64)),
            position=first.position,
            epoch=first.epoch,
            slot=first.slot,
            damages=[damage for sample in samples for damage in sample["damages"]],
            keys=[sample["key"] for sample in samples],
        )


class Mix:
    """Adds the plan's mixing weights and boxes to a batch; the pixels are mixed on the device."""

    def __init__(
        self, mixing: Mixing, *, seed: int, steps_per_epoch: int, global_batch_size: int, image_size: int
    ) -> None:
        self._mixing = mixing
        self._seed = seed
        self._steps = steps_per_epoch
        self._num_slots = global_batch_size
        self._image_size = image_size

    def __call__(self, batch: Batch) -> Batch:
        if not self._mixing.active:
            return batch
        mix = mix_plan(
            self._seed, batch.epoch, batch.position % self._steps, self._num_slots, self._image_size, self._mixing
        )
        return replace(batch, mix=mix.slots(batch.slot, batch.slot + len(batch)).tensors())


def batches(
    source: Iterable[Place],
    load: Load,
    collate: Collate,
    batch_size: int,
    *,
    mix: Mix | None = None,
    num_workers: int,
    pin_memory: bool = False,
    worker_start: Callable[[], None] | None = None,
) -> DataLoader[Batch]:
    """The loader of a source's batches. `worker_start` runs first in every worker (to ignore a launcher's signals)."""
    stages: list[Any] = [source, wds.map(load), wds.batched(batch_size, collation_fn=collate, partial=True)]
    if mix is not None:
        stages.append(wds.map(mix))
    return StartedLoader(
        wds.DataPipeline(*stages),
        batch_size=None,  # batches are made in the workers
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_start=_Start(worker_start),
        # one of its own: torch draws a seed from it at every start, which the model's random numbers must not notice
        generator=torch.Generator(),
        multiprocessing_context="fork" if num_workers else None,
    )


class _Start:
    """What a worker does first. numpy, torch and OpenCV keep to one thread: parallelism is over workers."""

    def __init__(self, also: Callable[[], None] | None) -> None:
        self._also = also

    def __call__(self, worker: int) -> None:
        prepare_worker()
        if self._also is not None:
            self._also()


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
