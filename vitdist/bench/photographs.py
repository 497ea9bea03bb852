"""What the input is measured on: the photographs of all splits of a set, or enlarged ones of a camera's size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from vitdist.data.index import DatasetIndex, Shard, Split, Table
from vitdist.data.packing.pack import Packing, pack
from vitdist.data.pixels.images import decode
from vitdist.data.sources.photograph import SourceSample
from vitdist.data.storage.shards import ShardReader
from vitdist.errors import DataError

MOST = 2000  # photographs of a large set: they are held in memory, and written out as files for ImageFolder
NUM_LARGE = 24
CAMERA_PIXELS = 12_000_000


def all_photographs(index: DatasetIndex, folder: Path, most: int = MOST) -> Split:
    """One split of the first photographs of each split of a set, where they lie; its table goes into `folder`."""
    rows, shards, suffixes = list[np.ndarray](), list[Shard](), list[str]()
    for split in index.splits.values():
        split.check_shards()
        part = np.array(split.samples[: -(-most // len(index.splits))])
        counts = np.bincount(part["shard"], minlength=len(split.shards)).tolist()
        places = [len(suffixes) + n for n in range(len(split.suffixes))]
        part["shard"] += len(shards)
        part["suffix"] = np.array(places, np.uint16)[part["suffix"]]
        rows.append(part)
        shards += [
            replace(shard, path=split.shard_file(number), samples=count)
            for number, (shard, count) in enumerate(zip(split.shards, counts, strict=True))
        ]
        suffixes += split.suffixes
    table = np.concatenate(rows)
    if not len(table):
        raise DataError(f"{index.root} has no photographs to measure with")
    table.tofile(folder / "samples.bin")
    cache = next(iter(index.splits.values())).cache
    place = Table("samples.bin", table.nbytes, "")
    return Split("all", tuple(shards), len(table), tuple(suffixes), 0, place, folder, cache=cache)


@dataclass(frozen=True)
class _Bytes:
    """An image that is in memory, as a source for packing."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


def large_photographs(index: DatasetIndex, some: Split, folder: Path) -> DatasetIndex:
    """A packed set of some photographs enlarged to 12 megapixels, as cameras in the field make them."""
    reader = ShardReader(some)
    chosen = np.linspace(0, some.num_samples - 1, NUM_LARGE).astype(int).tolist()
    samples = []
    for row in chosen:
        labels = index.taxonomy.path_names(int(some.samples["label"][row]))
        image = _Bytes(_enlarged(reader.read(row)))
        samples.append(SourceSample(f"{row:06d}", "train", labels, image, f"row {row}"))
    reader.close()
    return pack(samples, index.taxonomy, folder, Packing("large"))


def _enlarged(data: bytes) -> bytes:
    pixels = decode(data)
    scale = (CAMERA_PIXELS / (pixels.shape[0] * pixels.shape[1])) ** 0.5
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    large = np.ascontiguousarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC))
    return bytes(simplejpeg.encode_jpeg(large, quality=90, colorsubsampling="420"))
