"""A copy of photographs of which one in a hundred is damaged: what `data.on_bad_sample: skip` costs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitdist.data.index import Split
from vitdist.data.storage.tar import BLOCK

SHARE = 0.01


def damaged_copy(split: Split, folder: Path, share: float = SHARE) -> tuple[Split, int]:
    """(copies of a split's shards with a byte changed in some photographs and headers, how many)."""
    folder.mkdir()
    shards = []
    for number, shard in enumerate(split.shards):
        place = folder / f"{number:06d}.tar"
        shutil.copyfile(split.shard_file(number), place)
        shards.append(replace(shard, path=str(place)))
    count = max(1, round(share * split.num_samples))
    for turn, row in enumerate(np.linspace(0, split.num_samples - 1, count).astype(int).tolist()):
        record = split.samples[row]
        offset = int(record["offset"]) + (int(record["length"]) // 2 if turn % 2 else 3 - BLOCK)
        _flip(Path(shards[int(record["shard"])].path), offset)
    return replace(split, shards=tuple(shards), base=""), count


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
