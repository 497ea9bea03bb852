"""The input's speed on one core: its parts, the whole, the bare loop of the same work, and what others write."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from vitdist.data import augmentations as ops
from vitdist.data import rivals
from vitdist.data.images import decode, decode_scaled, read_header
from vitdist.data.index import Split
from vitdist.data.loader import Collate, Load, TrainSource, batches
from vitdist.data.plan import TrainPlan, make_plan
from vitdist.data.shards import ShardReader
from vitdist.data.transforms import Augment, Preprocessing, TrainTransform, prepare_worker, resize
from vitdist.data.views import everything

OURS, BARE, FOLDER, PLAIN, LENT = (
    "the whole input, one worker",
    "the same work bare in a loop",
    "ImageFolder + PIL + v2 float",
    'webdataset, decode("pil") + v2 float',
    "webdataset with our decoder",
)


@dataclass(frozen=True)
class Speed:
    """Images a second of one core's time: the median over rounds, and each round's."""

    name: str
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@contextmanager
def on_one_core() -> Iterator[None]:
    """This process and all that it starts: a worker and its reader share the core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure_data(
    split: Split, preprocessing: Preprocessing, augment: Augment, *, batch: int, num_rounds: int, with_rivals: bool
) -> list[Speed]:
    """Every candidate once a round, round after round, so that a busy machine is as unfair to one as to another."""
    prepare_worker()
    with tempfile.TemporaryDirectory(prefix="vitdist-bench-") as scratch, on_one_core():
        candidates = _candidates(split, preprocessing, augment, batch)
        if with_rivals:
            rivals.unpack(split, Path(scratch))
            candidates |= _rivals(split, preprocessing, augment, batch, Path(scratch))
        found: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(num_rounds):
            for name, run in candidates.items():
                count, seconds = run()
                found[name].append(count / seconds)
    return [Speed(name, rounds) for name, rounds in found.items()]


Candidate = Callable[[], tuple[int, float]]


def _candidates(split: Split, preprocessing: Preprocessing, augment: Augment, batch: int) -> dict[str, Candidate]:
    reader = ShardReader(split)
    data = [reader.read(row) for row in range(split.num_samples)]
    rows = range(split.num_samples)
    bare = _Bare(preprocessing, augment)
    return {
        "reading": lambda: _timed(reader.read(row) for row in rows),
        "decoding": lambda: _timed(decode(one) for one in data),
        BARE: lambda: _timed(bare(number, one) for number, one in enumerate(data)),
        OURS: _Streamed(lambda: our_loader(split, preprocessing, augment, batch), split.num_samples),
    }


def _rivals(
    split: Split, preprocessing: Preprocessing, augment: Augment, batch: int, folder: Path
) -> dict[str, Candidate]:
    usual, ours = rivals.usual_transform(preprocessing, augment), TrainTransform(preprocessing, augment)
    count = split.num_samples
    return {
        FOLDER: _Streamed(lambda: rivals.image_folder(folder, usual, batch), count),
        PLAIN: _Streamed(lambda: rivals.plain_webdataset(split, usual, batch), count),
        LENT: _Streamed(lambda: rivals.webdataset_with_our_decoder(split, ours, batch), count),
    }


def our_loader(split: Split, preprocessing: Preprocessing, augment: Augment, batch: int) -> DataLoader[Any]:
    """One rank's input as training has it, with one worker."""
    plan = plan_of(split, batch)
    source = TrainSource(plan, rank=0, world=1, micro_batch_size=batch, start=0)
    load = Load(split, TrainTransform(preprocessing, augment))
    return batches(source, load, Collate(preprocessing.image_size), batch, num_workers=1)


def plan_of(split: Split, batch: int) -> TrainPlan:
    none = np.empty(0, np.int32)
    return make_plan(everything(split.shard_starts), none, sampling="uniform", global_batch_size=batch, seed=1)


class _Bare:
    """Decode, crop, resize: what any input must do for such a view, with boxes drawn beforehand."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment) -> None:
        self._size, self._mode = preprocessing.image_size, preprocessing.interpolation
        self._augment = augment
        self._draws = np.random.default_rng(0).random((256, 2 * ops.NUM_BOX_DRAWS)).tolist()

    def __call__(self, number: int, data: bytes) -> np.ndarray:
        header = read_header(data)
        draws = self._draws[number % len(self._draws)]
        box = ops.random_crop(header.height, header.width, self._augment.crop_scale, self._augment.crop_ratio, draws)
        factor = header.factor(box.height, box.width, self._size)
        crop = box.cut(decode_scaled(data, header, factor, fast=True), factor)
        return resize(crop, self._size, self._size, self._mode)


class _Streamed:
    """Times a loader between its first batch, when its worker runs and its queue fills, and an epoch's last."""

    def __init__(self, make: Callable[[], DataLoader[Any]], num_samples: int) -> None:
        self._make, self._num_samples = make, num_samples

    def __call__(self) -> tuple[int, float]:
        loader = self._make()
        stream = iter(loader)
        first = next(stream)
        count, limit = 0, self._num_samples - 2 * _length(first)
        started = core_seconds()
        for batch in stream:
            count += _length(batch)
            if count >= limit:
                break
        seconds = core_seconds() - started
        del stream, loader
        return count, seconds


def _length(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, (list, tuple)) else len(batch)


def _timed(work: Iterable[Any]) -> tuple[int, float]:
    started = core_seconds()
    count = sum(1 for _ in work)
    return count, core_seconds() - started


def core_seconds() -> float:
    """A core's time that this process and its workers have had: what a busy machine gives to others is not in it."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with suppress(OSError):  # it has ended
            total += int(Path(f"/proc/{child.pid}/schedstat").read_text().split()[0]) / 1e9
    return total


def profile(split: Split, preprocessing: Preprocessing, augment: Augment, batch: int) -> str:
    """Where an epoch in this process spends its time, by function."""
    import cProfile
    import io
    import pstats

    plan = plan_of(split, batch)
    source = TrainSource(plan, rank=0, world=1, micro_batch_size=batch, start=0)
    load = Load(split, TrainTransform(preprocessing, augment))
    loader = batches(source, load, Collate(preprocessing.image_size), batch, num_workers=0)
    watch, text = cProfile.Profile(), io.StringIO()
    watch.enable()
    for _ in itertools.islice(loader, plan.steps_per_epoch):
        pass
    watch.disable()
    pstats.Stats(watch, stream=text).sort_stats("tottime").print_stats(25)
    return text.getvalue()


def table(found: list[Speed]) -> str:
    """Speeds with what ours is of each."""
    ours = next(speed.median for speed in found if speed.name == OURS)
    lines = [f"{'one core':38s} {'img/s':>8} {'worst - best round':>20} {'ours is':>9}"]
    for speed in found:
        spread = f"{min(speed.rounds):.0f} - {max(speed.rounds):.0f}"
        lines.append(f"{speed.name:38s} {speed.median:8.0f} {spread:>20} {ours / speed.median:7.2f} x")
    return "\n".join(lines)
