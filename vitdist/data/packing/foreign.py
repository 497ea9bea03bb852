"""Indexes shards somebody else wrote (jpg + cls, jpg + json...), where they lie, and says what it found in them."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitdist.data.index import INDEX_NAME, SAMPLE_DTYPE, DatasetIndex, Shard, is_url, load_index
from vitdist.data.packing.indexing import Indexed, index_bytes, make_split, rows_of, stored_path, write_index
from vitdist.data.packing.labels import LabelReader
from vitdist.data.storage.remote import check_address
from vitdist.data.storage.shard_content import ShardContent, read_remote, read_shard
from vitdist.errors import DataError, UsageError

SPLITS = ("train", "val", "test")
_WORD = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|test)(?=[^a-z]|$)")
_NAMED = re.compile(r"(train|val|test)=(.+)", re.DOTALL)
_SYNONYM = {"training": "train", "valid": "val", "validation": "val"}
_COMPRESSED = (".gz", ".tgz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True)
class ForeignSet:
    """The index that was written, what was found (a line each), and what was left out because it was bad."""

    index: DatasetIndex
    notes: list[str]
    skipped: list[str]


@dataclass
class _SplitSoFar:
    shards: list[Shard] = field(default_factory=list)
    tables: list[np.ndarray] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)


@dataclass
class _Findings:
    """What is counted while shards are read."""

    skipped: list[str] = field(default_factory=list)
    num_imageless: int = 0


def index_foreign(
    addresses: Sequence[str],
    out: str | Path,
    reader: LabelReader,
    *,
    name: str | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ForeignSet:
    """Index tar files, folders of them, globs, brace patterns and http(s) addresses into the folder `out`.

    The shards stay where they are. DataError names the first damaged shard or sample without a label, unless
    `skip_bad` leaves those out; UsageError when `out` has another index and `overwrite` is not given.
    """
    out = Path(out)
    shards = expand(addresses)
    splits: dict[str, _SplitSoFar] = {split: _SplitSoFar() for split in SPLITS}
    findings = _Findings()
    for number, (split, address) in enumerate(shards, 1):
        _add_shard(splits[split], address, out, reader, findings, skip_bad)
        if progress is not None:
            progress(number, len(shards))
    index = _write(out, name or out.name, splits, reader, len(findings.skipped), overwrite)
    return ForeignSet(index, [reader.describe(), *_notes(findings)], findings.skipped)


def expand(addresses: Sequence[str]) -> list[tuple[str, str]]:
    """(split, path or URL) of each shard, in order; DataError for a pattern without a match.

    The split is what stands before a '=' (train=a.tar), else what `split_of` finds in the path.
    """
    found: list[tuple[str, str]] = []
    for address in addresses:
        named = _NAMED.fullmatch(address)
        split, pattern = (named.group(1), named.group(2)) if named else (None, address)
        found += [(split or split_of(path), path) for path in _matches(pattern)]
    path, count = Counter(path for _, path in found).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path} is given {count} times; name each shard once")
    return found


def split_of(path: str) -> str:
    """The split that a file's name speaks of, or that its folder is called; train where neither says."""
    folder, _, name = path.partition("?")[0].lower().rpartition("/")
    words = _WORD.findall(name) or [word for word in (folder.rpartition("/")[2],) if _WORD.fullmatch(word)]
    return _SYNONYM.get(words[-1], words[-1]) if words else "train"


def _matches(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if pattern.startswith("pipe:"):
        raise UsageError(f"{pattern} is a shell command; shards are files or http(s) addresses")
    if os.path.exists(pattern):
        paths = [pattern]
    else:
        try:
            paths = list(braceexpand(pattern))
        except ValueError:
            raise UsageError(f"{pattern} has braces that do not match") from None
    return [match for path in paths for match in _local(path)]


def _local(path: str) -> list[str]:
    if is_url(path):
        check_address(path)
        return [path]
    if os.path.isdir(path):
        matches = sorted(str(match) for match in Path(path).rglob("*.tar"))
    else:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not matches:
        raise DataError(f"{path} does not exist or holds no .tar file")
    return matches


def _add_shard(
    split: _SplitSoFar, address: str, out: Path, reader: LabelReader, findings: _Findings, skip_bad: bool
) -> None:
    try:
        content = _read(address)
    except DataError as error:
        if not skip_bad:
            raise
        findings.skipped.append(str(error))
        return
    unlabelled = findings.skipped if skip_bad else None
    rows = rows_of(content, len(split.shards), split.suffixes, reader, address, unlabelled)
    findings.num_imageless += content.num_imageless
    path = address if is_url(address) else stored_path(out, address)
    split.shards.append(Shard(path, content.bytes, content.sha256, len(rows)))
    split.tables.append(rows)


def _read(address: str) -> ShardContent:
    if address.endswith(_COMPRESSED):
        raise DataError(f"{address} is compressed, so samples have no offsets in it; decompress it first")
    return read_remote(address) if is_url(address) else read_shard(address)


def _write(
    out: Path, name: str, splits: dict[str, _SplitSoFar], reader: LabelReader, num_skipped: int, overwrite: bool
) -> DatasetIndex:
    if not reader.values:
        raise DataError("no sample with an image and a label was found in these shards")
    taxonomy, nodes = reader.finish()
    indexed: list[Indexed] = []
    for split, found in splits.items():
        if found.shards:
            rows = np.concatenate([np.zeros(0, SAMPLE_DTYPE), *found.tables])
            rows["label"] = nodes[rows["label"]]
            indexed.append((make_split(out, split, found.shards, found.suffixes, rows), rows))
    preparation = {"tool": "vitdist", "source": "index", "labels": reader.where or "levels", "skipped": num_skipped}
    index = index_bytes(name, taxonomy, indexed, preparation)
    there = out / INDEX_NAME
    if there.is_file() and there.read_bytes() == index:
        return load_index(out)
    if there.exists() and not overwrite:
        raise UsageError(f"{out} has another index; give another --out, or --overwrite to replace it")
    return write_index(out, index, indexed)


def _notes(findings: _Findings) -> list[str]:
    notes = []
    if findings.num_imageless:
        notes.append(f"{findings.num_imageless} samples without a jpg, png or webp were left out")
    if findings.skipped:
        notes.append(f"{len(findings.skipped)} damaged shards or samples without a label were left out")
    return notes
