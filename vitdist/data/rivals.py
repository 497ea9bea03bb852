"""The same photographs through the pipelines that people usually write, to measure ours against (`vitdist bench data`).

Each is a torch DataLoader over what its own documentation shows: torchvision's ImageFolder with PIL and v2 transforms
in float, and a plain webdataset pipeline that decodes with PIL; the last takes our decoder into the plain pipeline.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from vitdist.data.index import Split
from vitdist.data.loading.load import TOGETHER
from vitdist.data.pixels.transforms import Augment, Draws, Preprocessing, TrainTransform, prepare_worker
from vitdist.data.storage.shards import ShardReader


def usual_transform(preprocessing: Preprocessing, augment: Augment) -> Callable[[Image.Image], torch.Tensor]:
    """PIL -> float [3, S, S], normalised: v2's classes for what the recipe asks, in the order its documentation has."""
    size, mode = preprocessing.image_size, v2.InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(size, scale=augment.crop_scale, ratio=augment.crop_ratio, interpolation=mode)
    steps: list[Any] = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        crop,
        v2.RandomHorizontalFlip(augment.flip),
    ]
    if augment.rotation:
        steps.append(v2.RandomRotation(augment.rotation))
    if any(augment.jitter):
        steps.append(v2.ColorJitter(*augment.jitter))
    steps.append(v2.Normalize(preprocessing.mean, preprocessing.std))
    return v2.Compose(steps)


def image_folder(
    folder: Path,
    transform: Callable[[Image.Image], torch.Tensor],
    batch: int,
    opener: Callable[[str], Any] = default_loader,
) -> DataLoader[Any]:
    """torchvision's ImageFolder."""
    data = ImageFolder(str(folder), transform, loader=opener)
    return DataLoader(data, batch, shuffle=True, num_workers=1, worker_init_fn=_start, prefetch_factor=4)


def plain_webdataset(split: Split, transform: Callable[[Image.Image], torch.Tensor], batch: int) -> DataLoader[Any]:
    """decode("pil"), as its documentation writes it."""
    pipeline = wds.WebDataset(_files(split), shardshuffle=100, empty_check=False).shuffle(1000).decode("pil")
    return _loader(pipeline.map(_Pair(transform, split.suffixes)), batch)


def webdataset_with_our_decoder(split: Split, transform: TrainTransform, batch: int) -> DataLoader[Any]:
    """The plain pipeline's reading and shuffling, our decoding and augmenting, uint8 batches."""
    pipeline = wds.WebDataset(_files(split), shardshuffle=100, empty_check=False).shuffle(1000)
    return _loader(pipeline.map(_OurPair(transform, split.suffixes)), batch)


def unpack(split: Split, folder: Path) -> None:
    """Write a packed split as one folder per class, the bytes as they are: what ImageFolder reads."""
    reader = ShardReader(split)
    for row in range(split.num_samples):
        record = split.samples[row]
        path = folder / f"{int(record['label']):06d}" / f"{row:08d}.{split.suffixes[record['suffix']]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(row))
    reader.close()


def _files(split: Split) -> list[str]:
    return [split.shard_file(number) for number in range(len(split.shards))]


def _loader(pipeline: Any, batch: int) -> DataLoader[Any]:
    stages = pipeline.batched(batch, partial=True)
    return DataLoader(stages, batch_size=None, num_workers=1, worker_init_fn=_start, prefetch_factor=4)


class _Pair:
    """(image, label) of a webdataset sample decoded by PIL."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], suffixes: tuple[str, ...]) -> None:
        self._transform, self._suffixes = transform, suffixes

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        image = next(sample[suffix] for suffix in self._suffixes if suffix in sample)
        return self._transform(image), _label(sample.get("json", {}))


class _OurPair:
    """The same of a sample's bytes by our transform."""

    def __init__(self, transform: TrainTransform, suffixes: tuple[str, ...]) -> None:
        self._transform, self._suffixes, self._draws = transform, suffixes, _draws(transform)

    def __call__(self, sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        data = next(sample[suffix] for suffix in self._suffixes if suffix in sample)
        return self._transform(data, next(self._draws)), _label(json.loads(sample.get("json", b"{}")))


def _draws(transform: TrainTransform) -> Iterator[Draws]:
    """Of one seed after the other, made together as our loader makes them."""
    for first in itertools.count(0, TOGETHER):
        yield from transform.draw(range(first, first + TOGETHER))


def _label(described: dict[str, Any]) -> str:
    return str(described.get("class", ""))


def _start(worker: int) -> None:
    prepare_worker()
