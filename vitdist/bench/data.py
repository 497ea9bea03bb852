"""The input's speed on one core: its parts, the whole, the bare loop of the same work, and what others write."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitdist.bench.cores import WARM_UP, Taken, bare, streamed
from vitdist.data import rivals
from vitdist.data.index import Split
from vitdist.data.loading.load import Load
from vitdist.data.loading.loader import Loader, batches
from vitdist.data.loading.places import TrainSource
from vitdist.data.pixels import augmentations as ops
from vitdist.data.pixels.images import decode, decode_scaled, read_header
from vitdist.data.pixels.transforms import Augment, Preprocessing, TrainTransform, resize
from vitdist.data.plan import TrainPlan, make_plan
from vitdist.data.storage.shards import ShardReader
from vitdist.data.views import everything

OURS, BARE, FOLDER, PLAIN, LENT = (
    "the whole input, one worker",
    "the same decode, crop, resize, bare",
    "ImageFolder + PIL + v2 float",
    'webdataset, decode("pil") + v2 float',
    "webdataset with our decoder",
)
Candidate = Callable[[], Taken]


@dataclass(frozen=True)
class Speed:
    """Images a second, a round each."""

    name: str
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Wish:
    """What is measured: photographs, how they are prepared, and in what batches."""

    split: Split
    preprocessing: Preprocessing
    augment: Augment
    batch: int

    @property
    def most(self) -> int:
        """Photographs that are timed: an epoch's, less the warm-up and what a pipeline's end would blur."""
        return self.split.num_samples - (WARM_UP + 2) * self.batch

    def of(self, split: Split) -> Wish:
        """The same of other photographs."""
        return replace(self, split=split, batch=batch_of(split.num_samples))

    def transform(self) -> TrainTransform:
        return TrainTransform(self.preprocessing, self.augment)

    def plan(self) -> TrainPlan:
        none = np.empty(0, np.int32)
        view = everything(self.split.shard_starts)
        return make_plan(view, none, sampling="uniform", global_batch_size=self.batch, seed=1)

    def loader(self, num_workers: int = 1, position: int = 0) -> Loader:
        """One rank's input as training has it."""
        plan = self.plan()
        source = TrainSource(plan, rank=0, world=1, micro_batch_size=self.batch, start=position)
        load = Load(self.split, self.transform(), replacement=plan.replacement)
        return batches(source, load, self.preprocessing.image_size, self.batch, num_workers=num_workers)


def measure(candidates: dict[str, Candidate], num_rounds: int, *, by_clock: bool = False) -> list[Speed]:
    """Every candidate once a round, round after round, so that a busy machine is as unfair to one as to another."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(num_rounds):
        for name, run in candidates.items():
            taken = run()
            found[name].append(taken.count / (taken.clock if by_clock else taken.core))
    return [Speed(name, rounds) for name, rounds in found.items()]


def our_parts(wish: Wish) -> dict[str, Candidate]:
    """Reading, decoding, the bare loop, and the whole."""
    reader, count = ShardReader(wish.split), wish.split.num_samples
    data = [reader.read(row) for row in range(count)]
    loop = BareLoop(wish, data)
    return {
        "reading": lambda: bare(reader.read(row) for row in range(count)),
        "decoding": lambda: bare(decode(one) for one in data),
        BARE: lambda: bare(loop(number) for number in range(len(loop))),
        OURS: lambda: streamed(wish.loader, wish.most),
    }


def others(wish: Wish, folder: Path) -> dict[str, Candidate]:
    """The same photographs, unpacked into `folder` where that is needed, through what people usually write."""
    rivals.unpack(wish.split, folder)
    usual, ours = rivals.usual_transform(wish.preprocessing, wish.augment), wish.transform()
    most = wish.most
    return {
        FOLDER: lambda: streamed(lambda: rivals.image_folder(folder, usual, wish.batch), most),
        PLAIN: lambda: streamed(lambda: rivals.plain_webdataset(wish.split, usual, wish.batch), most),
        LENT: lambda: streamed(lambda: rivals.webdataset_with_our_decoder(wish.split, ours, wish.batch), most),
    }


def batch_of(num_samples: int) -> int:
    """32, or less where a set would not have enough batches to time."""
    return max(1, min(32, num_samples // (2 * WARM_UP)))


class BareLoop:
    """Decode, crop, resize and nothing else: an epoch's very crops, drawn beforehand, of bytes that are in memory."""

    def __init__(self, wish: Wish, data: list[bytes]) -> None:
        self._size, self._mode = wish.preprocessing.image_size, wish.preprocessing.interpolation
        self._augment = wish.augment
        plan = wish.plan()
        slots = [plan.slots(position, 0, wish.batch) for position in range(plan.steps_per_epoch)]
        self._work = [
            (data[row], draws.crop)
            for slot in slots
            for row, draws in zip(slot.rows.tolist(), TrainTransform.draw(slot.seeds.tolist()), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._work)

    def __call__(self, number: int) -> np.ndarray:
        data, draws = self._work[number]
        header = read_header(data)
        box = ops.random_crop(header.height, header.width, self._augment.crop_scale, self._augment.crop_ratio, draws)
        factor = header.factor(box.height, box.width, self._size)
        crop = box.cut(decode_scaled(data, header, factor, fast=True), factor)
        return resize(crop, self._size, self._size, self._mode)


def profile(wish: Wish) -> str:
    """Where an epoch in this process spends its time, by function."""
    import cProfile
    import io
    import pstats

    watch, text = cProfile.Profile(), io.StringIO()
    loader = wish.loader(num_workers=0)
    watch.enable()
    for _ in itertools.islice(loader, wish.plan().steps_per_epoch):
        pass
    watch.disable()
    pstats.Stats(watch, stream=text).sort_stats("tottime").print_stats(25)
    return text.getvalue()


def table(found: list[Speed], title: str, reference: str, heading: str = "ours is") -> str:
    """Speeds, and of each round what the reference is of each: the median of those ratios."""
    base = next(speed for speed in found if speed.name == reference)
    lines = [f"{title:44s} {'img/s':>7} {'worst - best round':>20} {heading:>9}"]
    for speed in found:
        spread = f"{min(speed.rounds):.0f} - {max(speed.rounds):.0f}"
        ratio = statistics.median(mine / its for mine, its in zip(base.rounds, speed.rounds, strict=True))
        lines.append(f"{speed.name:44s} {speed.median:7.0f} {spread:>20} {ratio:7.2f} x")
    return "\n".join(lines)
