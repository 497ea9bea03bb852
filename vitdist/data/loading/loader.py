"""From places to batches: a webdataset pipeline, run by torch's loader workers.

Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import webdataset as wds

from vitdist.data.loading.batch import Batch
from vitdist.data.loading.load import Load
from vitdist.data.loading.memory import BatchMemory
from vitdist.data.loading.places import Place, this_worker
from vitdist.data.loading.workers import StartedLoader
from vitdist.data.pixels.mixing import Mixing, mix_plan
from vitdist.data.pixels.transforms import prepare_worker


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
        piece = None if self.memory is None else self.memory.take(this_worker()[0])
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
            rows=rows,
            seeds=np.array([place.seed for place in places], np.uint64),
            valid=np.array([one.is_valid for one in loaded]),
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
    source: Iterable[list[Place]],
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
    stages: list[Any] = [source, wds.map(fill)]
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
