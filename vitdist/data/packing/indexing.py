"""Makes an index: a row for every sample of every shard, the tables, and index.json last of all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitdist.data.index import (
    FORMAT,
    INDEX_NAME,
    SAMPLE_DTYPE,
    DatasetIndex,
    Shard,
    Split,
    Table,
    describe_split,
    load_index,
    render_index,
)
from vitdist.data.storage.shard_content import ShardContent, read_shard
from vitdist.data.storage.tar import BLOCK
from vitdist.durable import write_whole
from vitdist.errors import DataError
from vitdist.taxonomy import Taxonomy

NO_GROUP = -1
LabelOf = Callable[[str, Mapping[str, bytes]], tuple[int, int]]
"""(key, bytes of the sample's json and cls members) -> (label, group or -1); DataError when the sample has no label."""

Indexed = tuple[Split, np.ndarray]
"""A split's entry in index.json and its rows."""


def rows_of(
    content: ShardContent,
    number: int,
    suffixes: list[str],
    label_of: LabelOf,
    shard: str,
    unlabelled: list[str] | None = None,
) -> np.ndarray:
    """SAMPLE_DTYPE rows of shard `number`; `suffixes` grows by those not met before.

    A sample without a label is a DataError or, where a list for them is given, left out and named there.
    """
    rows: list[tuple[int, ...]] = []
    for sample in content.samples:
        image = sample.image
        assert image is not None
        try:
            label, group = label_of(sample.key, sample.texts)
        except DataError as error:
            if unlabelled is None:
                raise DataError(f"{shard}: sample {sample.key!r}: {error}") from None
            unlabelled.append(f"{shard}: sample {sample.key!r}: {error}")
            continue
        if sample.suffix not in suffixes:
            suffixes.append(sample.suffix)
        blocks, suffix = (image.offset - image.start) // BLOCK, suffixes.index(sample.suffix)
        rows.append((number, blocks, suffix, image.offset, image.length, label, group, sample.checksum))
    return np.array(rows, SAMPLE_DTYPE)


def index_split(root: Path, name: str, paths: Sequence[str | Path], label_of: LabelOf) -> Indexed:
    """One split's entry and rows; paths under `root` are stored relative to it, others as they are."""
    shards: list[Shard] = []
    tables: list[np.ndarray] = []
    suffixes: list[str] = []
    for number, path in enumerate(paths):
        content = read_shard(path)
        tables.append(rows_of(content, number, suffixes, label_of, str(path)))
        shards.append(Shard(stored_path(root, path), content.bytes, content.sha256, len(content.samples)))
    rows = np.concatenate(tables) if tables else np.zeros(0, SAMPLE_DTYPE)
    return make_split(root, name, shards, suffixes, rows), rows


def make_split(root: Path, name: str, shards: Sequence[Shard], suffixes: Sequence[str], rows: np.ndarray) -> Split:
    """A split's entry for rows that are to be written to `NAME/samples.bin`."""
    table = Table(f"{name}/samples.bin", rows.nbytes, hashlib.sha256(rows.tobytes()).hexdigest())
    num_groups = len(np.unique(rows["group"][rows["group"] != NO_GROUP]))
    return Split(name, tuple(shards), len(rows), tuple(suffixes), num_groups, table, root)


def stored_path(root: Path, path: str | Path) -> str:
    """A shard's path as an index in `root` gives it: relative where it lies below, else absolute."""
    absolute, base = os.path.abspath(path), os.path.abspath(root)
    return os.path.relpath(absolute, base) if absolute.startswith(base + os.sep) else absolute


def index_bytes(name: str, taxonomy: Taxonomy, splits: Sequence[Indexed], preparation: Mapping[str, Any]) -> bytes:
    """index.json; DataError when a label is outside the tree."""
    for split, rows in splits:
        if rows.size and not 0 <= rows["label"].min() <= rows["label"].max() < taxonomy.num_nodes:
            raise DataError(f"split {split.name!r} has a label outside the class tree's {taxonomy.num_nodes} nodes")
    content = {
        "format": FORMAT,
        "name": name,
        "preparation": dict(preparation),
        "taxonomy": taxonomy.to_json(),
        "splits": {split.name: describe_split(split) for split, _ in splits},
    }
    return render_index(content)


def write_index(root: Path, index: bytes, splits: Sequence[Indexed]) -> DatasetIndex:
    """Write each split's table and, last of all, index.json; returns what was written, read back.

    An older index is taken away first, so that none ever stands beside tables of another.
    """
    (root / INDEX_NAME).unlink(missing_ok=True)
    for split, rows in splits:
        write_whole(root / split.table.path, rows.tobytes())
    write_whole(root / INDEX_NAME, index)
    return load_index(root)


def build_index(
    root: str | Path,
    splits: Mapping[str, Sequence[str | Path]],
    taxonomy: Taxonomy,
    *,
    label_of: LabelOf,
    name: str | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> DatasetIndex:
    """Index the tar files of each split into `root`; DataError names the shard and member that stands in the way."""
    root = Path(root)
    indexed = [index_split(root, split, paths, label_of) for split, paths in splits.items()]
    return write_index(root, index_bytes(name or root.name, taxonomy, indexed, preparation or {}), indexed)
