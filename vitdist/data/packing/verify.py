"""Compares a packed set with its index, down to every byte."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vitdist.data.index import INDEX_NAME, DatasetIndex, Split, is_intact, is_url, load_index
from vitdist.data.storage.cache import ShardCache
from vitdist.data.storage.remote_set import fetch_set
from vitdist.data.storage.shard_content import ShardContent, read_remote, read_shard
from vitdist.data.storage.tar import BLOCK
from vitdist.errors import DataError


def verify(path: str | Path) -> list[str]:
    """What is wrong with a packed set, one line a problem; empty when every shard, member and hash is as indexed.

    Reads all of it, also what is at an address; of that nothing is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            index = fetch_set(str(path), ShardCache(Path(folder))) if is_url(str(path)) else load_index(path)
        except DataError as error:
            return [str(error)]
        return _problems(index)


def _problems(index: DatasetIndex) -> list[str]:
    problems = _index_problems(index)
    work: list[tuple[Split, int, bool]] = []
    for split in index.splits.values():
        of_table = _table_problems(split, index.taxonomy.num_nodes)
        work += [(split, number, not of_table) for number in range(len(split.shards))]
        problems += of_table
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda item: shard_problems(*item), work):
            problems += found
    return problems


def _index_problems(index: DatasetIndex) -> list[str]:
    path = index.root / INDEX_NAME
    if not is_intact(path.read_bytes()):
        return [f"{path}: it is not as vitdist wrote it; copy it again or pack the set again"]
    return []


def _table_problems(split: Split, num_nodes: int) -> list[str]:
    path = split.root / split.table.path
    rows = split.samples
    if hashlib.sha256(rows.tobytes()).hexdigest() != split.table.sha256:
        return [f"{path}: its sha256 is not the index's; copy it again or pack the set again"]
    numbers = np.repeat(np.arange(len(split.shards)), np.diff(split.shard_starts))
    if not np.array_equal(rows["shard"], numbers):
        return [f"{path}: its rows do not follow the order of the shards"]
    if len(rows) and not 0 <= rows["label"].min() <= rows["label"].max() < num_nodes:
        return [f"{path}: a label is outside the class tree"]
    return []


def shard_problems(split: Split, number: int, has_rows: bool = True) -> list[str]:
    """What is wrong with one shard; a damaged member is named where the rows can be trusted, else the shard's hash."""
    shard, path = split.shards[number], split.shard_file(number)
    try:
        content = read_remote(path) if is_url(path) else read_shard(path)
    except DataError as error:
        return [str(error)]
    rows = split.samples[split.shard_starts[number] : split.shard_starts[number + 1]]
    problems = _member_problems(content, rows, split.suffixes, path) if has_rows else []
    if not problems and (content.bytes, content.sha256) != (shard.bytes, shard.sha256):
        problems = [f"{path}: its {content.bytes} bytes have another sha256 than the index says ({shard.bytes} bytes)"]
    return problems


def _member_problems(content: ShardContent, rows: np.ndarray, suffixes: tuple[str, ...], path: str) -> list[str]:
    """Rows whose image is another or elsewhere; images without a row are those that indexing left out."""
    there = {sample.image.offset: sample for sample in content.samples if sample.image is not None}
    problems = []
    for row in rows:
        sample = there.get(int(row["offset"]))
        image = sample.image if sample is not None else None
        if sample is None or image is None:
            problems.append(f"{path}: no image begins at byte {row['offset']}, where the index has one")
        elif (image.length, image.offset - image.start) != (row["length"], int(row["header_blocks"]) * BLOCK):
            problems.append(f"{path}: {image.name!r} is not where the index has it")
        elif sample.checksum != row["checksum"] or sample.suffix not in suffixes[row["suffix"] : row["suffix"] + 1]:
            problems.append(f"{path}: {image.name!r} has other bytes than were indexed")
    return problems
