"""From the plan to batches: a webdataset pipeline whose source is a plan, run by torch's loader workers.

A worker takes every num_workers-th micro-batch of its rank, and torch's loader hands them over in turn, so the order of
batches is the plan's for any number of workers. Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from vitdist.data.index import Split
from vitdist.data.loading.batch import Batch
from vitdist.data.loading.memory import BatchMemory
from vitdist.data.loading.prefetch import prefetched, shards_of_plan, shards_of_span
from vitdist.data.loading.workers import StartedLoader
from vitdist.data.pixels.images import DamagedImage
from vitdist.data.pixels.mixing import Mixing, mix_plan
from vitdist.data.pixels.transforms import prepare_worker
from vitdist.data.plan import TrainPlan
from vitdist.data.storage.shards import Damage, DamagedSample, ShardReader
from vitdist.data.views import View

MAX_REPLACEMENTS = 16
# Pictures that are drawn for, then read, then decoded: between two decodings, which empty the processor's caches of
# everything else, drawing took 26 us and reading 27; together they take 13 and 17, of 400 a picture.
TOGETHER = 16


class Transform(Protocol):
    """From bytes to a picture in `out` [S, S, 3], with the random numbers of its seed."""

    def draw(self, seed: int, /) -> Any: ...

    def __call__(self, data: bytes, drawn: Any, out: np.ndarray, /) -> Any: ...


class Place(NamedTuple):
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


class Loaded(NamedTuple):
    """What became of a place: the row that was used there, or a gap, and the damage that was met."""

    row: int
    is_valid: bool
    damages: list[Damage]
    key: str


class Found(NamedTuple):
    """A sample as it was read, or the damage that was met."""

    data: bytes
    key: str
    damage: Damage | None = None


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
        self.split = split
        self._transform = transform
        self._replacement = replacement
        self._with_keys = with_keys
        self._reader: ShardReader | None = None

    def __call__(self, places: Sequence[Place], images: np.ndarray) -> list[Loaded]:
        """Put the pictures of places into `images` [B, S, S, 3]; a gap is black.

        Only the planned sample's damage is noted: that of a damaged stand-in counts where the plan has it.
        """
        loaded = list[Loaded]()
        for first in range(0, len(places), TOGETHER):
            group = places[first : first + TOGETHER]
            drawn = [self._transform.draw(place.seed) for place in group]
            found = [self._read(place.row) for place in group]
            loaded += map(self._fill, group, found, drawn, images[first : first + TOGETHER])
        return loaded

    def _read(self, row: int) -> Found:
        self._reader = self._reader or ShardReader(self.split)
        try:
            return Found(self._reader.read(row), self._reader.key(row) if self._with_keys else "")
        except DamagedSample as error:
            return Found(b"", "", error.damage)

    def _fill(self, place: Place, found: Found, drawn: Any, out: np.ndarray) -> Loaded:
        row, damages = place.row, list[Damage]()
        for attempt in itertools.count(1):
            damage = found.damage or self._view(row, found.data, drawn, out)
            if damage is None:
                return Loaded(row, True, damages, found.key)
            damages = damages or [damage]
            stand_in = self._next_row(place, attempt)
            if stand_in is None:
                break
            row, found = stand_in, self._read(stand_in)
        out[:] = 0
        return Loaded(place.row, False, damages, "")

    def _view(self, row: int, data: bytes, drawn: Any, out: np.ndarray) -> Damage | None:
        """Put a picture into `out`, or say what is wrong with it."""
        try:
            self._transform(data, drawn, out)
        except DamagedImage as error:
            assert self._reader is not None
            return self._reader.damaged(row, error.kind, str(error)).damage
        return None

    def _next_row(self, place: Place, attempt: int) -> int | None:
        if self._replacement is None or attempt > MAX_REPLACEMENTS:
            return None
        return self._replacement(place.epoch, place.row, attempt)


class Unseeded:
    """A transform that draws nothing, where one that takes a seed is expected."""

    def __init__(self, transform: Callable[[bytes], np.ndarray]) -> None:
        self._transform = transform

    def draw(self, seed: int) -> int:
        return seed

    def __call__(self, data: bytes, drawn: int, out: np.ndarray) -> None:
        out[:] = self._transform(data)


class Fill:
    """The places of a micro-batch as a Batch; in a worker its pictures lie where the parent reads them."""

    def __init__(self, load: Load, batch_size: int, image_size: int) -> None:
        self._load = load
        self._shape = (batch_size, image_size, image_size, 3)
        self.memory: BatchMemory | None = None

    def renew(self, num_workers: int) -> BatchMemory | None:
        """Memory for the workers about to be forked; where there is not so much, torch's way will do."""
        with suppress(OSError):
            self.memory = BatchMemory(num_workers, self._shape[0], self._shape[1])
        return self.memory

    def __call__(self, places: list[Place]) -> Batch:
        piece = None if self.memory is None else self.memory.take(_worker()[0])
        if piece is None or self.memory is None:
            images = np.empty((len(places), *self._shape[1:]), np.uint8)
        else:
            images = self.memory.array(piece)[: len(places)]
        loaded = self._load(places, images)
        rows = np.array([one.row for one in loaded])
        first = places[0]
        return Batch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(self._load.split.samples["label"][rows].astype(np.int64)),
            valid=torch.tensor([one.is_valid for one in loaded]),
            rows=torch.from_numpy(rows),
            seeds=torch.from_numpy(np.array([place.seed for place in places], dtype=np.uint64).view(np.int64)),
            position=first.position,
            epoch=first.epoch,
            slot=first.slot,
            damages=[damage for one in loaded for damage in one.damages],
            keys=[one.key for one in loaded],
            piece=piece,
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


class Loader(StartedLoader[Batch]):
    """torch's, with memory of its own for each iteration."""

    def __init__(self, pipeline: wds.DataPipeline, fill: Fill, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self._fill = fill

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        memory = self._fill.renew(self.num_workers)
        stream = super().__iter__()  # forks the workers
        stream.memory = memory  # type: ignore[attr-defined]  # which lives as long as they do
        return stream


def batches(
    source: Iterable[Place],
    load: Load,
    image_size: int,
    batch_size: int,
    *,
    mix: Mix | None = None,
    num_workers: int,
    pin_memory: bool = False,
    worker_start: Callable[[], None] | None = None,
) -> Loader:
    """The loader of a source's batches. `worker_start` runs first in every worker (to ignore a launcher's signals)."""
    fill = Fill(load, batch_size, image_size)
    stages: list[Any] = [source, wds.batched(batch_size, collation_fn=None, partial=True), wds.map(fill)]
    if mix is not None:
        stages.append(wds.map(mix))
    return Loader(
        wds.DataPipeline(*stages),
        fill,
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
        gc.freeze()  # what the parent has imported is never looked through for garbage here, nor copied by it
        if self._also is not None:
            self._also()


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
