"""Packs photographs into plain WebDataset shards with an index, so that a repeated packing gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdist.data.index import DatasetIndex, load_index
from vitdist.data.packing.indexing import NO_GROUP, LabelOf, build_index
from vitdist.data.packing.staging import SKIPPED_NAME, require_space, staged
from vitdist.data.sources.intake import BadImage, Prepared, prepare
from vitdist.data.sources.photograph import SourceSample
from vitdist.data.storage.keys import split_name
from vitdist.durable import write_whole
from vitdist.errors import DataError, UsageError
from vitdist.taxonomy import Taxonomy

SHARD_BYTES = 128 << 20
NUM_SHARDS = 24  # an epoch is cut into ranges of shards that nodes share out; 24 divides by most numbers of them
MIN_SAMPLES = 8  # a shard, unless the split has fewer
MEMBER_OVERHEAD = 3 * 512 + 1024  # two headers, padding, and the json beside an image
Progress = Callable[[int, int], None]
"""(photographs done, of how many); called after each."""


@dataclass(frozen=True)
class Packing:
    """How to pack. Everything here may change the bytes and is written into the index; `source` is told there too."""

    name: str
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    short_side: int | None = None
    skip_bad: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        settings = {"seed": self.seed, "shard_bytes": self.shard_bytes, "short_side": self.short_side}
        return {"tool": "vitdist", **self.source, **settings}


def pack(
    samples: Sequence[SourceSample],
    taxonomy: Taxonomy,
    out: str | Path,
    packing: Packing,
    *,
    overwrite: bool = False,
    left_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> DatasetIndex:
    """Pack samples into the folder `out`, which appears complete or not at all; `staged` says what may stand there.

    DataError names the first image that is none, UsageError another set at `out`, ResourceError a full disk.
    """
    with staged(Path(out), overwrite=overwrite) as stage:
        write_packed(samples, taxonomy, stage, packing, left_out=left_out, progress=progress)
    return load_index(out)


def write_packed(
    samples: Sequence[SourceSample],
    taxonomy: Taxonomy,
    folder: Path,
    packing: Packing,
    *,
    left_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> DatasetIndex:
    """Write shards, tables and index into a folder of the caller's; `pack` without its staging.

    `left_out` names what the source itself could not give, a line each; it is listed with the bad photographs.
    """
    _check(samples, packing)
    if packing.short_side is None:
        require_space(folder, sum(sample.image.num_bytes + MEMBER_OVERHEAD for sample in samples))
    writer = _Writer(packing, _group_ids(samples), len(samples), progress)
    writer.skipped += left_out
    paths: dict[str, list[str | Path]] = {}
    for split in sorted({sample.split for sample in samples}, key=_split_order):
        chosen = in_packed_order([sample for sample in samples if sample.split == split], packing.seed)
        files = [folder / split / f"{number:06d}.tar" for number in range(num_shards(chosen, packing.shard_bytes))]
        parts = zip(files, cut(chosen, len(files)), strict=True)
        paths[split] = [path for path, part in parts if writer.write(path, part)]
    if writer.skipped:
        write_whole(folder / SKIPPED_NAME, json.dumps(sorted(writer.skipped), indent=1) + "\n")
    preparation = {**packing.to_json(), "skipped": len(writer.skipped)}
    label_of = packed_label(taxonomy)
    return build_index(folder, paths, taxonomy, label_of=label_of, name=packing.name, preparation=preparation)


def in_packed_order(samples: Sequence[SourceSample], seed: int) -> list[SourceSample]:
    """Samples in the order they are packed: by a hash of seed and key, so that it depends on no listing or library."""

    def rank(sample: SourceSample) -> bytes:
        return hashlib.sha256(f"{seed}/{sample.split}/{sample.key}".encode()).digest()

    return sorted(samples, key=rank)


def num_shards(samples: Sequence[SourceSample], shard_bytes: int) -> int:
    """How many shards a split gets: 24 where it has enough samples, more where they would exceed `shard_bytes`."""
    num_bytes = sum(sample.image.num_bytes + MEMBER_OVERHEAD for sample in samples)
    return min(len(samples), max(1, -(-num_bytes // shard_bytes), min(NUM_SHARDS, len(samples) // MIN_SAMPLES)))


def cut(samples: Sequence[SourceSample], num_parts: int) -> list[Sequence[SourceSample]]:
    """Contiguous parts whose sizes differ by at most one."""
    bounds = [len(samples) * part // num_parts for part in range(num_parts + 1)]
    return [samples[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


def packed_label(taxonomy: Taxonomy) -> LabelOf:
    """Reads a label from the json that `write_packed` puts beside an image."""

    def label_of(key: str, texts: Mapping[str, bytes]) -> tuple[int, int]:
        try:
            record = json.loads(texts["json"])
            return node_of(taxonomy, record["labels"]), int(record.get("group", NO_GROUP))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"its json gives no labels: {error!r}") from None

    return label_of


def node_of(taxonomy: Taxonomy, labels: Mapping[str, str]) -> int:
    """The finest node that `labels` (names by level) gives; DataError when the tree has none of them."""
    for level in reversed(taxonomy.levels):
        if level in labels:
            return taxonomy.node(level, labels[level])
    raise DataError(f"no label at any of the levels {', '.join(taxonomy.levels)}")


class _Writer:
    """Writes shards one after the other while threads read and shrink the photographs that come next."""

    def __init__(
        self, packing: Packing, groups: Mapping[str, int], num_samples: int, progress: Progress | None
    ) -> None:
        self.packing, self.groups = packing, groups
        self.num_samples, self.num_done, self.progress = num_samples, 0, progress
        self.skipped: list[str] = []

    def write(self, path: Path, samples: Sequence[SourceSample]) -> bool:
        """Write one shard, on disk when this returns; False when all its photographs were bad and there is no shard."""
        from webdataset.writer import TarWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        num_written = 0
        with open(path, "wb") as file:
            with TarWriter(file, user="vitdist", group="vitdist", mtime=0, encoder=False) as tar:
                for sample, image in self._prepared(samples):
                    tar.write({"__key__": sample.key, image.suffix: image.data, "json": self._record(sample, image)})
                    num_written += 1
            file.flush()
            os.fsync(file.fileno())
        if not num_written:
            path.unlink()
        return num_written > 0

    def _prepared(self, samples: Sequence[SourceSample]) -> Iterator[tuple[SourceSample, Prepared]]:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque[tuple[SourceSample, Future[Prepared]]] = deque()
        with ThreadPoolExecutor(num_threads) as pool:
            for sample in samples:
                waiting.append((sample, pool.submit(self._prepare, sample)))
                if len(waiting) > 4 * num_threads:  # bounds the bytes held
                    yield from self._next(waiting)
            while waiting:
                yield from self._next(waiting)

    def _prepare(self, sample: SourceSample) -> Prepared:
        return prepare(sample.image.read(), sample.where, self.packing.short_side)

    def _next(self, waiting: deque[tuple[SourceSample, Future[Prepared]]]) -> Iterator[tuple[SourceSample, Prepared]]:
        sample, future = waiting.popleft()
        try:
            yield sample, future.result()
        except BadImage as error:
            if not self.packing.skip_bad:
                raise DataError(f"{error}; replace it, or leave broken images out with --on-bad skip") from None
            self.skipped.append(str(error))
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, self.num_samples)

    def _record(self, sample: SourceSample, image: Prepared) -> bytes:
        record = {**sample.details, "labels": dict(sample.labels), "width": image.width, "height": image.height}
        if "box" in record:
            record["box"] = [round(value * image.scale, 2) for value in record["box"]]
        if sample.group is not None:
            record["group"] = self.groups[sample.group]
            record["group_name"] = sample.group
        return json.dumps(record, ensure_ascii=False).encode()


def _check(samples: Sequence[SourceSample], packing: Packing) -> None:
    """What would make a set that cannot be read back."""
    if not samples:
        raise DataError("there is no photograph to pack")
    if packing.shard_bytes < 1 or (packing.short_side is not None and packing.short_side < 1):
        raise UsageError("--shard-bytes and --short-side must be at least 1")
    for sample in samples:
        if split_name(f"{sample.key}.jpg") != (sample.key, "jpg"):
            raise DataError(f"{sample.key!r} ({sample.where}) cannot be a WebDataset key: it may hold no dot")
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        raise DataError(f"{count} photographs have the key {key!r}; keys must be unique")


def _group_ids(samples: Sequence[SourceSample]) -> dict[str, int]:
    """Group names numbered in sorted order, the same for the same set."""
    return {name: number for number, name in enumerate(sorted({s.group for s in samples if s.group is not None}))}


def _split_order(name: str) -> tuple[int, str]:
    known = ("train", "val", "test")
    return (known.index(name) if name in known else len(known), name)
