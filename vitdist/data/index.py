"""The index of a packed set: which shards there are and, for each sample, where its bytes lie and what it shows.

`index.json` holds what is counted in shards and classes; `samples.bin`, one per split, holds one fixed-size row per
sample and is memory-mapped, so that a process pays for the rows it touches and not for the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from vitdist.data.storage.keys import split_name
from vitdist.data.storage.tar import BLOCK, MAX_HEADER_BLOCKS, DamagedShard, parse_header
from vitdist.errors import DataError
from vitdist.taxonomy import Taxonomy

if TYPE_CHECKING:
    from vitdist.data.storage.cache import ShardCache

FORMAT = 1
INDEX_NAME = "index.json"
_END = b"\n}\n"
_TAIL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in the split's shards
        ("header_blocks", "<u2"),  # the member's headers begin this many tar blocks before `offset`
        ("suffix", "<u2"),  # position in the split's suffixes
        ("offset", "<u8"),  # of the image's first byte in the shard
        ("length", "<u4"),
        ("label", "<i4"),  # a node of the class tree
        ("group", "<i4"),  # samples that must not be split apart share one; -1: none
        ("checksum", "<u4"),  # crc32 of the image's bytes
    ]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its path from the index's folder (or an absolute path or URL), and what it must contain."""

    path: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Table:
    """The file with a split's rows, and what it must contain."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split's shards, and its rows in shard order, then file order: each shard owns a contiguous range."""

    name: str
    shards: tuple[Shard, ...]
    num_samples: int
    suffixes: tuple[str, ...]
    num_groups: int
    table: Table
    root: Path = field(repr=False)
    base: str = field(default="", repr=False)  # the address that shards are relative to, where the set is remote
    cache: ShardCache | None = field(default=None, repr=False)

    @cached_property
    def samples(self) -> np.ndarray:
        """SAMPLE_DTYPE [N], memory-mapped read-only; opened at the first use in each process."""
        if not self.num_samples:
            return np.zeros(0, SAMPLE_DTYPE)
        return np.memmap(self.root / self.table.path, dtype=SAMPLE_DTYPE, mode="r", shape=(self.num_samples,))

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """int64 [S+1]: shard s owns the rows shard_starts[s] to shard_starts[s+1]."""
        counts = np.fromiter((shard.samples for shard in self.shards), np.int64, len(self.shards))
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))

    def shard_file(self, shard: int) -> str:
        """Where a shard is: a path, or an address."""
        path = self.shards[shard].path
        if is_url(path):
            return path
        return self.base + quote(path) if self.base else str(self.root / path)

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard is not a file here."""
        return bool(self.base) or any(is_url(shard.path) for shard in self.shards)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("samples", "shard_starts")}

    def check_shards(self) -> None:
        """DataError naming the first local shard that is missing or of another size; looks at sizes only."""
        for number, shard in enumerate(self.shards):
            path = self.shard_file(number)
            if is_url(path):
                continue
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise DataError(
                    f"shard {path} cannot be read ({error.strerror}); copy it back or pack the set again"
                ) from None
            if size != shard.bytes:
                raise DataError(f"shard {path} has {size} bytes, its index says {shard.bytes}; copy it again")


@dataclass(frozen=True)
class DatasetIndex:
    """A packed set; `hash` is the sha256 of its index.json and identifies the set wherever it lies."""

    root: Path
    name: str
    taxonomy: Taxonomy
    splits: dict[str, Split]
    preparation: Mapping[str, Any]
    hash: str

    def split(self, name: str) -> Split:
        """The split of that name; DataError naming those there are."""
        if name not in self.splits:
            raise DataError(f"{self.root} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def placed(self, base: str, cache: ShardCache | None) -> DatasetIndex:
        """The same set with its shards at an address ("" where they are files here), read through a cache."""
        for split in self.splits.values():
            outside = next((s.path for s in split.shards if s.path.startswith("/") or ".." in s.path.split("/")), None)
            if base and outside is not None:
                raise DataError(f"{base}{INDEX_NAME} names the shard {outside!r}, which is not below it")
        splits = {name: replace(split, base=base, cache=cache) for name, split in self.splits.items()}
        return replace(self, splits=splits)


def is_url(path: str) -> bool:
    """Whether a shard's path is an address and not a file; the scheme is what decides."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.isalnum()


def load_index(path: str | Path) -> DatasetIndex:
    """Read a packed folder's index; DataError when there is none, it is of another kind or its tables are missing."""
    root = Path(path)
    root = root.parent if root.name == INDEX_NAME else root
    text = _read(root)
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise DataError(f"{root / INDEX_NAME} has format {data['format']!r}, this vitdist reads {FORMAT}")
        if "sha256" in data and not is_intact(text):
            raise DataError(f"{root / INDEX_NAME} was changed after it was written; copy or pack the set again")
        index = DatasetIndex(
            root,
            str(data["name"]),
            Taxonomy.from_json(data["taxonomy"]),
            {name: _split(root, name, split) for name, split in data["splits"].items()},
            dict(data["preparation"]),
            hashlib.sha256(text).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{root / INDEX_NAME} is no index of a packed set: {error!r}; pack or index it again") from None
    for split in index.splits.values():
        _check_split(root, split)
    return index


def _read(root: Path) -> bytes:
    try:
        return (root / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{root} holds no packed set (no {INDEX_NAME}); make one with `vitdist data cub|folder|demo ... {root}`"
        ) from None
    except OSError as error:
        raise DataError(f"{root / INDEX_NAME} cannot be read: {error.strerror}") from None


def _split(root: Path, name: str, data: Any) -> Split:
    shards = tuple(Shard(str(s["path"]), int(s["bytes"]), str(s["sha256"]), int(s["samples"])) for s in data["shards"])
    table = Table(str(data["table"]["path"]), int(data["table"]["bytes"]), str(data["table"]["sha256"]))
    suffixes = tuple(str(suffix) for suffix in data["suffixes"])
    return Split(name, shards, int(data["samples"]), suffixes, int(data["groups"]), table, root)


def _check_split(root: Path, split: Split) -> None:
    if any(shard.path.startswith("pipe:") for shard in split.shards):
        raise DataError(f"{root / INDEX_NAME}: split {split.name!r} names a shell command, which is never run")
    in_shards = sum(shard.samples for shard in split.shards)
    if {in_shards, split.table.bytes / SAMPLE_DTYPE.itemsize} != {split.num_samples} or any(
        shard.samples < 0 or shard.bytes < 0 for shard in split.shards
    ):
        raise DataError(f"{root / INDEX_NAME}: split {split.name!r} contradicts itself about its number of samples")
    path = root / split.table.path
    size = path.stat().st_size if path.is_file() else None
    if size != split.table.bytes:
        found = "is missing" if size is None else f"has {size} bytes, the index says {split.table.bytes}"
        raise DataError(f"{path} {found}; copy the packed set again, or pack it again")


def read_key(fd: int, row: np.void) -> str:
    """The key of one sample, from the headers of its image in an open shard; DamagedShard when they are not there."""
    num_blocks = min(int(row["header_blocks"]), MAX_HEADER_BLOCKS)
    start = int(row["offset"]) - num_blocks * BLOCK
    return key_of(os.pread(fd, num_blocks * BLOCK, max(start, 0)), row)


def key_of(header: bytes, row: np.void, shard: str = "shard") -> str:
    """The key in `header`, the header blocks before a row's image; DamagedShard when they are not the row's."""
    offset, length = int(row["offset"]), int(row["length"])
    start = offset - len(header)
    member = parse_header(header, shard, start)
    names = split_name(member.name)
    if names is None or member.offset != offset or member.length != length:
        raise DamagedShard(shard, "header", start, f"{member.name!r} is not the member the index has here")
    return names[0]


def render_index(data: Mapping[str, Any]) -> bytes:
    """index.json's bytes, the hash of all the rest last, so that any changed byte shows."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    body = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(body).hexdigest().encode()
    return body.removesuffix(_END) + b',\n "sha256": "' + digest + b'"' + _END


def is_intact(text: bytes) -> bool:
    """Whether these are the bytes that `render_index` made; hashed as they are, since rendering again is slow."""
    tail = _TAIL.search(text, max(0, len(text) - 100))
    return tail is not None and hashlib.sha256(text[: tail.start()] + _END).hexdigest().encode() == tail.group(1)


def describe_split(split: Split) -> dict[str, Any]:
    """A split as index.json has it."""
    return {
        "samples": split.num_samples,
        "table": asdict(split.table),
        "suffixes": list(split.suffixes),
        "groups": split.num_groups,
        "shards": [asdict(shard) for shard in split.shards],
    }
