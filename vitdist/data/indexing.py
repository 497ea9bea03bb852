"""Makes an index: reads each shard once, front to back, and writes the rows and then index.json."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitdist.data.index import (
    FORMAT,
    IMAGE_SUFFIXES,
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
from vitdist.data.keys import split_name
from vitdist.data.tar import BLOCK, DamagedShard, Member, scan
from vitdist.errors import DataError
from vitdist.taxonomy import Taxonomy

MAX_IMAGE = 256 << 20
MAX_TEXT = 1 << 20
TEXT_SUFFIXES = ("json", "cls")
NO_GROUP = -1
LabelOf = Callable[[str, Mapping[str, bytes]], tuple[int, int]]
"""(key, bytes of the sample's json and cls members) -> (label, group or -1); DataError when the sample has no label."""


@dataclass
class Found:
    """One sample of a shard being read: its image, and its small text members by suffix."""

    key: str
    image: Member | None = None
    suffix: str = ""
    checksum: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardContent:
    """What one pass over a shard gave."""

    bytes: int
    sha256: str
    samples: list[Found]
    num_imageless: int = 0


class HashedFile:
    """A file read front to back that hashes every byte it passes; it cannot seek back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.digest = file, 0, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        while self.position < offset and self.read(min(1 << 20, offset - self.position)):
            pass
        return self.position


def read_shard(path: str | Path) -> ShardContent:
    """Every sample of a tar file with checksums, in one pass; DamagedShard, or DataError when it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return read_stream(file, str(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from None


def read_stream(file: BinaryIO, shard: str, size: int | None = None) -> ShardContent:
    """The same for an open file or a download; its length is needed only to see damage earlier."""
    hashed = HashedFile(file)
    found = list(_samples(hashed, shard, size))
    samples = [sample for sample in found if sample.image is not None]
    return ShardContent(hashed.position, hashed.digest.hexdigest(), samples, len(found) - len(samples))


def _samples(file: HashedFile, shard: str, size: int | None) -> Iterator[Found]:
    """Neighbouring members of one key are one sample, as for `webdataset`."""
    current: Found | None = None
    for member in scan(file, shard, size):
        names = split_name(member.name)
        if names is None:
            continue
        key, suffix = names
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Found(key)
        _take(current, suffix, member, file, shard)
    if current is not None:
        yield current


def _take(sample: Found, suffix: str, member: Member, file: HashedFile, shard: str) -> None:
    """Read a member that is one of ours; all others are passed over unread by anything but the hash."""
    if suffix in IMAGE_SUFFIXES:
        if sample.image is not None:
            raise DamagedShard(shard, "twice", member.start, f"{sample.key!r} has a second image, {member.name!r}")
        _check_cap(member, MAX_IMAGE, shard)
        sample.image, sample.suffix = member, suffix
        sample.checksum = zlib.crc32(_whole(file, member, shard))
    elif suffix in TEXT_SUFFIXES:
        _check_cap(member, MAX_TEXT, shard)
        sample.texts[suffix] = _whole(file, member, shard)


def _check_cap(member: Member, cap: int, shard: str) -> None:
    if member.length > cap:
        raise DamagedShard(shard, "too large", member.start, f"{member.name!r} has {member.length} bytes (cap {cap})")


def _whole(file: HashedFile, member: Member, shard: str) -> bytes:
    data = file.read(member.length)
    if len(data) < member.length:
        raise DamagedShard(shard, "cut", member.start, f"the file ends inside {member.name!r}")
    return data


def rows_of(content: ShardContent, number: int, suffixes: list[str], label_of: LabelOf, shard: str) -> np.ndarray:
    """SAMPLE_DTYPE rows of one shard; `suffixes` grows by those not met before."""
    rows = np.zeros(len(content.samples), SAMPLE_DTYPE)
    for position, sample in enumerate(content.samples):
        assert sample.image is not None
        if sample.suffix not in suffixes:
            suffixes.append(sample.suffix)
        try:
            label, group = label_of(sample.key, sample.texts)
        except DataError as error:
            raise DataError(f"{shard}: sample {sample.key!r}: {error}") from None
        blocks = (sample.image.offset - sample.image.start) // BLOCK
        image = sample.image
        suffix = suffixes.index(sample.suffix)
        rows[position] = (number, blocks, suffix, image.offset, image.length, label, group, sample.checksum)
    return rows


def index_split(root: Path, name: str, paths: Sequence[str | Path], label_of: LabelOf) -> tuple[Split, np.ndarray]:
    """One split's entry and rows; paths under `root` are stored relative to it, others as they are."""
    shards: list[Shard] = []
    tables: list[np.ndarray] = []
    suffixes: list[str] = []
    for number, path in enumerate(paths):
        content = read_shard(path)
        tables.append(rows_of(content, number, suffixes, label_of, str(path)))
        shards.append(Shard(_stored(root, path), content.bytes, content.sha256, len(content.samples)))
    rows = np.concatenate(tables) if tables else np.zeros(0, SAMPLE_DTYPE)
    return make_split(root, name, shards, suffixes, rows), rows


def make_split(root: Path, name: str, shards: Sequence[Shard], suffixes: Sequence[str], rows: np.ndarray) -> Split:
    """A split's entry for rows that are to be written to `NAME/samples.bin`."""
    table = Table(f"{name}/samples.bin", rows.nbytes, hashlib.sha256(rows.tobytes()).hexdigest())
    num_groups = len(np.unique(rows["group"][rows["group"] != NO_GROUP]))
    return Split(name, tuple(shards), len(rows), tuple(suffixes), num_groups, table, root)


def _stored(root: Path, path: str | Path) -> str:
    absolute, base = os.path.abspath(path), os.path.abspath(root)
    return os.path.relpath(absolute, base) if absolute.startswith(base + os.sep) else absolute


def write_index(
    root: Path,
    name: str,
    taxonomy: Taxonomy,
    splits: Sequence[tuple[Split, np.ndarray]],
    preparation: Mapping[str, Any],
) -> DatasetIndex:
    """Write each split's table and, last of all and atomically, index.json; returns what was written, read back."""
    for split, rows in splits:
        if rows.size and not 0 <= rows["label"].min() <= rows["label"].max() < taxonomy.num_nodes:
            raise DataError(f"split {split.name!r} has a label outside the class tree's {taxonomy.num_nodes} nodes")
        write_durably(root / split.table.path, rows.tobytes())
    content = {
        "format": FORMAT,
        "name": name,
        "preparation": dict(preparation),
        "taxonomy": taxonomy.to_json(),
        "splits": {split.name: describe_split(split) for split, _ in splits},
    }
    write_durably(root / INDEX_NAME, render_index(content))
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
    return write_index(root, name or root.name, taxonomy, indexed, preparation or {})


def write_durably(path: Path, data: bytes) -> None:
    """Put a file at its name with all its bytes or not at all, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(stage, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
